"""Search for the codes, sub-block scales and block scales of ggml's codebook types (IQ1, IQ2, IQ3).

A block of 256 weights has a float16 scale ``d``; each sub-block of 16 or 32 a small whole number ``n``, which makes its
scale ``s = d * unit * (2 n + 1)``; each run of 4 or 8 weights a point ``g`` of a codebook, and signs. What a choice
takes off the weighted squared error of zero is ``2 s B - s^2 A`` with ``B = sum(w x g)``, ``A = sum(w g^2)``, so codes
are compared by two sums, and what was found at one scale can be priced at every other.

Both sums are over the two halves of a run, and a half has only 64 or 81 patterns: their sums are tabulated once per
run (``A`` once for all rows, importance being per column), and a point costs two look-ups. At a scale, the nearest
points of the run's cell are tried; in the exact form also all others that the bound on their left half does not rule
out. Each sub-block is coded at scales around its best; block scales are then compared by the sums found, the best
one's codes are made exactly, and the block scale is refitted by least squares.

Where 8 signs are stored in 7 bits their product must be plus: a run that has it otherwise flips the sign that costs
least, which is part of the search for its point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numba
import numba.extending
import numpy as np
import numpy.typing as npt

from lowbit.kernels.ggml.lattice_tables import NEIGHBOURS, Lattice

__all__ = ["Codes", "Layout", "search"]

BLOCK = 256
_SCANS = 5
_WIDER = 6
_TRIALS = 16
_LEAST_SHARE, _MOST_SHARE = 0.8, 1.1
_DELTA = 0.125
_B, _LEAST, _A = 0, 1, 2
_LEFT, _RIGHT, _BYTE = np.uint32(16), np.uint32(24), np.uint32(255)
_TOO_LARGE = 1e30
_jit = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract", "nsz", "reassoc"})


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
    """

    sub: int
    steps: int
    unit: float
    signs: str
    guess: float
    ratio: float
    shifts: int = 1
    shared: bool = False


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
        np.zeros((_A + layout.shifts, runs, 2 * patterns), np.float32),
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
        np.zeros((subs, _SCANS + _WIDER + 1, 2), np.float32),
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
        (table.width, layout.sub, layout.steps, signed, even, layout.shifts, layout.shared),
        known,
        scratch,
        kept,
        (points, shift, signs, number, scale),
    )
    return Codes(points, shift, signs, number, scale.astype(np.float16))


@_jit  # type: ignore[untyped-decorator]
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
        gain[i] = twice * tables[_B, run, i] - square * tables[_A + t, run, i]
    best, point = np.float32(-np.inf), np.uint32(0)
    first = cell * NEIGHBOURS
    if flip:
        for k in range(first, first + NEIGHBOURS):
            a, b = neighbours[k] >> _LEFT & _BYTE, (neighbours[k] >> _RIGHT) + right
            value = gain[a] + gain[b] - turned * min(tables[_LEAST, run, a], tables[_LEAST, run, b])
            if value > best:
                best, point = value, neighbours[k]
    else:
        for k in range(first, first + NEIGHBOURS):
            value = gain[neighbours[k] >> _LEFT & _BYTE] + gain[(neighbours[k] >> _RIGHT) + right]
            if value > best:
                best, point = value, neighbours[k]
    if exact:
        top = gain[patterns]
        for i in range(patterns, 2 * patterns):
            top = max(top, gain[i])
        for i in range(patterns):
            if gain[i] + top > best:
                for k in range(start[i], start[i + 1]):
                    b = (order[k] >> _RIGHT) + right
                    value = gain[i] + gain[b]
                    if flip:
                        value -= turned * min(tables[_LEAST, run, i], tables[_LEAST, run, b])
                    if value > best:
                        best, point = value, order[k]
    return best, point


@_jit  # type: ignore[untyped-decorator]
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
            digit += np.int64(value > threshold)
        cell += place * digit
        place *= len(thresholds) + 1
    return cell


@_jit  # type: ignore[untyped-decorator]
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
        delta = np.float32(_DELTA) if t == 0 else np.float32(-_DELTA)
    shift = delta * total[run]
    point = np.uint32(0)
    for k in range(count):
        cell = _cell(x, run * width, np.float32(1.0) / scales[k], delta, thresholds, width, magnitudes)
        value, point = _best_point(scales[k], run, t, cell, flip, exact, order, start, neighbours, tables, gain)
        left, right = point >> _LEFT & _BYTE, (point >> _RIGHT) + patterns
        b = tables[_B, run, left] + tables[_B, run, right] + shift
        if flip:
            b -= np.float32(2.0) * min(tables[_LEAST, run, left], tables[_LEAST, run, right])
        out[slot, k, 0] = value + np.float32(2.0) * scales[k] * shift
        out[slot, k, 1] = tables[_A + t, run, left] + tables[_A + t, run, right]
        out[slot, k, 2] = b
    return point


@_jit  # type: ignore[untyped-decorator]
def _code(
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
                    run + slot % 2,
                    0,
                    slot >= 2,
                    exact,
                    count,
                    slot,
                    shape,
                    x,
                    scales,
                    thresholds,
                    order,
                    start,
                    neighbours,
                    tables,
                    total,
                    gain,
                    out,
                )
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
                        u,
                        t,
                        must,
                        exact,
                        count,
                        t,
                        shape,
                        x,
                        scales,
                        thresholds,
                        order,
                        start,
                        neighbours,
                        tables,
                        total,
                        gain,
                        out,
                    )
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


@_jit  # type: ignore[untyped-decorator]
def _half(value: Any) -> Any:
    """The float16 next to ``value``, as float32."""
    _, exponent = math.frexp(value)
    ulp = math.ldexp(1.0, max(exponent, -13) - 11)
    return np.float32(np.rint(value / ulp) * ulp)


@_jit  # type: ignore[untyped-decorator]
def _refitted(a: Any, b: Any) -> tuple[Any, Any]:
    """What codes with these A and B take off under their best scale, and that scale."""
    if a > 0 and b > 0:
        return b * b / a, b / a
    return np.float32(0.0), np.float32(0.0)


@_jit  # type: ignore[untyped-decorator]
def _priced(scale: Any, sums: Any, sub: int, count: int) -> Any:
    """What the best of the ``count`` codings found takes off the error at ``scale``."""
    best = np.float32(-np.inf)
    twice, square = np.float32(2.0) * scale, scale * scale
    for k in range(count):
        best = max(best, twice * sums[sub, k, 1] - square * sums[sub, k, 0])
    return best


@_jit  # type: ignore[untyped-decorator]
def _number(scale: Any, wanted: Any, steps: int, sums: Any, sub: int, count: int) -> tuple[int, Any]:
    """The scale number that serves a sub-block best where number 0 is ``scale``, and what it takes off."""
    low = int(min(max((wanted / scale - np.float32(1.0)) * np.float32(0.5), np.float32(0.0)), np.float32(steps - 1)))
    value = _priced(scale * np.float32(2 * low + 1), sums, sub, count)
    if low + 1 < steps:
        above = _priced(scale * np.float32(2 * low + 3), sums, sub, count)
        if above > value:
            return low + 1, above
    return low, value


@_jit  # type: ignore[untyped-decorator]
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


@_jit  # type: ignore[untyped-decorator]
def _encode(
    importance: Any, shape: Any, constants: Any, x: Any, codebook: Any, known: Any, room: Any, lists: Any, kept: Any
) -> Any:
    """Code a block into ``kept``; return its scale as a float32 that float16 holds exactly."""
    thresholds, order, start, neighbours = codebook
    tables, total, odd = known
    gain, out, point, shifted, flipped, wanted = room
    sums, counts, number, scales = lists
    unit, guess, ratio = np.float32(constants[0]), np.float32(constants[1]), np.float32(constants[2])
    size, steps = shape[1], shape[2]
    subs = BLOCK // size
    for sub in range(subs):
        energy = mass = np.float32(0.0)
        for j in range(sub * size, (sub + 1) * size):
            energy += importance[j] * x[j] * x[j]
            mass += importance[j]
        if not energy < _TOO_LARGE:
            return np.float32(np.inf)
        middle = guess * np.sqrt(energy / mass)
        wanted[sub] = 0.0
        count = _SCANS if middle > 0 else 1
        scales[0] = 1.0
        if middle > 0:
            for k in range(_SCANS):
                scales[k] = middle * ratio ** np.float32(k - _SCANS // 2)
        at, edge, best = 0, 0, np.float32(0.0)
        while count > 0:
            # scales around the middle together; beyond, where the best is at the edge, one at a time
            _code(
                sub,
                count,
                False,
                shape,
                x,
                scales,
                thresholds,
                order,
                start,
                neighbours,
                tables,
                total,
                odd,
                gain,
                out,
                point,
                shifted,
                flipped,
                sums,
                at,
            )
            where = -1
            for k in range(count):
                value, scale = _refitted(sums[sub, at + k, 0], sums[sub, at + k, 1])
                if value > best:
                    best, wanted[sub], where = value, scale, k
            at += count
            if edge == 0:
                edge = -1 if where == 0 else 1 if where == _SCANS - 1 else 0
            count = 1 if where >= 0 and edge != 0 and at < _SCANS + _WIDER else 0
            if count:
                scales[0] = scales[where] * (ratio if edge > 0 else np.float32(1.0) / ratio)
        counts[sub] = at
    scale = _block_scale(unit, steps, wanted, sums, counts)
    if not scale > 0:
        return np.float32(0.0)
    all_a = all_b = np.float32(0.0)
    for sub in range(subs):
        number[sub] = _number(scale, wanted[sub], steps, sums, sub, counts[sub])[0]
        factor = np.float32(2 * number[sub] + 1)
        scales[0] = scale * factor
        _code(
            sub,
            1,
            True,
            shape,
            x,
            scales,
            thresholds,
            order,
            start,
            neighbours,
            tables,
            total,
            odd,
            gain,
            out,
            point,
            shifted,
            flipped,
            sums,
            counts[sub],
        )
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
    return best_scale / unit


@_jit  # type: ignore[untyped-decorator]
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


@_jit  # type: ignore[untyped-decorator]
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


@_jit  # type: ignore[untyped-decorator]
def _tabulate_columns(importance: Any, halves: Any, shifts: int, tables: Any) -> None:
    """The sums over halves that depend on the importance of a block's columns only."""
    half, patterns = halves.shape
    for t in range(shifts):
        squares = halves * halves
        if shifts == 2:
            squares = (halves + np.float32(_DELTA if t == 0 else -_DELTA)) ** 2
        for run in range(tables.shape[1]):
            for side in range(2):
                _half_sums(importance, (2 * run + side) * half, squares, tables, _A + t, run, side * patterns)


@_jit  # type: ignore[untyped-decorator]
def _tabulate(
    importance: Any, halves: Any, shape: Any, x: Any, tables: Any, total: Any, odd: Any, product: Any
) -> None:
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
            _half_sums(product, (2 * run + side) * half, halves, tables, _B, run, side * patterns)
            if even:
                _half_least(product, (2 * run + side) * half, halves, tables, _LEAST, run, side * patterns)
    for eight in range(BLOCK // 8):
        minus = 0
        for j in range(eight * 8, eight * 8 + 8):
            minus += np.int64(x[j] < 0)
        odd[eight] = minus % 2 == 1


@_jit  # type: ignore[untyped-decorator]
def _sign_bits(x: Any, product: Any, halves: Any, width: int, kept: Any, out: Any) -> None:
    """A bit for every weight below zero; in a run that must, the sign that costs least is turned."""
    half = width // 2
    for eight in range(BLOCK // 8):
        bits = 0
        for j in range(8):
            bits |= np.int64(x[eight * 8 + j] < 0) << j
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


@_jit  # type: ignore[untyped-decorator]
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
    lent_codebook = (_borrowed(c[0]), _borrowed(c[3]), _borrowed(c[4]), _borrowed(c[5]))
    lent_kept = (_borrowed(t[0]), _borrowed(t[1]), _borrowed(t[2]), _borrowed(t[3]))
    room = (_borrowed(s[0]), _borrowed(s[1]), _borrowed(s[2]), _borrowed(s[3]), _borrowed(s[4]), _borrowed(s[5]))
    lists = (_borrowed(s[6]), _borrowed(s[7]), _borrowed(s[8]), _borrowed(s[9]))
    for block in range(columns // BLOCK):
        weights = importance[block * BLOCK : (block + 1) * BLOCK]
        _tabulate_columns(weights, halves, shifts, tables)
        for row in range(rows):
            x = weight[row, block * BLOCK : (block + 1) * BLOCK]
            _tabulate(weights, halves, shape, x, tables, total, odd, product)
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
