"""HQQ: zero points that make few weights pay for the many, without data (half-quadratic quantization).

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). With the scale ``s`` fixed, the
zero point ``z`` minimises ``|W - s (Q - z)|_p``, ``p < 1``, which cares for most weights and lets outliers be off.
Half-quadratic splitting alternates two steps that each have a closed form: errors ``e`` shrunk by the proximal operator
of the p-norm, ``sign(e) max(0, |e| - |e|^(p-1) / beta)``, then the zero point as a mean over the group.

Two things are chosen otherwise than in the paper's code. Errors are measured in steps, so that ``beta`` means the same
for every matrix; and of all iterations each group keeps its best one, by squared error, where that code stops a whole
matrix when its mean error grows. At 2 bits narrower ranges are tried too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lowbit.errors import UsageError
from lowbit.formats.integer import encode, grid, group_extrema
from lowbit.formats.spec import PER_CHANNEL, IntSpec
from lowbit.formats.tensor import QuantizedTensor
from lowbit.quant.solution import Solution

__all__ = ["HqqOptions", "solve"]

_CHUNK = 1 << 17
"""Weights that are worked on at a time: they stay in the cache."""
_NARROWER = (0.9, 0.8, 0.7, 0.6, 0.5)
_GROWTH = 1.01


@dataclass(frozen=True, slots=True)
class HqqOptions:
    """``lp_norm`` in (0, 1]: the p-norm of errors; ``beta``: the first weight of the splitting, in steps; both of the
    paper's value. ``iterations`` of the two steps."""

    lp_norm: float = 0.7
    beta: float = 10.0
    iterations: int = 20

    def __post_init__(self) -> None:
        if not 0.0 < self.lp_norm <= 1.0:
            raise UsageError(f"hqq lp_norm must be above 0 and at most 1, not {self.lp_norm}: 0.7 is usual")
        if self.beta <= 0.0:
            raise UsageError(f"hqq beta must be positive, not {self.beta}: 10 is usual")
        if self.iterations < 1:
            raise UsageError(f"hqq iterations must be at least 1, not {self.iterations}: 20 is usual")


@torch.no_grad()
def solve(weight: torch.Tensor, spec: IntSpec, options: HqqOptions) -> Solution:
    """Quantize ``weight`` float ``[out, in]`` (left unchanged) with zero points that are floats or codes, as ``spec``
    says. Raises :class:`NumericsError` if it is not finite."""
    weight = weight.to(torch.float32)
    whole = weight.shape[1] - weight.shape[1] % spec.group_size if spec.group_size > 0 else weight.shape[1]
    parts = [part for part in (weight[:, :whole], weight[:, whole:]) if part.shape[1]]
    # a ragged last group is one of its own width
    specs = [spec if part.shape[1] == whole else replace(spec, group_size=PER_CHANNEL) for part in parts]
    grids = [_best_grid(part, one, options) for part, one in zip(parts, specs, strict=True)]
    scales, zeros = (torch.cat(values, 1) for values in zip(*grids, strict=True))
    return Solution(QuantizedTensor(spec, encode(weight, spec, scales, zeros), scales, zeros))


def _best_grid(weight: torch.Tensor, spec: IntSpec, options: HqqOptions) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = group_extrema(weight, spec)
    found = [_search(weight, low * factor, high * factor, spec, options) for factor in _factors(spec)]
    best = torch.stack([error for error, _, _ in found]).argmin(0)[None]
    scales = torch.stack([scale for _, scale, _ in found]).gather(0, best)[0]
    zeros = torch.stack([zero for _, _, zero in found]).gather(0, best)[0]
    return scales, zeros


def _factors(spec: IntSpec) -> tuple[float, ...]:
    return (1.0, *_NARROWER) if spec.bits == 2 else (1.0,)


def _search(
    weight: torch.Tensor, low: torch.Tensor, high: torch.Tensor, spec: IntSpec, options: HqqOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Squared error, scales and zero points of each group for one choice of ranges, all in the shape of ``low``."""
    scales, zeros = grid(low, high, spec)
    assert zeros is not None
    size = weight.numel() // low.numel()
    groups = weight.reshape(-1, size)
    steps, points = scales.float().reshape(-1, 1), zeros.float().reshape(-1, 1)
    errors = torch.empty_like(steps)
    rows = max(1, _CHUNK // size)
    for start in range(0, groups.shape[0], rows):
        part = slice(start, start + rows)
        errors[part], points[part] = _refine(groups[part] / steps[part], points[part], spec, options)
    errors.mul_(steps.square())
    return errors.view(low.shape), scales, points.view(low.shape).to(spec.zero_dtype)


def _refine(
    values: torch.Tensor, zeros: torch.Tensor, spec: IntSpec, options: HqqOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best zero points ``[groups, 1]`` for ``values`` in steps ``[groups, size]``, and their squared errors."""
    best = torch.full_like(zeros, torch.inf)
    chosen, beta = zeros, options.beta
    for _ in range(options.iterations):
        zeros = _storable(zeros, spec)
        codes = (values + zeros).round_().clamp_(0, spec.levels - 1)
        target = codes - values
        error = zeros - target
        loss = error.square().sum(1, keepdim=True)
        better = loss < best
        best, chosen = torch.where(better, loss, best), torch.where(better, zeros, chosen)
        size = error.abs()
        shrunk = size.sub_(size.clamp_min(1e-12).pow(options.lp_norm - 1).div_(beta)).clamp_min_(0.0)
        zeros = target.add_(shrunk.copysign_(error)).mean(1, keepdim=True)
        beta *= _GROWTH
    return best, chosen


def _storable(zeros: torch.Tensor, spec: IntSpec) -> torch.Tensor:
    """The zero points that the format holds, as float32."""
    if spec.has_float_zeros:
        return zeros.to(spec.zero_dtype).float()
    return zeros.round().clamp_(0, spec.levels - 1)
