"""Sums over the halves of a run, tabulated for every pattern that a half can have."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

__all__ = ["BLOCK", "LEAST", "SHIFT", "A", "B", "compiled", "tabulate", "tabulate_columns"]

BLOCK = 256
SHIFT = 0.125
B, LEAST, A = 0, 1, 2
"""Where in the tables ``[3 or 4, runs, 2 patterns]`` the sums stand, those of the left half before those of the right:
``sum(w x g)``, the least single term of it, and ``sum(w g^2)`` (for the codebook shifted up, then down)."""

compiled = numba.njit(cache=True, nogil=True, error_model="numpy")


@compiled  # type: ignore[untyped-decorator]
def _half_sums(values: Any, first: int, halves: Any, out: Any, kind: int, run: int, begin: int) -> None:
    """``out[kind, run, begin + p]`` = sum over the coordinates of half pattern ``p``, each times its weight's value."""
    at, patterns = np.uint64(begin), np.uint64(halves.shape[1])
    if len(halves) == 4:
        v0, v1, v2, v3 = values[first], values[first + 1], values[first + 2], values[first + 3]
        for p in range(patterns):
            out[kind, run, at + p] = v0 * halves[0, p] + v1 * halves[1, p] + (v2 * halves[2, p] + v3 * halves[3, p])
    else:
        v0, v1 = values[first], values[first + 1]
        for p in range(patterns):
            out[kind, run, at + p] = v0 * halves[0, p] + v1 * halves[1, p]


@compiled  # type: ignore[untyped-decorator]
def _half_least(values: Any, first: int, halves: Any, out: Any, kind: int, run: int, begin: int) -> None:
    """``out[kind, run, begin + p]`` = the least of the coordinates of ``p``, each times its weight's value."""
    at, patterns = np.uint64(begin), np.uint64(halves.shape[1])
    if len(halves) == 4:
        v0, v1, v2, v3 = values[first], values[first + 1], values[first + 2], values[first + 3]
        for p in range(patterns):
            low, high = min(v0 * halves[0, p], v1 * halves[1, p]), min(v2 * halves[2, p], v3 * halves[3, p])
            out[kind, run, at + p] = min(low, high)
    else:
        v0, v1 = values[first], values[first + 1]
        for p in range(patterns):
            out[kind, run, at + p] = min(v0 * halves[0, p], v1 * halves[1, p])


@compiled  # type: ignore[untyped-decorator]
def tabulate_columns(importance: Any, halves: Any, shifts: int, tables: Any) -> None:
    """The sums over halves that depend on the importance of a block's columns only."""
    half, patterns = halves.shape
    for t in range(shifts):
        squares = halves * halves
        if shifts == 2:
            squares = (halves + np.float32(SHIFT if t == 0 else -SHIFT)) ** 2
        for run in range(tables.shape[1]):
            for side in range(2):
                _half_sums(importance, (2 * run + side) * half, squares, tables, A + t, run, side * patterns)


@compiled  # type: ignore[untyped-decorator]
def tabulate(importance: Any, halves: Any, shape: Any, x: Any, tables: Any, total: Any, odd: Any, product: Any) -> None:
    """The sums over halves that depend on a block's weights, and which runs have an odd number of minus signs."""
    width, magnitudes, even = shape[0], shape[3], shape[4]
    half, patterns = halves.shape
    for j in range(BLOCK):
        product[j] = importance[j] * (abs(x[j]) if magnitudes else x[j])
    for run in range(BLOCK // width):
        whole = np.float32(0.0)
        for j in range(run * width, run * width + width):
            whole += product[j]
        total[run] = whole
        for side in range(2):
            _half_sums(product, (2 * run + side) * half, halves, tables, B, run, side * patterns)
            if even:
                _half_least(product, (2 * run + side) * half, halves, tables, LEAST, run, side * patterns)
    for eight in range(BLOCK // 8):
        minus = 0
        for j in range(eight * 8, eight * 8 + 8):
            minus += int(x[j] < 0)
        odd[eight] = minus % 2 == 1
