"""Search for the codes, sub-block scales and block scales of ggml's codebook types (IQ1, IQ2, IQ3).

A block of 256 weights has a float16 scale ``d``; each sub-block of 16 or 32 a small whole number ``n``, which makes its
scale ``s = d * unit * (2 n + 1)``; each run of 4 or 8 weights a point ``g`` of a codebook, and signs. What a choice
takes off the weighted squared error of zero is ``2 s B - s^2 A`` with ``B = sum(w x g)``, ``A = sum(w g^2)``, so codes
are compared by two sums, and what was found at one scale can be priced at every other.

Both sums are over the two halves of a run, and a half has only 64 or 81 patterns: their sums are tabulated once per
run (``A`` once for all rows, importance being per column), and a point costs two look-ups. At a scale, the nearest
points of the run's cell are tried; in the exact form also all others that the bound on their left half does not rule
out. Each sub-block is coded at scales around its best; block scales are then compared by the sums found, the best
one's codes are made exactly, and the block scale is refitted by least squares, then enlarged a little.

The enlargement costs some of the objective (which stays below llama.cpp's) for the sake of the model, whose divergence
falls where 3 bits or less are left.

Where 8 signs are stored in 7 bits their product must be plus: a run that has it otherwise flips the sign that costs
least, which is part of the search for its point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numba.extending
import numpy as np
import numpy.typing as npt

from lowbit.kernels.ggml.lattice_runs import code_sub_block
from lowbit.kernels.ggml.lattice_sums import BLOCK, A, compiled, tabulate, tabulate_columns
from lowbit.kernels.ggml.lattice_tables import Lattice

__all__ = ["Codes", "Layout", "search"]

_SCANS = 3
"""Scales tried at once around the middle of a sub-block; then one by one while the best is the outermost."""
_WIDER = 6
_TRIALS = 8
_LEAST_SHARE, _MOST_SHARE = 0.8, 1.1
"""Block scales tried: the largest scale number then stands for these shares of the largest sub-block scale."""
_TOO_LARGE = 1e30
_FLAT = 1.5
"""Square of the largest weight over the mean square, below which a sub-block has nearly one magnitude."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a type uses its codebook.

    ``sub``      weights that share a scale number
    ``steps``    how many scale numbers there are
    ``unit``     the scale of number 0 in units of the block's float16
    ``signs``    ``point`` (the codebook holds them), ``free`` or ``even`` (their product is plus over every 8)
    ``shifts``   1, or 2 where the codebook stands shifted up or down by an eighth
    ``shared``   whether the shift is a sub-block's, not a run's
    ``guess``    scale of a sub-block over its root mean square, where the search begins
    ``ratio``    from one scale tried to the next
    ``exact``    whether the final codes are the best of the whole codebook, not of the nearest points
    """

    sub: int
    steps: int
    unit: float
    signs: str
    guess: float
    ratio: float
    shifts: int = 1
    shared: bool = False
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Codes:
    """What was found, for every block of every row.

    ``points``  uint16 ``[rows, blocks, 256 / width]``
    ``shift``   uint8, the same shape: 1 where the codebook stands shifted down
    ``signs``   uint8 ``[rows, blocks, 32]``: a bit per weight, 1 is minus
    ``number``  uint8 ``[rows, blocks, 256 / sub]``: the scale numbers
    ``scale``   float16 ``[rows, blocks]``
    """

    points: npt.NDArray[np.uint16]
    shift: npt.NDArray[np.uint8]
    signs: npt.NDArray[np.uint8]
    number: npt.NDArray[np.uint8]
    scale: npt.NDArray[np.float16]


def search(
    weight: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None, table: Lattice, layout: Layout
) -> Codes:
    """Codes for ``weight`` ``[rows, 256 k]`` that make ``sum(importance * error ** 2)`` small.

    ``importance`` is ``[columns]``, positive, about 1; None stands for ones. Weights must be finite; a block too large
    for its float16 scale gets an infinite one.
    """
    rows, columns = weight.shape
    blocks, runs = columns // BLOCK, BLOCK // table.width
    points = np.zeros((rows, blocks, runs), np.uint16)
    shift = np.zeros((rows, blocks, runs), np.uint8)
    signs = np.zeros((rows, blocks, BLOCK // 8), np.uint8)
    number = np.zeros((rows, blocks, BLOCK // layout.sub), np.uint8)
    scale = np.zeros((rows, blocks), np.float32)
    subs, patterns = BLOCK // layout.sub, table.halves.shape[1]
    known = (
        np.zeros((A + layout.shifts, runs, 2 * patterns), np.float32),
        np.zeros(runs, np.float32),
        np.zeros(BLOCK // 8, np.bool_),
        np.zeros(BLOCK, np.float32),
    )
    scratch = (
        np.zeros(2 * patterns, np.float32),
        np.zeros((6, _SCANS, 3), np.float32),
        np.zeros((2, runs), np.uint32),
        np.zeros(runs, np.int64),
        np.zeros(runs, np.bool_),
        np.zeros(subs, np.float32),
        np.zeros((subs, 2 * (_SCANS + _WIDER), 2), np.float32),
        np.zeros(subs, np.int64),
        np.zeros(subs, np.int64),
        np.zeros(_SCANS, np.float32),
    )
    kept = (np.zeros(runs, np.uint32), np.zeros(runs, np.int64), np.zeros(runs, np.bool_), np.zeros(subs, np.int64))
    thresholds = table.levels[1:] + table.levels[:-1]
    even, signed = layout.signs == "even", layout.signs != "point"
    _search(
        weight,
        np.ones(columns, np.float32) if importance is None else importance,
        (thresholds, table.halves, table.points, table.order, table.start, table.neighbours),
        (layout.unit, layout.guess, layout.ratio),
        (table.width, layout.sub, layout.steps, signed, even, layout.shifts, layout.shared, layout.exact),
        known,
        scratch,
        kept,
        (points, shift, signs, number, scale),
    )
    return Codes(points, shift, signs, number, scale.astype(np.float16))


@compiled  # type: ignore[untyped-decorator]
def _half(value: Any) -> Any:
    """The float16 next to ``value``, as float32."""
    _, exponent = math.frexp(value)
    ulp = math.ldexp(1.0, max(exponent, -13) - 11)
    return np.float32(np.rint(value / ulp) * ulp)


@compiled  # type: ignore[untyped-decorator]
def _refitted(a: Any, b: Any) -> tuple[Any, Any]:
    """What codes with these A and B take off under their best scale, and that scale."""
    if a > 0 and b > 0:
        return b * b / a, b / a
    return np.float32(0.0), np.float32(0.0)


@compiled  # type: ignore[untyped-decorator]
def _priced(scale: Any, sums: Any, sub: int, count: int) -> Any:
    """What the best of the ``count`` codings found takes off the error at ``scale``."""
    best = np.float32(-np.inf)
    twice, square = np.float32(2.0) * scale, scale * scale
    for k in range(count):
        best = max(best, twice * sums[sub, k, 1] - square * sums[sub, k, 0])
    return best


@compiled  # type: ignore[untyped-decorator]
def _number(scale: Any, wanted: Any, steps: int, sums: Any, sub: int, count: int) -> tuple[int, Any]:
    """The scale number that serves a sub-block best where number 0 is ``scale``, and what it takes off."""
    low = int(min(max((wanted / scale - np.float32(1.0)) * np.float32(0.5), np.float32(0.0)), np.float32(steps - 1)))
    value = _priced(scale * np.float32(2 * low + 1), sums, sub, count)
    if low + 1 < steps:
        above = _priced(scale * np.float32(2 * low + 3), sums, sub, count)
        if above > value:
            return low + 1, above
    return low, value


@compiled  # type: ignore[untyped-decorator]
def _block_scale(unit: Any, steps: int, wanted: Any, sums: Any, counts: Any) -> Any:
    """The scale of number 0 under which the codings found take most off the error; its float16 is exact."""
    top = wanted.max()
    best, best_scale, last = np.float32(-np.inf), np.float32(0.0), np.float32(0.0)
    for trial in range(_TRIALS):
        share = np.float32(_LEAST_SHARE + (_MOST_SHARE - _LEAST_SHARE) / (_TRIALS - 1) * trial)
        scale = _half(top * share / (unit * np.float32(2 * steps - 1))) * unit
        if scale != last:
            last = scale
            value = np.float32(0.0)
            for sub in range(len(wanted)):
                value += _number(scale, wanted[sub], steps, sums, sub, counts[sub])[1]
            if value > best:
                best, best_scale = value, scale
    return best_scale


@compiled  # type: ignore[untyped-decorator]
def _scan(
    sub: int, middle: Any, top: Any, level: bool, shape: Any, ratio: Any, x: Any, codebook: Any, known: Any, room: Any,
    lists: Any,
) -> None:  # fmt: skip
    """Try scales for a sub-block around ``middle``, and beyond where the best is at the edge; ``wanted`` gets the best.

    A ``level`` one, of weights of nearly one magnitude, may fit a point of nearly one magnitude, at a scale far from
    the usual: those are tried, too.
    """
    thresholds, halves, order, start, neighbours = codebook
    tables, total, odd = known
    gain, out, point, shifted, flipped, wanted = room
    sums, counts, _, scales = lists
    wanted[sub] = 0.0
    count = _SCANS if middle > 0 else 1
    scales[0] = 1.0
    if middle > 0:
        scales[0] = middle / ratio
        for k in range(1, _SCANS):
            scales[k] = scales[k - 1] * ratio
    limit = _SCANS + _WIDER
    at, edge, best = np.int64(0), 0, np.float32(0.0)
    while count > 0:
        # scales around the middle together; beyond, one at a time
        code_sub_block(
            sub, count, np.bool_(False), shape, x, scales, thresholds, order, start, neighbours, tables, total, odd,
            gain, out, point, shifted, flipped, sums, at,
        )  # fmt: skip
        where = -1
        for k in range(count):
            value, scale = _refitted(sums[sub, at + k, 0], sums[sub, at + k, 1])
            if value > best:
                best, wanted[sub], where = value, scale, k
        at += count
        if edge == 0:
            edge = -1 if where == 0 else 1 if where == _SCANS - 1 else 0
        count = 1 if where >= 0 and edge != 0 and at < limit else 0
        if count:
            scales[0] = scales[where] * (ratio if edge > 0 else np.float32(1.0) / ratio)
        elif level:
            level, count, edge, limit = False, _SCANS, 0, limit + _SCANS
            for k in range(_SCANS):
                scales[k] = top / halves[0, k]
    counts[sub] = at


@compiled  # type: ignore[untyped-decorator]
def _encode(
    importance: Any, shape: Any, constants: Any, x: Any, codebook: Any, known: Any, room: Any, lists: Any, kept: Any
) -> Any:
    """Code a block into ``kept``; return its scale as a float32 that float16 holds exactly."""
    thresholds, _, order, start, neighbours = codebook
    tables, total, odd = known
    gain, out, point, shifted, flipped, wanted = room
    sums, counts, number, scales = lists
    unit, guess, ratio = np.float32(constants[0]), np.float32(constants[1]), np.float32(constants[2])
    size, steps = shape[1], shape[2]
    subs = BLOCK // size
    for sub in range(subs):
        energy = mass = top = np.float32(0.0)
        for j in range(sub * size, (sub + 1) * size):
            energy += importance[j] * x[j] * x[j]
            mass += importance[j]
            top = max(top, abs(x[j]))
        if not energy < _TOO_LARGE:
            return np.float32(np.inf)
        level = shape[3] and top * top * mass < np.float32(_FLAT) * energy
        _scan(sub, guess * np.sqrt(energy / mass), top, level, shape, ratio, x, codebook, known, room, lists)
    scale = _block_scale(unit, steps, wanted, sums, counts)
    if not scale > 0:
        return np.float32(0.0)
    all_a = all_b = np.float32(0.0)
    for sub in range(subs):
        number[sub] = _number(scale, wanted[sub], steps, sums, sub, counts[sub])[0]
        factor = np.float32(2 * number[sub] + 1)
        scales[0] = scale * factor
        code_sub_block(
            sub, np.int64(1), shape[7], shape, x, scales, thresholds, order, start, neighbours, tables, total, odd,
            gain, out, point, shifted, flipped, sums, counts[sub],
        )  # fmt: skip
        all_a += factor * factor * sums[sub, counts[sub], 0]
        all_b += factor * sums[sub, counts[sub], 1]
    best, best_scale = np.float32(0.0), np.float32(0.0)
    for candidate in (scale, _half(all_b / all_a / unit) * unit):
        value = np.float32(2.0) * candidate * all_b - candidate * candidate * all_a
        if value > best:
            best, best_scale = value, candidate
    if best > 0:
        for u in range(len(shifted)):
            kept[0][u], kept[1][u], kept[2][u] = point[shifted[u], u], shifted[u], flipped[u]
        kept[3][:] = number
    return _half(best_scale / unit)


@compiled  # type: ignore[untyped-decorator]
def _sign_bits(x: Any, product: Any, halves: Any, width: int, kept: Any, out: Any) -> None:
    """A bit for every weight below zero; in a run that must, the sign that costs least is turned."""
    half = width // 2
    for eight in range(BLOCK // 8):
        bits = 0
        for j in range(8):
            bits |= int(x[eight * 8 + j] < 0) << j
        for run in range(eight * 8 // width, (eight * 8 + 8) // width):
            if kept[2][run]:
                least, where = np.float32(np.inf), run * width
                packed = np.int64(kept[0][run])
                for j in range(width):
                    pattern = packed >> 16 & 255 if j < half else packed >> 24
                    cost = product[run * width + j] * halves[j % half, pattern]
                    if cost < least:
                        least, where = cost, run * width + j
                bits ^= 1 << (where - eight * 8)
        out[eight] = bits


@numba.extending.intrinsic  # type: ignore[untyped-decorator]
def _borrowed(_: Any, array: Any) -> Any:
    """The same array without its reference count, which the search would spend half of its time on.

    Only for arrays that a caller outside compiled code keeps.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lent = context.make_array(array)(context, builder, value=arguments[0])
        lent.meminfo = lent.meminfo.type(None)
        lent.parent = lent.parent.type(None)
        return lent._getvalue()

    return array(array), generate


@compiled  # type: ignore[untyped-decorator]
def _search(
    weight: Any,
    importance: Any,
    codebook: Any,
    constants: Any,
    shape: Any,
    known: Any,
    scratch: Any,
    kept: Any,
    found: Any,
) -> None:
    """Code every block of ``weight`` into ``found``; the arrays of ``known``, ``scratch`` and ``kept`` are room."""
    rows, columns = weight.shape
    width, magnitudes, shifts = shape[0], shape[3], shape[5]
    runs = BLOCK // width
    weight, importance = _borrowed(weight), _borrowed(importance)
    c, k, s, t, f = codebook, known, scratch, kept, found
    halves, points, tables = _borrowed(c[1]), _borrowed(c[2]), _borrowed(k[0])
    total, odd, product = _borrowed(k[1]), _borrowed(k[2]), _borrowed(k[3])
    codes, shifted, signs = _borrowed(f[0]), _borrowed(f[1]), _borrowed(f[2])
    numbers, scales = _borrowed(f[3]), _borrowed(f[4])
    lent_codebook = (_borrowed(c[0]), halves, _borrowed(c[3]), _borrowed(c[4]), _borrowed(c[5]))
    lent_kept = (_borrowed(t[0]), _borrowed(t[1]), _borrowed(t[2]), _borrowed(t[3]))
    room = (_borrowed(s[0]), _borrowed(s[1]), _borrowed(s[2]), _borrowed(s[3]), _borrowed(s[4]), _borrowed(s[5]))
    lists = (_borrowed(s[6]), _borrowed(s[7]), _borrowed(s[8]), _borrowed(s[9]))
    for block in range(columns // BLOCK):
        weights = importance[block * BLOCK : (block + 1) * BLOCK]
        tabulate_columns(weights, halves, shifts, tables)
        for row in range(rows):
            x = weight[row, block * BLOCK : (block + 1) * BLOCK]
            tabulate(weights, halves, shape, x, tables, total, odd, product)
            for run in range(runs):
                lent_kept[0][run], lent_kept[1][run], lent_kept[2][run] = points[0], 0, False
            lent_kept[3][:] = 0
            scales[row, block] = _encode(
                weights, shape, constants, x, lent_codebook, (tables, total, odd), room, lists, lent_kept
            )
            if magnitudes:
                _sign_bits(x, product, halves, width, lent_kept, signs[row, block])
            for run in range(runs):
                codes[row, block, run] = lent_kept[0][run] & np.uint32(0xFFFF)
                shifted[row, block, run] = lent_kept[1][run]
            for sub in range(numbers.shape[2]):
                numbers[row, block, sub] = lent_kept[3][sub]
