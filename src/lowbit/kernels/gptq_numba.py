"""The inner loop of GPTQ compiled for the CPU: tiles of 64 rows, transposed so that the rows fill the vector lanes."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

from lowbit.kernels.block import Block
from lowbit.kernels.threads import over_rows

__all__ = ["quantize_columns_numba"]

_LANES = 64


def quantize_columns_numba(block: Block, scales: torch.Tensor, zeros: torch.Tensor, first: int, last: int) -> None:
    """Compiled form of :func:`lowbit.kernels.gptq.quantize_columns_reference`, with the same bits as a result."""
    arrays = (
        block.current.numpy(),
        block.inverse.numpy(),
        scales.numpy(),
        zeros.numpy(),
        block.groups.numpy(),
        block.codes.numpy(),
        block.residual.numpy(),
        np.float32(block.levels - 1),
    )
    over_rows(
        block.current.shape[0],
        _LANES,
        lambda begin, end: _quantize(*arrays, block.start, first, last, begin, end),
    )


@numba.njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _quantize(
    current: Any,
    inverse: Any,
    scales: Any,
    zeros: Any,
    groups: Any,
    codes: Any,
    residual: Any,
    top: Any,
    start: int,
    first: int,
    last: int,
    begin: int,
    end: int,
) -> None:
    width = current.shape[1]
    tile = np.zeros((width, _LANES), np.float32)
    value = np.zeros((last - first, _LANES), np.float32)
    code = np.zeros((last - first, _LANES), np.float32)
    step = np.ones(_LANES, np.float32)
    zero = np.zeros(_LANES, np.float32)
    error = np.zeros(_LANES, np.float32)
    for row in range(begin, end, _LANES):
        live = min(_LANES, end - row)
        for lane in range(live):
            for column in range(first, width):
                tile[column, lane] = current[row + lane, column]
        group = -1
        for column in range(first, last):
            if groups[column] != group:
                group = groups[column]
                for lane in range(live):
                    step[lane] = scales[row + lane, group]
                    zero[lane] = zeros[row + lane, group]
            pivot = inverse[column, column]
            for lane in range(_LANES):
                here = np.rint(tile[column, lane] / step[lane]) + zero[lane]
                here = min(max(here, np.float32(0.0)), top)
                code[column - first, lane] = here
                here = (here - zero[lane]) * step[lane]
                value[column - first, lane] = here
                error[lane] = (tile[column, lane] - here) / pivot
            for right in range(column + 1, width):
                factor = inverse[column, right]
                for lane in range(_LANES):
                    tile[right, lane] -= error[lane] * factor
        for lane in range(live):
            for column in range(first, last):
                codes[row + lane, start + column] = np.uint8(code[column - first, lane])
                residual[row + lane, start + column] -= value[column - first, lane]
            for column in range(last, width):
                current[row + lane, column] = tile[column, lane]
