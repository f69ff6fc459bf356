"""The range search compiled for the CPU: tiles of 16 rows of a group, transposed so that rows fill the vector lanes."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

from lowbit.kernels.threads import over_rows

__all__ = ["best_candidate_numba"]

_LANES = 16


def best_candidate_numba(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    importance: torch.Tensor,
    levels: int,
    group_size: int,
) -> torch.Tensor:
    """Compiled form of :func:`lowbit.kernels.ranges.best_candidate_reference`; sums in another order."""
    chosen = np.zeros(scales.shape[1:], np.int64)
    arrays = (
        weight.contiguous().numpy(),
        scales.contiguous().numpy(),
        zeros.contiguous().numpy(),
        importance.contiguous().numpy(),
        np.float32(levels - 1),
    )
    over_rows(weight.shape[0], _LANES, lambda begin, end: _search(*arrays, group_size, chosen, begin, end))
    return torch.from_numpy(chosen)


@numba.njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _search(
    weight: Any,
    scales: Any,
    zeros: Any,
    importance: Any,
    top: Any,
    group_size: int,
    chosen: Any,
    begin: int,
    end: int,
) -> None:
    columns = weight.shape[1]
    candidates, _, groups = scales.shape
    tile = np.zeros((group_size, _LANES), np.float32)
    step = np.ones(_LANES, np.float32)
    zero = np.zeros(_LANES, np.float32)
    loss = np.zeros(_LANES, np.float32)
    least = np.zeros(_LANES, np.float32)
    for row in range(begin, end, _LANES):
        live = min(_LANES, end - row)
        for group in range(groups):
            left = group * group_size
            width = min(group_size, columns - left)
            for lane in range(live):
                for column in range(width):
                    tile[column, lane] = weight[row + lane, left + column]
            least[:] = np.inf
            for candidate in range(candidates):
                for lane in range(live):
                    step[lane] = scales[candidate, row + lane, group]
                    zero[lane] = zeros[candidate, row + lane, group]
                loss[:] = 0.0
                for column in range(width):
                    factor = importance[left + column]
                    for lane in range(_LANES):
                        code = np.rint(tile[column, lane] / step[lane]) + zero[lane]
                        code = min(max(code, np.float32(0.0)), top)
                        error = (code - zero[lane]) * step[lane] - tile[column, lane]
                        loss[lane] += error * error * factor
                for lane in range(live):
                    if loss[lane] < least[lane]:
                        least[lane] = loss[lane]
                        chosen[row + lane, group] = candidate
