"""The inner loop of GPTQ compiled for the CPU: tiles of 64 rows, transposed so that the rows fill the vector lanes."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

from lowbit.formats.floating import MAXIMA, MINIFLOATS
from lowbit.kernels.block import Block
from lowbit.kernels.threads import over_rows

__all__ = ["quantize_columns_numba"]

_LANES = 64
_NOTHING = np.empty(0, np.float32)


def quantize_columns_numba(block: Block, scales: torch.Tensor, zeros: torch.Tensor, first: int, last: int) -> None:
    """Compiled form of :func:`lowbit.kernels.gptq.quantize_columns_reference`, with the same bits as a result."""
    table = block.grid.numpy() if isinstance(block.grid, torch.Tensor) else _NOTHING
    mantissa, least = MINIFLOATS[block.grid] if isinstance(block.grid, str) else (0, 0)
    arrays = (
        block.current.numpy(),
        block.inverse.numpy(),
        scales.numpy(),
        zeros.numpy(),
        block.groups.numpy(),
        block.codes.numpy(),
        block.residual.numpy(),
        np.float32(block.levels - 1),
        _NOTHING[None] if block.keep is None else block.keep.numpy(),
        table,
        (table[1:] + table[:-1]) / np.float32(2),
        mantissa << 23,
        (least + 127) << 23,
        np.float32(MAXIMA[block.grid] if isinstance(block.grid, str) else 0.0),
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
    keep: Any,
    table: Any,
    bounds: Any,
    mantissa: int,
    least: int,
    largest: Any,
    start: int,
    first: int,
    last: int,
    begin: int,
    end: int,
) -> None:
    """``mantissa`` is one in the lowest bit of a float's exponent for each bit of a small float's mantissa, ``least``
    the exponent of its smallest normal number in place, ``largest`` its largest number; 0 for other grids."""
    width = current.shape[1]
    tile = np.zeros((width, _LANES), np.float32)
    value = np.zeros((last - first, _LANES), np.float32)
    code = np.zeros((last - first, _LANES), np.float32)
    kept = np.ones((last - first, _LANES), np.float32)
    step = np.ones(_LANES, np.float32)
    zero = np.zeros(_LANES, np.float32)
    error = np.zeros(_LANES, np.float32)
    ratio = np.zeros(_LANES, np.float32)
    for row in range(begin, end, _LANES):
        live = min(_LANES, end - row)
        for lane in range(live):
            for column in range(first, width):
                tile[column, lane] = current[row + lane, column]
            if keep.shape[1]:
                for column in range(first, last):
                    kept[column - first, lane] = keep[row + lane, column]
        group = -1
        for column in range(first, last):
            if groups[column] != group:
                group = groups[column]
                for lane in range(live):
                    step[lane] = scales[row + lane, group]
                    zero[lane] = zeros[row + lane, group]
            at = column - first
            if len(table):
                for lane in range(_LANES):
                    ratio[lane] = tile[column, lane] / step[lane] * kept[at, lane]
                _round_to_table(ratio, table, bounds, value[at], code[at])
                for lane in range(_LANES):
                    value[at, lane] *= step[lane]
            elif mantissa:
                for lane in range(_LANES):
                    ratio[lane] = tile[column, lane] / step[lane] * kept[at, lane]
                _round_to_float(ratio, mantissa, least, largest, value[at])
                for lane in range(_LANES):
                    value[at, lane] *= step[lane]
            else:
                for lane in range(_LANES):
                    here = np.rint(tile[column, lane] / step[lane]) + zero[lane]
                    here = (min(max(here, np.float32(0.0)), top) - zero[lane]) * kept[at, lane]
                    code[at, lane] = here + zero[lane]
                    value[at, lane] = here * step[lane]
            pivot = inverse[column, column]
            for lane in range(_LANES):
                error[lane] = (tile[column, lane] - value[at, lane]) / pivot
            for right in range(column + 1, width):
                factor = inverse[column, right]
                for lane in range(_LANES):
                    tile[right, lane] -= error[lane] * factor
        for lane in range(live):
            for column in range(first, last):
                if not mantissa:
                    codes[row + lane, start + column] = np.uint8(code[column - first, lane])
                residual[row + lane, start + column] -= value[column - first, lane]
            for column in range(last, width):
                current[row + lane, column] = tile[column, lane]


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _round_to_table(ratio: Any, table: Any, bounds: Any, value: Any, code: Any) -> None:
    """The value of ``table`` nearest to each ``ratio``, and its index; on a bound between two, the lower one."""
    for lane in range(_LANES):
        value[lane] = table[0]
        code[lane] = np.float32(0.0)
    for index in range(len(bounds)):
        bound, above = bounds[index], table[index + 1]
        for lane in range(_LANES):
            beyond = ratio[lane] > bound
            value[lane] = above if beyond else value[lane]
            code[lane] = np.float32(index + 1) if beyond else code[lane]


@numba.njit(inline="always")  # type: ignore[untyped-decorator]
def _round_to_float(ratio: Any, mantissa: int, least: int, largest: Any, value: Any) -> None:
    """The small float nearest to each ``ratio``, half-way ones to even: multiples of the step at its exponent."""
    magnitude = np.empty(_LANES, np.float32)
    bits = magnitude.view(np.int32)
    spacing = np.empty(_LANES, np.int32)
    steps = spacing.view(np.float32)
    for lane in range(_LANES):
        magnitude[lane] = min(abs(ratio[lane]), largest)
    for lane in range(_LANES):
        spacing[lane] = max(bits[lane] & 0x7F800000, least) - mantissa
    for lane in range(_LANES):
        here = min(np.rint(magnitude[lane] / steps[lane]) * steps[lane], largest)
        value[lane] = here if ratio[lane] >= 0 else -here
