"""The searches for blocks with one scale (and minimum) and for super-blocks whose scales are quantized themselves.

All start from a sweep over candidate steps, each followed by the step (and offset) of least squared error for the codes
it leads to. Super-blocks then choose the integer scales of their groups by exact error, around the rounded ones, in
turn with the least-squares common step, as float16 holds it. See :mod:`lowbit.kernels.ggml.lanes` for the tiles.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lowbit.kernels.ggml.lanes import (
    BEST,
    BEST_M,
    BEST_S,
    CODE_M,
    CODE_S,
    ERROR,
    EXTREME,
    KEPT,
    KEPT_M,
    KEPT_S,
    KEPT_STEP_M,
    KEPT_STEP_S,
    LANES,
    LEAST,
    MOST,
    OTHER_M,
    OTHER_S,
    ROWS,
    STEP_M,
    STEP_S,
    UNIT,
    WE,
    WEQ,
    WQ,
    WQQ,
    M,
    S,
    W,
    compiled,
    error,
    fit_step,
    fit_step_and_offset,
    keep_best,
    load,
    measure,
    measure_step,
    round_to_half,
    store_codes,
    store_table_codes,
    table_error,
    table_measure,
)

_ZERO = np.float32(0.0)
_HUGE = np.float32(np.inf)


@compiled  # type: ignore[untyped-decorator]
def _measure(x: Any, w: Any, state: Any, size: int, low: Any, high: Any, table: Any) -> None:
    if table.shape[0]:
        table_measure(x, w, state, size, table)
    else:
        measure(x, w, state, size, low, high)


@compiled  # type: ignore[untyped-decorator]
def _error(x: Any, w: Any, state: Any, size: int, low: Any, high: Any, table: Any) -> None:
    if table.shape[0]:
        table_error(x, w, state, size, table)
    else:
        error(x, w, state, size, low, high)


@compiled  # type: ignore[untyped-decorator]
def _measure_step(x: Any, w: Any, state: Any, size: int, low: Any, high: Any, table: Any) -> None:
    if table.shape[0]:
        table_measure(x, w, state, size, table)
    else:
        measure_step(x, w, state, size, low, high)


@compiled  # type: ignore[untyped-decorator]
def _sweep_steps(
    x: Any, w: Any, state: Any, size: int, low: Any, high: Any, table: Any, places: Any, half: bool, rounds: int
) -> None:
    """Best step of each lane: the weight of greatest magnitude at each of ``places``, then ``rounds`` refits.

    A place counts by the least error that its codes can have, which their sums tell without another pass.
    """
    for lane in range(LANES):
        state[BEST + lane] = _HUGE
        state[BEST_S + lane] = _ZERO
        state[M + lane] = _ZERO
    for place in places:
        for lane in range(LANES):
            state[S + lane] = state[EXTREME + lane] / place
        _measure_step(x, w, state, size, low, high, table)
        for lane in range(LANES):
            squares = state[WQQ + lane]
            change = state[WEQ + lane] / squares if squares > _ZERO else _ZERO
            least = state[ERROR + lane] - change * state[WEQ + lane]
            better = least < state[BEST + lane]
            state[BEST + lane] = least if better else state[BEST + lane]
            state[BEST_S + lane] = state[S + lane] + change if better else state[BEST_S + lane]
    for lane in range(LANES):
        state[BEST + lane] = _HUGE
        state[S + lane] = state[BEST_S + lane]
    for _ in range(rounds):
        if half:
            round_to_half(state, S)
        _measure_step(x, w, state, size, low, high, table)
        keep_best(state)
        fit_step(state)
    if half:
        round_to_half(state, S)
    _error(x, w, state, size, low, high, table)
    keep_best(state)


@compiled  # type: ignore[untyped-decorator]
def _sweep_ranges(
    x: Any, w: Any, state: Any, size: int, high: Any, spans: Any, least_offset: Any, half: bool, rounds: int
) -> None:
    """Best step and offset of each lane: its range laid over each of ``spans`` (steps, share cut off below).

    A span counts by the least error that its codes can have, which their sums tell without another pass.
    """
    for lane in range(LANES):
        state[BEST + lane] = _HUGE
        state[BEST_S + lane] = _ZERO
        state[BEST_M + lane] = _ZERO
    for candidate in range(spans.shape[0]):
        steps, share = spans[candidate, 0], spans[candidate, 1]
        for lane in range(LANES):
            least = min(state[LEAST + lane], -least_offset)
            step = (state[MOST + lane] - least) / steps
            state[S + lane] = step
            state[M + lane] = max(-least - (steps - high) * share * step, least_offset)
            state[STEP_S + lane] = state[S + lane]
            state[STEP_M + lane] = state[M + lane]
        measure(x, w, state, size, _ZERO, high)
        fit_step_and_offset(state, least_offset)
        for lane in range(LANES):
            change, shift = state[S + lane] - state[STEP_S + lane], state[M + lane] - state[STEP_M + lane]
            crossed = shift * state[WE + lane] - change * state[WEQ + lane] - shift * change * state[WQ + lane]
            squares = shift * shift * state[W + lane] + change * change * state[WQQ + lane]
            state[ERROR + lane] += squares + crossed + crossed
        keep_best(state)
    for lane in range(LANES):
        state[BEST + lane] = _HUGE
        state[S + lane] = state[BEST_S + lane]
        state[M + lane] = state[BEST_M + lane]
    for _ in range(rounds):
        if half:
            round_to_half(state, S)
            round_to_half(state, M)
        measure(x, w, state, size, _ZERO, high)
        keep_best(state)
        fit_step_and_offset(state, least_offset)
    if half:
        round_to_half(state, S)
        round_to_half(state, M)
    error(x, w, state, size, _ZERO, high)
    keep_best(state)


@compiled  # type: ignore[untyped-decorator]
def _tile(size: int) -> Any:
    return (
        np.zeros(size * LANES, np.float32),
        np.ones(size * LANES, np.float32),
        np.zeros(ROWS * LANES, np.float32),
    )


@compiled  # type: ignore[untyped-decorator]
def solve_steps(
    weight: Any,
    importance: Any,
    low: Any,
    high: Any,
    table: Any,
    names: Any,
    places: Any,
    rounds: int,
    codes: Any,
    steps: Any,
) -> None:
    """Blocks with one float16 scale: fills ``codes`` uint8 (less ``low``) and ``steps`` float32 ``[blocks]``."""
    blocks, size = weight.shape
    x, w, state = _tile(size)
    for first in range(0, blocks, LANES):
        load(weight, importance, first, size, x, w, state)
        _sweep_steps(x, w, state, size, low, high, table, places, True, rounds)
        for lane in range(LANES):
            state[S + lane] = state[BEST_S + lane]
            if first + lane < blocks:
                steps[first + lane] = state[S + lane] * state[UNIT + lane]
        if table.shape[0]:
            store_table_codes(x, state, first, size, names, codes)
        else:
            store_codes(x, state, first, size, low, high, codes)


@compiled  # type: ignore[untyped-decorator]
def solve_ranges(
    weight: Any, importance: Any, high: Any, spans: Any, rounds: int, codes: Any, steps: Any, offsets: Any
) -> None:
    """Blocks with float16 scale and minimum: fills ``codes``, ``steps`` and ``offsets`` float32 ``[blocks]``."""
    blocks, size = weight.shape
    x, w, state = _tile(size)
    for first in range(0, blocks, LANES):
        load(weight, importance, first, size, x, w, state)
        _sweep_ranges(x, w, state, size, high, spans, -_HUGE, True, rounds)
        for lane in range(LANES):
            state[S + lane] = state[BEST_S + lane]
            state[M + lane] = state[BEST_M + lane]
            if first + lane < blocks:
                steps[first + lane] = state[S + lane] * state[UNIT + lane]
                offsets[first + lane] = -state[M + lane] * state[UNIT + lane]
        store_codes(x, state, first, size, _ZERO, high, codes)


@compiled  # type: ignore[untyped-decorator]
def _round_code(value: Any, step: Any, least: Any, most: Any) -> Any:
    return min(max(np.rint(value / step), least), most) if step != _ZERO else _ZERO


@compiled  # type: ignore[untyped-decorator]
def _apply_codes(state: Any) -> None:
    for lane in range(LANES):
        state[S + lane] = state[STEP_S + lane] * state[CODE_S + lane]
        state[M + lane] = state[STEP_M + lane] * state[CODE_M + lane]


@compiled  # type: ignore[untyped-decorator]
def _keep_super_blocks(state: Any, groups: int) -> None:
    """Remember codes and steps of the super-blocks whose ``ERROR`` in total is the least so far."""
    for lane in range(0, LANES, groups):
        total = _ZERO
        for group in range(groups):
            total += state[ERROR + lane + group]
        if total < state[KEPT + lane]:
            state[KEPT + lane] = total
            for group in range(lane, lane + groups):
                state[KEPT_S + group] = state[CODE_S + group]
                state[KEPT_M + group] = state[CODE_M + group]
                state[KEPT_STEP_S + group] = state[STEP_S + group]
                state[KEPT_STEP_M + group] = state[STEP_M + group]


@compiled  # type: ignore[untyped-decorator]
def _search_codes(
    x: Any, w: Any, state: Any, size: int, low: Any, high: Any, table: Any, least: Any, most: Any, moves: Any
) -> None:
    """Replace the codes of scale and minimum by the best of the neighbours ``moves`` int ``[n, 2]``, by exact error."""
    for lane in range(LANES):
        state[BEST + lane] = _HUGE
    for move in range(moves.shape[0]):
        for lane in range(LANES):
            scale = min(max(state[CODE_S + lane] + moves[move, 0], least), most)
            minimum = min(max(state[CODE_M + lane] + moves[move, 1], _ZERO), most)
            state[BEST_S + lane] = scale
            state[BEST_M + lane] = minimum
            state[S + lane] = state[STEP_S + lane] * scale
            state[M + lane] = state[STEP_M + lane] * minimum
        _error(x, w, state, size, low, high, table)
        for lane in range(LANES):
            better = state[ERROR + lane] < state[BEST + lane]
            state[BEST + lane] = state[ERROR + lane] if better else state[BEST + lane]
            state[OTHER_S + lane] = state[BEST_S + lane] if better else state[OTHER_S + lane]
            state[OTHER_M + lane] = state[BEST_M + lane] if better else state[OTHER_M + lane]
    for lane in range(LANES):
        state[CODE_S + lane] = state[OTHER_S + lane]
        state[CODE_M + lane] = state[OTHER_M + lane]
        state[ERROR + lane] = state[BEST + lane]


@compiled  # type: ignore[untyped-decorator]
def _fit_super_step(state: Any, groups: int) -> None:
    """Move ``STEP_S`` to the least error of the codes measured, the codes of the groups as they are."""
    for lane in range(0, LANES, groups):
        right, left = _ZERO, _ZERO
        for group in range(lane, lane + groups):
            code = state[CODE_S + group]
            right += code * state[WEQ + group]
            left += code * code * state[WQQ + group]
        change = right / left if left > _ZERO else _ZERO
        for group in range(lane, lane + groups):
            state[STEP_S + group] += change
    round_to_half(state, STEP_S)


@compiled  # type: ignore[untyped-decorator]
def _fit_super_steps(state: Any, groups: int) -> None:
    """Move ``STEP_S`` and ``STEP_M`` to the least error of the codes measured, the codes of the groups as they are."""
    for lane in range(0, LANES, groups):
        ss, sm, mm, es, em = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
        for group in range(lane, lane + groups):
            scale, minimum = state[CODE_S + group], state[CODE_M + group]
            ss += scale * scale * state[WQQ + group]
            sm += scale * minimum * state[WQ + group]
            mm += minimum * minimum * state[W + group]
            es += scale * state[WEQ + group]
            em += minimum * state[WE + group]
        determinant = ss * mm - sm * sm
        if determinant > np.float32(1e-6) * ss * mm:
            change = (es * mm - em * sm) / determinant
            shift = (es * sm - em * ss) / determinant
        else:
            change = es / ss if ss > _ZERO else _ZERO
            shift = _ZERO
        for group in range(lane, lane + groups):
            state[STEP_S + group] = max(state[STEP_S + group] + change, _ZERO)
            state[STEP_M + group] = max(state[STEP_M + group] + shift, _ZERO)
    round_to_half(state, STEP_S)
    round_to_half(state, STEP_M)


@compiled  # type: ignore[untyped-decorator]
def _store_super_blocks(state: Any, first: int, groups: int, scales: Any, steps: Any) -> None:
    """Take the kept codes and steps; write ``scales`` ``[2, blocks, groups]`` and ``steps`` ``[2, blocks]``."""
    for lane in range(LANES):
        state[CODE_S + lane] = state[KEPT_S + lane]
        state[CODE_M + lane] = state[KEPT_M + lane]
        state[STEP_S + lane] = state[KEPT_STEP_S + lane]
        state[STEP_M + lane] = state[KEPT_STEP_M + lane]
        block = first + lane // groups
        if block < scales.shape[1]:
            scales[0, block, lane % groups] = np.int8(state[CODE_S + lane])
            scales[1, block, lane % groups] = np.int8(state[CODE_M + lane])
            steps[0, block] = state[STEP_S + lane] * state[UNIT + lane]
            steps[1, block] = state[STEP_M + lane] * state[UNIT + lane]
    _apply_codes(state)


@compiled  # type: ignore[untyped-decorator]
def solve_super_steps(
    weight: Any,
    importance: Any,
    size: int,
    low: Any,
    high: Any,
    table: Any,
    names: Any,
    places: Any,
    rounds: int,
    least: Any,
    most: Any,
    fractions: Any,
    moves: Any,
    passes: int,
    codes: Any,
    scales: Any,
    steps: Any,
) -> None:
    """Super-blocks of groups of ``size`` weights with integer scales from ``least`` to ``most`` times a float16 step.

    Fills ``codes`` uint8 ``[blocks, 256]`` (less ``low``), ``scales`` int8 ``[2, blocks, groups]`` and ``steps``
    float32 ``[2, blocks]``, of which the second halves stay 0. The scale of greatest magnitude is tried at each of
    ``fractions`` (signed) of the range, the common step fitted ``passes`` times.
    """
    blocks = weight.shape[0]
    groups = weight.shape[1] // size
    x, w, state = _tile(size)
    for first in range(0, blocks, LANES // groups):
        load(weight, importance, first, size, x, w, state)
        _sweep_steps(x, w, state, size, low, high, table, places, False, rounds)
        wanted = state[BEST_S : BEST_S + LANES].copy()
        for lane in range(LANES):
            state[KEPT + lane] = _HUGE
            state[CODE_M + lane] = _ZERO
            state[STEP_M + lane] = _ZERO
        for fraction in fractions:
            for lane in range(0, LANES, groups):
                extreme = _ZERO
                for group in range(lane, lane + groups):
                    extreme = wanted[group] if abs(wanted[group]) > abs(extreme) else extreme
                for group in range(lane, lane + groups):
                    state[STEP_S + group] = extreme / fraction
            round_to_half(state, STEP_S)
            for lane in range(LANES):
                state[CODE_S + lane] = _round_code(wanted[lane], state[STEP_S + lane], least, most)
            for _ in range(passes):
                _search_codes(x, w, state, size, low, high, table, least, most, moves)
                _keep_super_blocks(state, groups)
                _apply_codes(state)
                _measure(x, w, state, size, low, high, table)
                _fit_super_step(state, groups)
            _search_codes(x, w, state, size, low, high, table, least, most, moves)
            _keep_super_blocks(state, groups)
        _store_super_blocks(state, first, groups, scales, steps)
        if table.shape[0]:
            store_table_codes(x, state, first, size, names, codes)
        else:
            store_codes(x, state, first, size, low, high, codes)


@compiled  # type: ignore[untyped-decorator]
def solve_super_ranges(
    weight: Any,
    importance: Any,
    size: int,
    high: Any,
    spans: Any,
    rounds: int,
    most: Any,
    fractions: Any,
    moves: Any,
    passes: int,
    codes: Any,
    scales: Any,
    steps: Any,
) -> None:
    """Super-blocks of groups of ``size`` weights with integer scales and minima, 0 to ``most``, times float16 steps.

    Fills ``codes`` uint8 ``[blocks, 256]``, ``scales`` int8 ``[2, blocks, groups]`` (scales, minima) and ``steps``
    float32 ``[2, blocks]``. The greatest scale and minimum are tried at each of ``fractions`` ``[n, 2]`` of the range,
    the common steps fitted ``passes`` times.
    """
    blocks = weight.shape[0]
    groups = weight.shape[1] // size
    nothing = np.zeros(0, np.float32)
    x, w, state = _tile(size)
    for first in range(0, blocks, LANES // groups):
        load(weight, importance, first, size, x, w, state)
        _sweep_ranges(x, w, state, size, high, spans, _ZERO, False, rounds)
        wanted = state[BEST_S : BEST_S + 2 * LANES].copy()
        for lane in range(LANES):
            state[KEPT + lane] = _HUGE
        for trial in range(fractions.shape[0]):
            for lane in range(0, LANES, groups):
                scale, minimum = _ZERO, _ZERO
                for group in range(lane, lane + groups):
                    scale = max(scale, wanted[group])
                    minimum = max(minimum, wanted[LANES + group])
                for group in range(lane, lane + groups):
                    state[STEP_S + group] = scale / fractions[trial, 0]
                    state[STEP_M + group] = minimum / fractions[trial, 1]
            round_to_half(state, STEP_S)
            round_to_half(state, STEP_M)
            for lane in range(LANES):
                state[CODE_S + lane] = _round_code(wanted[lane], state[STEP_S + lane], _ZERO, most)
                state[CODE_M + lane] = _round_code(wanted[LANES + lane], state[STEP_M + lane], _ZERO, most)
            for _ in range(passes):
                _search_codes(x, w, state, size, _ZERO, high, nothing, _ZERO, most, moves)
                _keep_super_blocks(state, groups)
                _apply_codes(state)
                measure(x, w, state, size, _ZERO, high)
                _fit_super_steps(state, groups)
            _search_codes(x, w, state, size, _ZERO, high, nothing, _ZERO, most, moves)
            _keep_super_blocks(state, groups)
        _store_super_blocks(state, first, groups, scales, steps)
        store_codes(x, state, first, size, _ZERO, high, codes)
