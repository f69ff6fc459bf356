"""Choosing the best of several grids for each group of a weight matrix.

One reference in torch (also the path for CUDA) and a compiled loop for the CPU (numba).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["best_candidate", "best_candidate_reference"]


def best_candidate(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    importance: torch.Tensor,
    levels: int,
    group_size: int,
) -> torch.Tensor:
    """int64 ``[out, groups]``: for each group, the candidate grid with the least weighted squared rounding error.

    ``weight``      float32 ``[out, in]``; group ``g`` is columns ``g * group_size .. (g + 1) * group_size``
    ``scales``, ``zeros``  float32 ``[candidates, out, groups]``
    ``importance``  float32 ``[in]``, weight of the squared error of each column
    """
    if weight.device.type != "cpu":
        return best_candidate_reference(weight, scales, zeros, importance, levels, group_size)
    from lowbit.kernels.ranges_numba import best_candidate_numba

    return best_candidate_numba(weight, scales, zeros, importance, levels, group_size)


def best_candidate_reference(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    importance: torch.Tensor,
    levels: int,
    group_size: int,
) -> torch.Tensor:
    """:func:`best_candidate` in torch, one candidate at a time."""
    padding = scales.shape[2] * group_size - weight.shape[1]
    groups = F.pad(weight, (0, padding)).reshape(weight.shape[0], -1, group_size)
    factors = F.pad(importance, (0, padding)).reshape(-1, group_size)
    losses = []
    for step, zero in zip(scales.unsqueeze(3), zeros.unsqueeze(3), strict=True):
        codes = torch.div(groups, step).round_().add_(zero).clamp_(0, levels - 1)
        error = codes.sub_(zero).mul_(step).sub_(groups).square_()
        losses.append((error * factors).sum(2))
    return torch.stack(losses).argmin(0)
