"""AWQ: scale up the input channels that matter before rounding, and clip the ranges of what is left.

Multiplying column ``j`` of the weights by ``s_j`` and dividing input ``j`` by it changes nothing until weights are
rounded; then columns with a large ``s_j`` are rounded more finely. The scales are ``s = x^r / w^(1-r)`` with ``x`` the
mean magnitude of the inputs, ``w`` that of the weights within their groups, and one ratio ``r`` that is searched for
(Lin et al., arXiv:2306.00978). No forward is needed: with the Gram matrix ``G`` of the inputs, the output error of a
candidate is ``tr(D G Dᵀ)``, ``D = W - Q(W s) / s``. The clip search is the ``gram`` range search of the solver.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowbit.errors import NumericsError, UsageError
from lowbit.formats.integer import choose_range, quantize_dequantize
from lowbit.formats.rounding import round_weight
from lowbit.formats.spec import IntSpec
from lowbit.formats.weights import WeightSpec
from lowbit.quant.error import spaced_rows
from lowbit.quant.factor import quadratic_form
from lowbit.quant.rtn import RtnOptions, round_to_nearest
from lowbit.quant.solution import Solution
from lowbit.quant.statistics import InputStatistics

__all__ = ["AwqOptions", "AwqScaling", "search_scales", "solve"]

_CACHED_ROWS = 256
_QUERY_KEY = re.compile(r"q_|k_|query|key|Wqkv|qkv")


@dataclass(frozen=True, slots=True)
class AwqOptions:
    """How AWQ works.

    ``steps``        ratios ``0, 1/steps, …`` that may be chosen; every other one is tried first, then the neighbours
                     of the best
    ``duo_scaling``  whether the magnitude of the weights takes part in the scales
    ``clip``         whether ranges are searched, by the output error that each group causes alone
    ``clip_query_key``  whether those of query and key projections are, too; the original leaves them, but with the
                     Gram matrix in its measure the search helps there as well
    ``rows``         about how many output features, evenly spaced, stand for all in the scale search (0: all)
    """

    steps: int = 20
    duo_scaling: bool = True
    clip: bool = True
    clip_query_key: bool = True
    rows: int = 512

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"awq steps must be at least 1, not {self.steps}: 20 is usual")
        if self.rows < 0:
            raise UsageError(f"awq rows must be 0 (all) or positive, not {self.rows}")


@dataclass(frozen=True, slots=True)
class AwqScaling:
    """The outcome of a scale search: float32 ``scales`` ``[in]`` to multiply the columns of the weights by.

    ``before`` and ``after`` are the output errors without and with them on the rows that were measured, as shares
    of the output (see :func:`lowbit.quant.error.output_error`).
    """

    scales: torch.Tensor
    ratio: float
    before: float
    after: float


@torch.no_grad()
def search_scales(
    weights: Sequence[torch.Tensor], statistics: InputStatistics, spec: WeightSpec, options: AwqOptions
) -> AwqScaling:
    """Search the scales shared by ``weights`` (float ``[out_i, in]`` each, one input), to be rounded as ``spec``."""
    if statistics.tokens == 0:
        raise NumericsError("awq needs calibration inputs and has none: give more calibration text, or use rtn")
    limit = None if options.rows == 0 else max(1, options.rows // len(weights))
    parts = [weight[spaced_rows(weight.shape[0], limit)].float().contiguous() for weight in weights]
    inputs = statistics.abs_mean
    magnitude = _weight_magnitude(weights, spec) if options.duo_scaling else None
    errors: dict[int, float] = {}

    def scales_at(step: int) -> torch.Tensor:
        return _scales(inputs, magnitude, step / options.steps)

    def error_at(step: int) -> float:
        if step not in errors:
            errors[step] = _error(parts, scales_at(step), statistics, spec)
        return errors[step]

    before = _error(parts, torch.ones_like(inputs), statistics, spec)
    coarse = min(range(0, options.steps, 2), key=error_at)
    best = min((step for step in (coarse - 1, coarse, coarse + 1) if 0 <= step < options.steps), key=error_at)
    signal = sum(float(quadratic_form(part, statistics.upper_gram).sum()) for part in parts) or 1.0
    if error_at(best) >= before:
        return AwqScaling(torch.ones_like(inputs), 0.0, before / signal, before / signal)
    return AwqScaling(scales_at(best), best / options.steps, before / signal, error_at(best) / signal)


@torch.no_grad()
def solve(
    weight: torch.Tensor, statistics: InputStatistics | None, spec: WeightSpec, options: AwqOptions, *, name: str = ""
) -> Solution:
    """Round ``weight`` (already scaled), its ranges searched; ``name`` tells query and key projections."""
    clip = options.clip and (options.clip_query_key or not _QUERY_KEY.match(name.rpartition(".")[2]))
    return round_to_nearest(weight, statistics, spec, RtnOptions("gram" if clip else "minmax"))


def _error(parts: Sequence[torch.Tensor], scales: torch.Tensor, statistics: InputStatistics, spec: WeightSpec) -> float:
    """Output error of rounding the scaled ``parts``, summed over them."""
    total = 0.0
    for part in parts:
        scaled = part * scales
        rounded = (
            quantize_dequantize(scaled, spec, *choose_range(scaled, spec))
            if isinstance(spec, IntSpec)
            else round_weight(scaled, spec).dequantize()
        )
        total += float(quadratic_form(rounded.div_(scales).sub_(part), statistics.upper_gram).sum())
    return total


def _weight_magnitude(weights: Sequence[torch.Tensor], spec: WeightSpec) -> torch.Tensor:
    """float32 ``[in]``: mean over all rows of ``|w|`` relative to the largest in its group."""
    columns = weights[0].shape[1]
    size = spec.group_size if spec.group_size > 0 and columns % spec.group_size == 0 else columns
    total = torch.zeros(columns, device=weights[0].device)
    for part in (part for weight in weights for part in torch.split(weight, _CACHED_ROWS)):
        groups = part.float().abs().reshape(part.shape[0], -1, size)
        total += (groups / groups.amax(2, keepdim=True).clamp_min(1e-12)).sum(0).flatten()
    return total / sum(weight.shape[0] for weight in weights)


def _scales(inputs: torch.Tensor, magnitude: torch.Tensor | None, ratio: float) -> torch.Tensor:
    """Scales for one ratio, centred so that their largest and smallest are each other's inverse."""
    scales = inputs.clamp_min(1e-6 * float(inputs.max()) + 1e-30).pow(ratio)
    if magnitude is not None:
        scales = scales / magnitude.clamp_min(1e-4).pow(1 - ratio)
    scales = scales.clamp_min(1e-4 * float(scales.max()))
    return scales / (scales.max().sqrt() * scales.min().sqrt())
