"""The range of each group: from its extrema, by a search weighted per column, or by one that sees the Gram matrix."""

from __future__ import annotations

from functools import partial
from typing import Literal, TypeAlias

import torch

from lowbit.errors import UsageError
from lowbit.formats.integer import choose_range, grid, group_extrema, round_scales, search_grid
from lowbit.formats.spec import PER_TENSOR, IntSpec
from lowbit.kernels import best_candidate

__all__ = ["RangeMethod", "choose_grid", "float_grid"]

RangeMethod: TypeAlias = Literal["minmax", "absmax", "mse", "gram"]
"""``minmax`` clips nothing; ``absmax`` gives the largest magnitude the last code on its side and uses none below the
other (bitsandbytes' rule; ``minmax`` where there are zero points); ``mse`` weighs squared errors by the mean square of
each column's input; ``gram`` takes the output error that a group causes alone, ``d G dᵀ`` with the group's diagonal
block of the Gram matrix."""

_ROWS = 2048
_WIDEST_GRAM = 512


def choose_grid(
    weight: torch.Tensor,
    spec: IntSpec,
    method: RangeMethod = "minmax",
    *,
    importance: torch.Tensor | None = None,
    upper_gram: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points (None when symmetric) of ``weight`` float32 ``[out, in]``.

    ``mse`` without ``importance`` (float32 ``[in]``) weighs columns by the diagonal of ``upper_gram`` (float32
    ``[in, in]``), without that all alike; so does ``gram`` without ``upper_gram``, and on groups wider than 512.
    """
    low, high = group_extrema(weight, spec)
    if method == "minmax":
        return grid(low, high, spec)
    if method == "absmax":
        if not spec.symmetric:
            return grid(low, high, spec)
        return round_scales(torch.maximum(high, -low) / (spec.midpoint - 1), spec.scale_dtype), None
    if method not in ("mse", "gram"):
        raise UsageError(f"unknown range method {method!r}: use minmax, absmax, mse or gram")
    size = spec.group_size if spec.group_size > 0 else weight.shape[1]
    if method == "gram" and upper_gram is not None and size <= _WIDEST_GRAM and spec.group_size != PER_TENSOR:
        return search_grid(low, high, spec, partial(_best_by_gram, weight, spec, upper_gram))
    if importance is None and upper_gram is not None:
        importance = upper_gram.diagonal()
    if spec.group_size == PER_TENSOR:
        return choose_range(weight, spec, method="mse", importance=importance)
    weights = torch.ones_like(weight[0]) if importance is None else importance.float()

    def pick(scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        steps = scales.float()
        points = torch.full_like(steps, float(spec.midpoint)) if zeros is None else zeros.float()
        return best_candidate(weight, steps, points, weights, spec.levels, size)

    return search_grid(low, high, spec, pick)


def float_grid(
    scales: torch.Tensor, zeros: torch.Tensor | None, spec: IntSpec, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous float32 scales and zero points ``[rows, groups]`` for the kernels, whatever the grain and symmetry."""
    steps = scales.float().expand(rows, -1).contiguous()
    if zeros is None:
        return steps, torch.full_like(steps, float(spec.midpoint))
    return steps, zeros.float().expand(rows, -1).contiguous()


def _best_by_gram(
    weight: torch.Tensor, spec: IntSpec, upper_gram: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> torch.Tensor:
    """Index of the best candidate, ``[out, groups]``; chunks of one group by 2048 rows stay in the cache."""
    rows, columns = weight.shape
    size = spec.group_size if spec.group_size > 0 else columns
    chosen = torch.empty(scales.shape[1:], dtype=torch.int64, device=weight.device)
    for group in range(scales.shape[2]):
        left, right = group * size, min((group + 1) * size, columns)
        block = upper_gram[left:right, left:right]
        block = block.triu() + block.triu(1).T
        for top in range(0, rows, _ROWS):
            part = slice(top, min(top + _ROWS, rows))
            here = weight[part, left:right].contiguous()
            losses = []
            for candidate in range(scales.shape[0]):
                step = scales[candidate, part, group, None].float()
                zero = float(spec.midpoint) if zeros is None else zeros[candidate, part, group, None].float()
                error = torch.div(here, step).round_().add_(zero).clamp_(0, spec.levels - 1)
                error = error.sub_(zero).mul_(step).sub_(here)
                losses.append((error @ block).mul_(error).sum(1))
            chosen[part, group] = torch.stack(losses).argmin(0)
    return chosen
