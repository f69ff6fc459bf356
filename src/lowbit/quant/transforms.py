"""The transforms by name: rewriting weights before they are rounded, without changing what the model computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from lowbit.formats.activations import ActivationSpec
from lowbit.formats.weights import WeightSpec
from lowbit.quant import awq, smoothquant
from lowbit.quant.awq import AwqOptions
from lowbit.quant.smoothquant import SmoothQuantOptions
from lowbit.quant.statistics import InputStatistics

__all__ = ["NO_TRANSFORM", "TRANSFORMS", "ScaleTransform"]

NO_TRANSFORM = "none"
"""What a recipe says to leave out the transform that its method brings along."""

_Search: TypeAlias = Callable[
    [Sequence[torch.Tensor], InputStatistics, WeightSpec, ActivationSpec | None, Any], torch.Tensor | None
]


@dataclass(frozen=True, slots=True)
class ScaleTransform:
    """A scaling of the channels of one input.

    ``search``   ``(weights, statistics, spec, inputs, options) -> scales``: float32 ``[in]`` to multiply the columns of
                 all linears on one input by (and divide that input by), or None to leave them alone
    ``options``  dataclass of its settings
    """

    name: str
    options: type[Any]
    search: _Search
    supports: Callable[[WeightSpec], list[str]]


def _awq(
    weights: Sequence[torch.Tensor],
    statistics: InputStatistics,
    spec: WeightSpec,
    inputs: ActivationSpec | None,
    options: AwqOptions,
) -> torch.Tensor | None:
    found = awq.search_scales(weights, statistics, spec, options)
    return found.scales if found.after < found.before else None


def _smoothquant(
    weights: Sequence[torch.Tensor],
    statistics: InputStatistics,
    spec: WeightSpec,
    inputs: ActivationSpec | None,
    options: SmoothQuantOptions,
) -> torch.Tensor | None:
    found = smoothquant.search_scales(weights, statistics, spec, inputs, options)
    return found.scales if found.after < found.before or options.strength >= 0 else None


def _any(spec: WeightSpec) -> list[str]:
    return []


TRANSFORMS: Mapping[str, ScaleTransform] = {
    "awq": ScaleTransform("awq", AwqOptions, _awq, _any),
    "smoothquant": ScaleTransform("smoothquant", SmoothQuantOptions, _smoothquant, _any),
}
"""Every transform of ``--transform``."""
