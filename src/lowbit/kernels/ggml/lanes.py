"""The arithmetic that all searches share: 64 groups of weights side by side, one per lane.

A tile holds the weights of 64 groups (blocks or sub-blocks) transposed, so that every loop runs over the lanes: it
vectorises without reordering a sum, and the result is the same on every processor. What is known of each lane stands
in one array ``state``, a row of 64 values per quantity (the constants below); weights are divided by a power of two
per block, ``UNIT``, so that neither huge nor tiny ones leave the range of float32.

A lane stands for ``value = S * code - M`` with codes from ``low`` to ``high``, or ``value = S * table[code]``.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

LANES = 64

S, INVERSE, M = 0 * LANES, 1 * LANES, 2 * LANES
"""The step, its inverse (0 for a step of 0) and what is subtracted."""
ERROR, WEQ, WE, WQQ, WQ, W = 3 * LANES, 4 * LANES, 5 * LANES, 6 * LANES, 7 * LANES, 8 * LANES
"""Sums over the group, weighted: squared errors, errors times codes, errors, squared codes, codes, one."""
LEAST, MOST, EXTREME = 9 * LANES, 10 * LANES, 11 * LANES
"""The least and the greatest weight of the group and the one of greatest magnitude."""
BEST, BEST_S, BEST_M = 12 * LANES, 13 * LANES, 14 * LANES
"""The least error found so far, and where."""
UNIT, PER_UNIT = 15 * LANES, 16 * LANES
"""The power of two that the weights were divided by, and its inverse."""
CODE_S, CODE_M, STEP_S, STEP_M = 17 * LANES, 18 * LANES, 19 * LANES, 20 * LANES
"""Within super-blocks S = STEP_S * CODE_S and M = STEP_M * CODE_M, with integer codes."""
OTHER_S, OTHER_M = 21 * LANES, 22 * LANES
"""Room for the best codes of a search."""
KEPT, KEPT_S, KEPT_M, KEPT_STEP_S, KEPT_STEP_M = 23 * LANES, 24 * LANES, 25 * LANES, 26 * LANES, 27 * LANES
"""The best super-block so far: its error in total, its codes and steps."""
LEVEL = 28 * LANES
"""Room for levels looked up."""
ROWS = 29

_HALF_LIMIT = np.float32(70000.0)
_SPLIT = np.float32(8193.0)
_SUBNORMAL = np.float32(2.0**-14)
_ROUNDER = np.float32(0.75)
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_TINY = np.float32(1e-37)
_POWERS = (2.0 ** np.arange(-120, 121)).astype(np.float32)
_TABLE_MIDDLE = np.float32(256.0)

compiled = numba.njit(cache=True, nogil=True, error_model="numpy")
"""How every loop is compiled: no fast-math, hence the same bits everywhere; the interpreter's lock released."""


@compiled  # type: ignore[untyped-decorator]
def load(weight: Any, importance: Any, first: int, size: int, x: Any, w: Any, state: Any) -> None:
    """Fill a tile with the groups of ``size`` weights of ``weight`` ``[blocks, block_size]`` from block ``first`` on.

    ``importance`` is ``[blocks of a row, block_size]``, or ``[0, block_size]``: then ``w`` is left at ones. Lanes past
    the last block hold zeros.
    """
    block_size = weight.shape[1]
    groups = block_size // size
    for lane in range(0, LANES, groups):
        block = first + lane // groups
        exponent = 0
        if block < weight.shape[0]:
            _transpose(weight[block], x, lane, size)
            if importance.shape[0]:
                _transpose(importance[block % importance.shape[0]], w, lane, size)
            # the greatest magnitude by its bits: an integer maximum vectorises
            greatest: Any = np.int32(0)
            for bits in weight[block].view(np.int32):
                greatest = max(greatest, bits & np.int32(0x7FFFFFFF))
            exponent = min(max(int(greatest >> 23) - 127, -100), 120) if greatest else 0
        else:
            for j in range(size):
                for group in range(lane, lane + groups):
                    x[j * LANES + group] = _ZERO
        for group in range(lane, lane + groups):
            state[UNIT + group] = _POWERS[exponent + 120]
            state[PER_UNIT + group] = _POWERS[120 - exponent]
    for lane in range(LANES):
        state[LEAST + lane] = np.float32(np.inf)
        state[MOST + lane] = np.float32(-np.inf)
        state[W + lane] = _ZERO
        state[M + lane] = _ZERO
    for j in range(size):
        for lane in range(LANES):
            value = x[j * LANES + lane] * state[PER_UNIT + lane]
            x[j * LANES + lane] = value
            state[LEAST + lane] = min(state[LEAST + lane], value)
            state[MOST + lane] = max(state[MOST + lane], value)
            state[W + lane] += w[j * LANES + lane]
    for lane in range(LANES):
        least, most = state[LEAST + lane], state[MOST + lane]
        state[EXTREME + lane] = least if -least > most else most


@compiled  # type: ignore[untyped-decorator]
def _transpose(row: Any, tile: Any, lane: int, size: int) -> None:
    for j in range(size):
        for group in range(row.shape[0] // size):
            tile[j * LANES + lane + group] = row[group * size + j]


@compiled  # type: ignore[untyped-decorator]
def invert(state: Any) -> None:
    """Set ``INVERSE`` from ``S``; a step too small to have an inverse becomes 0."""
    for lane in range(LANES):
        step = state[S + lane]
        big = abs(step) > _TINY
        state[S + lane] = step if big else _ZERO
        state[INVERSE + lane] = _ONE / step if big else _ZERO


@compiled  # type: ignore[untyped-decorator]
def round_to_half(state: Any, at: int) -> None:
    """Round row ``at`` of the state to what float16 holds once multiplied by ``UNIT``; too much becomes 70000."""
    for lane in range(LANES):
        value = state[at + lane] * state[UNIT + lane]
        value = min(max(value, -_HALF_LIMIT), _HALF_LIMIT)
        split = value * _SPLIT
        normal = split - (split - value)
        small = (value + _ROUNDER) - _ROUNDER
        state[at + lane] = (small if abs(value) < _SUBNORMAL else normal) * state[PER_UNIT + lane]


@compiled  # type: ignore[untyped-decorator]
def round_values(values: Any) -> None:
    """Round float32 ``values`` to what float16 holds; too much becomes 70000."""
    for i in range(values.shape[0]):
        value = min(max(values[i], -_HALF_LIMIT), _HALF_LIMIT)
        split = value * _SPLIT
        normal = split - (split - value)
        small = (value + _ROUNDER) - _ROUNDER
        values[i] = small if abs(value) < _SUBNORMAL else normal


@compiled  # type: ignore[untyped-decorator]
def error(x: Any, w: Any, state: Any, size: int, low: Any, high: Any) -> None:
    """``ERROR`` of each lane on a grid of integers from ``low`` to ``high``."""
    invert(state)
    for lane in range(LANES):
        state[ERROR + lane] = _ZERO
    for j in range(size):
        for lane in range(LANES):
            value = x[j * LANES + lane] + state[M + lane]
            code = min(max(np.rint(value * state[INVERSE + lane]), low), high)
            miss = value - state[S + lane] * code
            state[ERROR + lane] += w[j * LANES + lane] * miss * miss


@compiled  # type: ignore[untyped-decorator]
def _look_up(x: Any, state: Any, first: int, table: Any, entries: Any) -> None:
    """Set ``LEVEL`` to the levels nearest to the weights ``first .. first + LANES`` of the tile."""
    last = np.float32(table.shape[0] - 1)
    # apart from the loads from the table, which no vector does faster than one after the other
    for lane in range(LANES):
        place = x[first + lane] * state[INVERSE + lane]
        entries[lane] = np.int32(min(max(place + place + _TABLE_MIDDLE, _ZERO), last))
    for lane in range(LANES):
        state[LEVEL + lane] = table[np.uint64(entries[lane])]


@compiled  # type: ignore[untyped-decorator]
def table_error(x: Any, w: Any, state: Any, size: int, table: Any) -> None:
    """``ERROR`` of each lane on the levels of ``table``, see :func:`table_measure`."""
    invert(state)
    entries = np.empty(LANES, np.int32)
    for lane in range(LANES):
        state[ERROR + lane] = _ZERO
    for j in range(size):
        _look_up(x, state, j * LANES, table, entries)
        for lane in range(LANES):
            miss = x[j * LANES + lane] - state[S + lane] * state[LEVEL + lane]
            state[ERROR + lane] += w[j * LANES + lane] * miss * miss


@compiled  # type: ignore[untyped-decorator]
def measure(x: Any, w: Any, state: Any, size: int, low: Any, high: Any) -> None:
    """``ERROR``, ``WEQ``, ``WE``, ``WQQ``, ``WQ`` of each lane on a grid of integers from ``low`` to ``high``."""
    invert(state)
    for lane in range(LANES):
        state[ERROR + lane] = _ZERO
        state[WEQ + lane] = _ZERO
        state[WE + lane] = _ZERO
        state[WQQ + lane] = _ZERO
        state[WQ + lane] = _ZERO
    for j in range(size):
        for lane in range(LANES):
            weight = w[j * LANES + lane]
            value = x[j * LANES + lane] + state[M + lane]
            code = min(max(np.rint(value * state[INVERSE + lane]), low), high)
            miss = value - state[S + lane] * code
            weighted = weight * code
            state[ERROR + lane] += weight * miss * miss
            state[WEQ + lane] += weighted * miss
            state[WE + lane] += weight * miss
            state[WQQ + lane] += weighted * code
            state[WQ + lane] += weighted


@compiled  # type: ignore[untyped-decorator]
def measure_step(x: Any, w: Any, state: Any, size: int, low: Any, high: Any) -> None:
    """``ERROR``, ``WEQ``, ``WQQ`` of each lane on a grid of integers from ``low`` to ``high``, without an offset."""
    invert(state)
    for lane in range(LANES):
        state[ERROR + lane] = _ZERO
        state[WEQ + lane] = _ZERO
        state[WQQ + lane] = _ZERO
    for j in range(size):
        for lane in range(LANES):
            value = x[j * LANES + lane]
            code = min(max(np.rint(value * state[INVERSE + lane]), low), high)
            miss = value - state[S + lane] * code
            weighted = w[j * LANES + lane] * code
            state[ERROR + lane] += w[j * LANES + lane] * miss * miss
            state[WEQ + lane] += weighted * miss
            state[WQQ + lane] += weighted * code


@compiled  # type: ignore[untyped-decorator]
def table_measure(x: Any, w: Any, state: Any, size: int, table: Any) -> None:
    """``ERROR``, ``WEQ``, ``WQQ`` of each lane on the levels of ``table``.

    ``table`` is float32 ``[512]``: entry ``floor(2 * v) + 256`` is the level nearest to ``v``, which is exact when the
    midpoints between levels are multiples of a half.
    """
    invert(state)
    entries = np.empty(LANES, np.int32)
    for lane in range(LANES):
        state[ERROR + lane] = _ZERO
        state[WEQ + lane] = _ZERO
        state[WQQ + lane] = _ZERO
    for j in range(size):
        _look_up(x, state, j * LANES, table, entries)
        for lane in range(LANES):
            level = state[LEVEL + lane]
            miss = x[j * LANES + lane] - state[S + lane] * level
            weighted = w[j * LANES + lane] * level
            state[ERROR + lane] += w[j * LANES + lane] * miss * miss
            state[WEQ + lane] += weighted * miss
            state[WQQ + lane] += weighted * level


@compiled  # type: ignore[untyped-decorator]
def keep_best(state: Any) -> None:
    """Remember ``S`` and ``M`` of the lanes whose ``ERROR`` is less than ``BEST``."""
    for lane in range(LANES):
        better = state[ERROR + lane] < state[BEST + lane]
        state[BEST + lane] = state[ERROR + lane] if better else state[BEST + lane]
        state[BEST_S + lane] = state[S + lane] if better else state[BEST_S + lane]
        state[BEST_M + lane] = state[M + lane] if better else state[BEST_M + lane]


@compiled  # type: ignore[untyped-decorator]
def fit_step(state: Any) -> None:
    """Move ``S`` to the least error of the codes measured."""
    for lane in range(LANES):
        squares = state[WQQ + lane]
        state[S + lane] += state[WEQ + lane] / squares if squares > _ZERO else _ZERO


@compiled  # type: ignore[untyped-decorator]
def fit_step_and_offset(state: Any, least_offset: Any) -> None:
    """Move ``S`` and ``M`` to the least error of the codes measured, with ``M >= least_offset``."""
    for lane in range(LANES):
        weq, we, wqq = state[WEQ + lane], state[WE + lane], state[WQQ + lane]
        wq, total = state[WQ + lane], state[W + lane]
        determinant = wqq * total - wq * wq
        regular = determinant > np.float32(1e-6) * wqq * total
        change = (weq * total - we * wq) / determinant if regular else _ZERO
        shift = (change * wq - we) / total
        short = state[M + lane] + shift < least_offset
        shift = least_offset - state[M + lane] if short else shift
        alone = (weq + wq * shift) / wqq if wqq > _ZERO else _ZERO
        state[S + lane] += alone if short else change
        state[M + lane] += shift


@compiled  # type: ignore[untyped-decorator]
def store_codes(x: Any, state: Any, first: int, size: int, low: Any, high: Any, codes: Any) -> None:
    """Write ``code - low`` of every weight of the tile to ``codes`` uint8 ``[blocks, block_size]``."""
    invert(state)
    named = np.empty(size * LANES, np.uint8)
    for j in range(size):
        for lane in range(LANES):
            code = np.rint((x[j * LANES + lane] + state[M + lane]) * state[INVERSE + lane])
            named[j * LANES + lane] = np.uint8(min(max(code, low), high) - low)
    _scatter(named, first, size, codes)


@compiled  # type: ignore[untyped-decorator]
def store_table_codes(x: Any, state: Any, first: int, size: int, names: Any, codes: Any) -> None:
    """Write the code of every weight of the tile; ``names`` uint8 ``[512]`` belongs to the table of the levels."""
    invert(state)
    last = np.float32(names.shape[0] - 1)
    named = np.empty(size * LANES, np.uint8)
    for j in range(size):
        for lane in range(LANES):
            place = x[j * LANES + lane] * state[INVERSE + lane]
            entry = np.int32(min(max(place + place + _TABLE_MIDDLE, _ZERO), last))
            named[j * LANES + lane] = names[np.uint64(entry)]
    _scatter(named, first, size, codes)


@compiled  # type: ignore[untyped-decorator]
def _scatter(named: Any, first: int, size: int, codes: Any) -> None:
    groups = codes.shape[1] // size
    for lane in range(LANES):
        block = first + lane // groups
        if block < codes.shape[0]:
            row = codes[block, lane % groups * size : (lane % groups + 1) * size]
            for j in range(size):
                row[j] = named[j * LANES + lane]
