"""Round to nearest: choose each group's range, then the nearest codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.errors import UsageError
from lowbit.formats.floating import FloatSpec
from lowbit.formats.floating import encode as encode_floats
from lowbit.formats.integer import encode
from lowbit.formats.rounding import round_weight
from lowbit.formats.spec import IntSpec
from lowbit.formats.tensor import QuantizedTensor
from lowbit.formats.weights import WeightSpec
from lowbit.quant.float_scales import choose_scales
from lowbit.quant.ranges import RangeMethod, choose_grid
from lowbit.quant.solution import Solution
from lowbit.quant.statistics import InputStatistics

__all__ = ["RtnOptions", "round_to_nearest"]


@dataclass(frozen=True, slots=True)
class RtnOptions:
    """``range_method``: ``minmax``, ``absmax`` and ``mse`` need no statistics (``mse`` uses them when there are some);
    ``gram`` is AWQ's clip search and acts as ``mse`` without statistics. See :mod:`lowbit.quant.ranges`."""

    range_method: RangeMethod = "mse"

    def __post_init__(self) -> None:
        if self.range_method not in ("minmax", "absmax", "mse", "gram"):
            raise UsageError(f"rtn range_method must be minmax, absmax, mse or gram, not {self.range_method!r}")


@torch.no_grad()
def round_to_nearest(
    weight: torch.Tensor, statistics: InputStatistics | None, spec: WeightSpec, options: RtnOptions
) -> Solution:
    """Quantize ``weight`` float ``[out, in]``. Raises :class:`NumericsError` if it is not finite."""
    weight = weight.to(torch.float32)
    gram = statistics.upper_gram if statistics is not None and statistics.tokens else None
    if isinstance(spec, FloatSpec):
        importance = None if gram is None else gram.diagonal()
        search = options.range_method not in ("minmax", "absmax")
        return Solution(encode_floats(weight, spec, *choose_scales(weight, spec, search=search, importance=importance)))
    if not isinstance(spec, IntSpec):
        return Solution(round_weight(weight, spec))
    scales, zeros = choose_grid(weight, spec, options.range_method, upper_gram=gram)
    return Solution(QuantizedTensor(spec, encode(weight, spec, scales, zeros), scales, zeros))
