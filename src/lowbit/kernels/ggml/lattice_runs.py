"""The best points for runs of 4 or 8 weights at given scales.

Arrays are arguments one by one, and the search of a sub-block is one function: tuples of arrays, and one more call to
hand them through, were measured at 45 and 30 % more time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lowbit.kernels.ggml.lattice_sums import LEAST, SHIFT, A, B, compiled

__all__ = ["code_sub_block"]

LEFT, RIGHT, BYTE = np.uint32(16), np.uint32(24), np.uint32(255)


@compiled  # type: ignore[untyped-decorator]
def _best_point(
    scale: Any,
    run: int,
    t: int,
    cell: int,
    flip: bool,
    exact: bool,
    order: Any,
    start: Any,
    neighbours: Any,
    tables: Any,
    gain: Any,
) -> tuple[Any, Any]:
    """The point of a run that takes most off the error at ``scale``, and how much; ``flip``: a sign must change."""
    patterns = len(start) - 1
    right = np.uint32(patterns)
    twice, square = np.float32(2.0) * scale, scale * scale
    turned = np.float32(2.0) * twice
    for i in range(2 * patterns):
        gain[i] = twice * tables[B, run, i] - square * tables[A + t, run, i]
    best, point = np.float32(-np.inf), np.uint32(0)
    near = neighbours.shape[1]
    if flip:
        for k in range(near):
            a, b = neighbours[cell, k] >> LEFT & BYTE, (neighbours[cell, k] >> RIGHT) + right
            value = gain[a] + gain[b] - turned * min(tables[LEAST, run, a], tables[LEAST, run, b])
            if value > best:
                best, point = value, neighbours[cell, k]
    else:
        for k in range(near):
            value = gain[neighbours[cell, k] >> LEFT & BYTE] + gain[(neighbours[cell, k] >> RIGHT) + right]
            if value > best:
                best, point = value, neighbours[cell, k]
    if exact:
        top = gain[patterns]
        for i in range(patterns, 2 * patterns):
            top = max(top, gain[i])
        for i in range(patterns):
            if gain[i] + top > best:
                for k in range(start[i], start[i + 1]):
                    b = (order[k] >> RIGHT) + right
                    value = gain[i] + gain[b]
                    if flip:
                        value -= turned * min(tables[LEAST, run, i], tables[LEAST, run, b])
                    if value > best:
                        best, point = value, order[k]
    return best, point


@compiled  # type: ignore[untyped-decorator]
def _cell(x: Any, first: int, inverse: Any, delta: Any, thresholds: Any, width: int, magnitudes: bool) -> int:
    """The combination of halves nearest to ``width`` weights from ``first`` on, times ``inverse``, less ``delta``."""
    cell, place = 0, 1
    for j in range(first, first + width):
        value = x[j] * inverse - delta
        if magnitudes:
            value = abs(value)
        value += value
        digit = 0
        for threshold in thresholds:
            digit += int(value > threshold)
        cell += place * digit
        place *= len(thresholds) + 1
    return cell


@compiled  # type: ignore[untyped-decorator]
def _code_run(
    run: int,
    t: int,
    flip: bool,
    exact: bool,
    count: int,
    slot: int,
    shape: Any,
    x: Any,
    scales: Any,
    thresholds: Any,
    order: Any,
    start: Any,
    neighbours: Any,
    tables: Any,
    total: Any,
    gain: Any,
    out: Any,
) -> Any:
    """:func:`_best_point` of a run at each of ``count`` scales, with the codebook shifted up (``t`` 0) or down.

    ``out[slot, k]`` receives what is taken off, A and B; returned is the point for the last scale.
    """
    width, magnitudes, shifts = shape[0], shape[3], shape[5]
    patterns = np.uint32(len(start) - 1)
    delta = np.float32(0.0)
    if shifts == 2:
        delta = np.float32(SHIFT) if t == 0 else np.float32(-SHIFT)
    shift = delta * total[run]
    point = np.uint32(0)
    for k in range(count):
        cell = _cell(x, run * width, np.float32(1.0) / scales[k], delta, thresholds, width, magnitudes)
        value, point = _best_point(scales[k], run, t, cell, flip, exact, order, start, neighbours, tables, gain)
        left, right = point >> LEFT & BYTE, (point >> RIGHT) + patterns
        b = tables[B, run, left] + tables[B, run, right] + shift
        if flip:
            b -= np.float32(2.0) * min(tables[LEAST, run, left], tables[LEAST, run, right])
        out[slot, k, 0] = value + np.float32(2.0) * scales[k] * shift
        out[slot, k, 1] = tables[A + t, run, left] + tables[A + t, run, right]
        out[slot, k, 2] = b
    return point


@compiled  # type: ignore[untyped-decorator]
def code_sub_block(
    sub: int,
    count: int,
    exact: bool,
    shape: Any,
    x: Any,
    scales: Any,
    thresholds: Any,
    order: Any,
    start: Any,
    neighbours: Any,
    tables: Any,
    total: Any,
    odd: Any,
    gain: Any,
    out: Any,
    point: Any,
    shifted: Any,
    flipped: Any,
    sums: Any,
    at: int,
) -> None:
    """Code a sub-block at each of ``count`` scales; their A and B go to ``sums[sub, at + k]``.

    The codes for the last scale are left in ``point``, ``shifted`` and ``flipped``, which is set for the run in which a
    sign must change.
    """
    even, shifts, shared = shape[4], shape[5], shape[6]
    runs = shape[1] // shape[0]
    step = 8 // shape[0] if even else 1
    for k in range(count):
        for t in range(2):
            out[4 + t, k, 1] = out[4 + t, k, 2] = np.float32(0.0)
    for run in range(sub * runs, sub * runs + runs, step):
        must = even and odd[run // step]
        if must and step == 2:
            # one of the two runs of four gives up a sign
            for slot in range(4):
                point[slot // 2, run + slot % 2] = _code_run(
                    run + slot % 2, np.int64(0), slot >= 2, exact, count, slot, shape, x, scales, thresholds,
                    order, start, neighbours, tables, total, gain, out,
                )  # fmt: skip
            for k in range(count):
                side = 0 if out[2, k, 0] + out[1, k, 0] > out[0, k, 0] + out[3, k, 0] else 1
                for i in range(1, 3):
                    out[4, k, i] += out[2 + side, k, i] + out[1 - side, k, i]
                flipped[run], flipped[run + 1] = side == 0, side == 1
            for u in range(run, run + 2):
                if flipped[u]:
                    point[0, u] = point[1, u]
        else:
            for u in range(run, run + step):
                flipped[u] = must
                for t in range(shifts):
                    point[t, u] = _code_run(
                        u, t, must, exact, count, t, shape, x, scales, thresholds, order, start, neighbours,
                        tables, total, gain, out,
                    )  # fmt: skip
                for k in range(count):
                    if shared:
                        for t in range(shifts):
                            for i in range(1, 3):
                                out[4 + t, k, i] += out[t, k, i]
                    else:
                        t = 1 if shifts == 2 and out[1, k, 0] > out[0, k, 0] else 0
                        for i in range(1, 3):
                            out[4, k, i] += out[t, k, i]
                        shifted[u] = t
    for k in range(count):
        t = 0
        if shared:
            twice, square = np.float32(2.0) * scales[k], scales[k] * scales[k]
            up, down = twice * out[4, k, 2] - square * out[4, k, 1], twice * out[5, k, 2] - square * out[5, k, 1]
            t = 1 if down > up else 0
            for u in range(sub * runs, sub * runs + runs):
                shifted[u] = t
        sums[sub, at + k, 0], sums[sub, at + k, 1] = out[4 + t, k, 1], out[4 + t, k, 2]
