"""The search for types whose scales are themselves numbers of a few bits: MXFP4 and NVFP4."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowbit.kernels.ggml.lanes import (
    BEST,
    BEST_M,
    BEST_S,
    CODE_M,
    EXTREME,
    LANES,
    PER_UNIT,
    ROWS,
    UNIT,
    M,
    S,
    compiled,
    keep_best,
    load,
    store_table_codes,
    table_error,
)


@compiled  # type: ignore[untyped-decorator]
def solve_listed(
    weight: Any,
    importance: Any,
    size: int,
    table: Any,
    names: Any,
    largest: Any,
    scales: Any,
    below: int,
    above: int,
    codes: Any,
    chosen: Any,
) -> None:
    """Blocks of groups of ``size`` weights with one of the ascending ``scales`` float32 ``[n]`` each.

    Every scale from ``below`` places under the least that does not clip to ``above`` places over it is tried;
    ``largest`` is the greatest level of ``table``. Fills ``codes`` uint8 ``[blocks, block_size]`` and ``chosen`` uint8
    ``[blocks, groups]``.
    """
    blocks = weight.shape[0]
    groups = weight.shape[1] // size
    x = np.zeros(size * LANES, np.float32)
    w = np.ones(size * LANES, np.float32)
    state = np.zeros(ROWS * LANES, np.float32)
    for first in range(0, blocks, LANES // groups):
        load(weight, importance, first, size, x, w, state)
        for lane in range(LANES):
            wanted = abs(state[EXTREME + lane]) / largest * state[UNIT + lane]
            state[CODE_M + lane] = np.float32(np.searchsorted(scales, wanted))
            state[BEST + lane] = np.float32(np.inf)
        for move in range(-below, above + 1):
            for lane in range(LANES):
                place = min(max(int(state[CODE_M + lane]) + move, 0), scales.shape[0] - 1)
                state[M + lane] = np.float32(place)
                state[S + lane] = scales[place] * state[PER_UNIT + lane]
            table_error(x, w, state, size, table)
            keep_best(state)
        for lane in range(LANES):
            state[S + lane] = state[BEST_S + lane]
            block = first + lane // groups
            if block < blocks:
                chosen[block, lane % groups] = np.uint8(state[BEST_M + lane])
        store_table_codes(x, state, first, size, names, codes)
