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
_LEFT, _RIGHT, _BYTE = np.uint32(16), np.uint32(24), np.uint32(255)
_TOO_LARGE = 1e30
_ROUNDS = 1
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
    _search(
        weight,
        np.ones(columns, np.float32) if importance is None else importance,
        (table.levels, table.halves, table.points, table.order, table.start, table.neighbours),
        (layout.unit, layout.guess, layout.ratio),
        (
            table.width,
            layout.sub,
            layout.steps,
            layout.signs != "point",
            layout.signs == "even",
            layout.shifts,
            layout.shared,
        ),
        (points, shift, signs, number, scale),
    )
    return Codes(points, shift, signs, number, scale.astype(np.float16))


@_jit  # type: ignore[untyped-decorator]
def _best_point(
    scale: Any, cell: int, flip: bool, exact: bool, sum_a: Any, sum_b: Any, least: Any, codebook: Any, gain: Any
) -> tuple[Any, Any]:
    """The point of a run that takes most off the error at ``scale``, and how much; ``flip``: a sign must change.

    ``sum_a``, ``sum_b`` and ``least`` are the run's, the patterns of its left half before those of its right.
    """
    order, start, neighbours = codebook[3], codebook[4], codebook[5]
    patterns = len(start) - 1
    twice, square = np.float32(2.0) * scale, scale * scale
    for i in range(2 * patterns):
        gain[i] = twice * sum_b[i] - square * sum_a[i]
    best, point = np.float32(-np.inf), np.uint32(0)
    first = cell * NEIGHBOURS
    if flip:
        for k in range(first, first + NEIGHBOURS):
            a, b = neighbours[k] >> _LEFT & _BYTE, (neighbours[k] >> _RIGHT) + np.uint32(patterns)
            value = gain[a] + gain[b] - np.float32(2.0) * twice * min(least[a], least[b])
            if value > best:
                best, point = value, neighbours[k]
    else:
        for k in range(first, first + NEIGHBOURS):
            a, b = neighbours[k] >> _LEFT & _BYTE, (neighbours[k] >> _RIGHT) + np.uint32(patterns)
            value = gain[a] + gain[b]
            if value > best:
                best, point = value, neighbours[k]
    if exact:
        top = gain[patterns]
        for i in range(patterns, 2 * patterns):
            top = max(top, gain[i])
        for i in range(patterns):
            if gain[i] + top > best:
                for k in range(start[i], start[i + 1]):
                    b = (order[k] >> _RIGHT) + np.uint32(patterns)
                    value = gain[i] + gain[b]
                    if flip:
                        value -= np.float32(2.0) * twice * min(least[i], least[b])
                    if value > best:
                        best, point = value, order[k]
    return best, point


@_jit  # type: ignore[untyped-decorator]
def _cell(x: Any, first: int, inverse: Any, delta: Any, levels: Any, width: int, magnitudes: bool) -> int:
    """The combination of halves nearest to ``width`` weights from ``first`` on, times ``inverse``, less ``delta``."""
    cell, place = 0, 1
    for j in range(first, first + width):
        value = x[j] * inverse - delta
        if magnitudes:
            value = abs(value)
        digit = 0
        for level in range(len(levels) - 1):
            digit += np.int64(value + value > levels[level] + levels[level + 1])
        cell += place * digit
        place *= len(levels)
    return cell


@_jit  # type: ignore[untyped-decorator]
def _code_run(
    run: int, t: int, flip: bool, exact: bool, scales: Any, shape: Any, codebook: Any, tables: Any, gain: Any, out: Any
) -> Any:
    """:func:`_best_point` of a run at every one of ``scales``, with the codebook shifted up (``t`` 0) or down.

    ``out`` ``[scales, 3]`` receives what is taken off, A and B; returned is the point for the last scale.
    """
    x, sum_a, sum_b, least, total, _ = tables
    width, magnitudes, shifts = shape[0], shape[3], shape[5]
    patterns = np.uint32(len(codebook[4]) - 1)
    delta = np.float32(0.0)
    if shifts == 2:
        delta = np.float32(_DELTA) if t == 0 else np.float32(-_DELTA)
    run_a, run_b, run_least = sum_a[t, run], sum_b[run], least[run]
    point = np.uint32(0)
    for k in range(len(scales)):
        cell = _cell(x, run * width, np.float32(1.0) / scales[k], delta, codebook[0], width, magnitudes)
        value, point = _best_point(scales[k], cell, flip, exact, run_a, run_b, run_least, codebook, gain)
        left, right = point >> _LEFT & _BYTE, (point >> _RIGHT) + patterns
        b = run_b[left] + run_b[right] + delta * total[run]
        if flip:
            b -= np.float32(2.0) * min(run_least[left], run_least[right])
        out[k, 0] = value + np.float32(2.0) * scales[k] * delta * total[run]
        out[k, 1] = run_a[left] + run_a[right]
        out[k, 2] = b
    return point


@_jit  # type: ignore[untyped-decorator]
def _code(
    scales: Any, first: int, runs: int, exact: bool, shape: Any, codebook: Any, tables: Any, scratch: Any, sums: Any
) -> None:
    """Code ``runs`` runs from ``first`` on at every one of ``scales``; their A and B go to ``sums`` ``[scales, 2]``.

    The codes for the last scale are left in ``scratch``; ``flipped`` is set for the run in which a sign must change.
    """
    odd = tables[5]
    gain, out, both, point, shifted, flipped = scratch
    even, shifts, shared = shape[4], shape[5], shape[6]
    step = 8 // shape[0] if even else 1
    last = len(scales) - 1
    both[:, : last + 1] = 0.0
    for run in range(first, first + runs, step):
        must = even and odd[run // step]
        if must and step == 2:
            # one of the two runs of four gives up a sign
            p0 = _code_run(run, 0, False, exact, scales, shape, codebook, tables, gain, out[0])
            p1 = _code_run(run + 1, 0, False, exact, scales, shape, codebook, tables, gain, out[1])
            q0 = _code_run(run, 0, True, exact, scales, shape, codebook, tables, gain, out[2])
            q1 = _code_run(run + 1, 0, True, exact, scales, shape, codebook, tables, gain, out[3])
            for k in range(last + 1):
                flip = 0 if out[2, k, 0] + out[1, k, 0] > out[0, k, 0] + out[3, k, 0] else 1
                both[0, k, 0] += out[2 + flip, k, 1] + out[1 - flip, k, 1]
                both[0, k, 1] += out[2 + flip, k, 2] + out[1 - flip, k, 2]
                flipped[run], flipped[run + 1] = flip == 0, flip == 1
            point[0, run] = q0 if flipped[run] else p0
            point[0, run + 1] = p1 if flipped[run] else q1
        else:
            for u in range(run, run + step):
                flipped[u] = must
                for t in range(shifts):
                    point[t, u] = _code_run(u, t, must, exact, scales, shape, codebook, tables, gain, out[t])
                for k in range(last + 1):
                    if shared:
                        for t in range(shifts):
                            both[t, k, 0] += out[t, k, 1]
                            both[t, k, 1] += out[t, k, 2]
                    else:
                        t = 1 if shifts == 2 and out[1, k, 0] > out[0, k, 0] else 0
                        both[0, k, 0] += out[t, k, 1]
                        both[0, k, 1] += out[t, k, 2]
                        shifted[u] = t
    for k in range(last + 1):
        t = 0
        if shared:
            down = np.float32(2.0) * scales[k] * both[1, k, 1] - scales[k] * scales[k] * both[1, k, 0]
            t = 1 if down > np.float32(2.0) * scales[k] * both[0, k, 1] - scales[k] * scales[k] * both[0, k, 0] else 0
            for u in range(first, first + runs):
                shifted[u] = t
        sums[k, 0], sums[k, 1] = both[t, k, 0], both[t, k, 1]


@_jit  # type: ignore[untyped-decorator]
def _half(value: Any) -> Any:
    """The float16 next to ``value``, as float32."""
    _, exponent = math.frexp(value)
    ulp = math.ldexp(1.0, max(exponent, -13) - 11)
    return np.float32(np.rint(value / ulp) * ulp)


@_jit  # type: ignore[untyped-decorator]
def _scan(
    middle: Any,
    ratio: Any,
    first: int,
    runs: int,
    shape: Any,
    codebook: Any,
    tables: Any,
    scratch: Any,
    scales: Any,
    sums: Any,
) -> tuple[Any, int]:
    """Code a sub-block at scales around ``middle``, and beyond as long as that helps; the best and how many.

    ``sums`` ``[_SCANS + _WIDER + _ROUNDS, 2]`` receives the A and B found.
    """
    half = _SCANS // 2
    for k in range(_SCANS):
        scales[k] = middle * ratio ** np.float32(k - half)
    _code(scales[:_SCANS], first, runs, False, shape, codebook, tables, scratch, sums)
    count = _SCANS
    best, best_scale, at = np.float32(0.0), np.float32(0.0), half
    for k in range(_SCANS):
        value, scale = _refitted(sums[k])
        if value > best:
            best, best_scale, at = value, scale, k
    if at == 0 or at == _SCANS - 1:
        factor = ratio if at > 0 else np.float32(1.0) / ratio
        scales[0] = scales[at]
        while count < _SCANS + _WIDER:
            scales[0] *= factor
            _code(scales[:1], first, runs, False, shape, codebook, tables, scratch, sums[count : count + 1])
            value, scale = _refitted(sums[count])
            count += 1
            if not value > best:
                break
            best, best_scale = value, scale
    return best_scale, count


@_jit  # type: ignore[untyped-decorator]
def _refitted(sums: Any) -> tuple[Any, Any]:
    """What codes with these A and B take off under their best scale, and that scale."""
    a, b = sums[0], sums[1]
    if a > 0 and b > 0:
        return b * b / a, b / a
    return np.float32(0.0), np.float32(0.0)


@_jit  # type: ignore[untyped-decorator]
def _priced(scale: Any, sums: Any, count: int) -> Any:
    """What the best of the ``count`` codings found takes off the error at ``scale``."""
    best = np.float32(-np.inf)
    for k in range(count):
        best = max(best, np.float32(2.0) * scale * sums[k, 1] - scale * scale * sums[k, 0])
    return best


@_jit  # type: ignore[untyped-decorator]
def _number(scale: Any, wanted: Any, steps: int, sums: Any, count: int) -> tuple[int, Any]:
    """The scale number that serves a sub-block best where number 0 is ``scale``, and what it takes off."""
    low = int(min(max((wanted / scale - np.float32(1.0)) * np.float32(0.5), np.float32(0.0)), np.float32(steps - 1)))
    value = _priced(scale * np.float32(2 * low + 1), sums, count)
    if low + 1 < steps:
        above = _priced(scale * np.float32(2 * low + 3), sums, count)
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
            for s in range(len(wanted)):
                value += _number(scale, wanted[s], steps, sums[s], counts[s])[1]
            if value > best:
                best, best_scale = value, scale
    return best_scale


@_jit  # type: ignore[untyped-decorator]
def _encode(
    importance: Any, shape: Any, constants: Any, codebook: Any, tables: Any, scratch: Any, lists: Any, kept: Any
) -> Any:
    """Code a block into ``kept``; return its scale as a float32 that float16 holds exactly."""
    x = tables[0]
    point, shifted, flipped = scratch[3], scratch[4], scratch[5]
    wanted, sums, counts, number, scales = lists
    unit, guess, ratio = np.float32(constants[0]), np.float32(constants[1]), np.float32(constants[2])
    sub, steps = shape[1], shape[2]
    subs, runs = BLOCK // sub, sub // shape[0]
    for s in range(subs):
        energy = mass = np.float32(0.0)
        for j in range(s * sub, (s + 1) * sub):
            energy += importance[j] * x[j] * x[j]
            mass += importance[j]
        if not energy < _TOO_LARGE:
            return np.float32(np.inf)
        middle = guess * np.sqrt(energy / mass)
        if middle > 0:
            wanted[s], counts[s] = _scan(
                middle, ratio, s * runs, runs, shape, codebook, tables, scratch, scales, sums[s]
            )
        else:
            wanted[s], counts[s] = np.float32(0.0), 1
            scales[0] = 1.0
            _code(scales[:1], s * runs, runs, False, shape, codebook, tables, scratch, sums[s])
    scale = _block_scale(unit, steps, wanted, sums, counts)
    best, best_scale = np.float32(0.0), np.float32(0.0)
    for _ in range(_ROUNDS):
        if not scale > 0:
            break
        all_a = all_b = np.float32(0.0)
        for s in range(subs):
            number[s] = _number(scale, wanted[s], steps, sums[s], counts[s])[0]
            factor = np.float32(2 * number[s] + 1)
            scales[0] = scale * factor
            last = counts[s]
            _code(scales[:1], s * runs, runs, True, shape, codebook, tables, scratch, sums[s, last:])
            counts[s] += 1
            all_a += factor * factor * sums[s, last, 0]
            all_b += factor * sums[s, last, 1]
        refitted = _half(all_b / all_a / unit) * unit
        improved = False
        for candidate in (scale, refitted):
            value = np.float32(2.0) * candidate * all_b - candidate * candidate * all_a
            if value > best:
                best, best_scale, improved = value, candidate, True
        if improved:
            kept[1][:], kept[2][:], kept[3][:] = shifted, flipped, number
            for u in range(len(shifted)):
                kept[0][u] = point[shifted[u], u]
        if refitted == scale:
            break
        scale = refitted
    return best_scale / unit


@_jit  # type: ignore[untyped-decorator]
def _half_sums(values: Any, first: int, halves: Any, out: Any, begin: int) -> None:
    """``out[begin + p]`` = sum over the coordinates of half pattern ``p``, each times its weight's value."""
    if len(halves) == 4:
        v0, v1, v2, v3 = values[first], values[first + 1], values[first + 2], values[first + 3]
        for p in range(halves.shape[1]):
            out[begin + p] = v0 * halves[0, p] + v1 * halves[1, p] + (v2 * halves[2, p] + v3 * halves[3, p])
    else:
        v0, v1 = values[first], values[first + 1]
        for p in range(halves.shape[1]):
            out[begin + p] = v0 * halves[0, p] + v1 * halves[1, p]


@_jit  # type: ignore[untyped-decorator]
def _half_least(values: Any, first: int, halves: Any, out: Any, begin: int) -> None:
    """``out[begin + p]`` = the least of the coordinates of half pattern ``p``, each times its weight's value."""
    if len(halves) == 4:
        v0, v1, v2, v3 = values[first], values[first + 1], values[first + 2], values[first + 3]
        for p in range(halves.shape[1]):
            out[begin + p] = min(min(v0 * halves[0, p], v1 * halves[1, p]), min(v2 * halves[2, p], v3 * halves[3, p]))
    else:
        v0, v1 = values[first], values[first + 1]
        for p in range(halves.shape[1]):
            out[begin + p] = min(v0 * halves[0, p], v1 * halves[1, p])


@_jit  # type: ignore[untyped-decorator]
def _tabulate_columns(importance: Any, halves: Any, shifts: int, sum_a: Any) -> None:
    """The sums over halves that depend on the importance of a block's columns only."""
    half, patterns = halves.shape
    for t in range(shifts):
        squares = halves * halves
        if shifts == 2:
            squares = (halves + np.float32(_DELTA if t == 0 else -_DELTA)) ** 2
        for run in range(sum_a.shape[1]):
            for side in range(2):
                _half_sums(importance, (2 * run + side) * half, squares, sum_a[t, run], side * patterns)


@_jit  # type: ignore[untyped-decorator]
def _tabulate(importance: Any, halves: Any, shape: Any, tables: Any, product: Any) -> None:
    """The sums over halves that depend on a block's weights, and which runs have an odd number of minus signs."""
    x, _, sum_b, least, total, odd = tables
    width, magnitudes, even = shape[0], shape[3], shape[4]
    half, patterns = halves.shape
    for j in range(BLOCK):
        product[j] = importance[j] * (abs(x[j]) if magnitudes else x[j])
    for run in range(BLOCK // width):
        whole = np.float32(0.0)
        for j in range(run * width, run * width + width):
            whole += product[j]
        total[run] = whole
        run_b, run_least = sum_b[run], least[run]
        for side in range(2):
            _half_sums(product, (2 * run + side) * half, halves, run_b, side * patterns)
            if even:
                _half_least(product, (2 * run + side) * half, halves, run_least, side * patterns)
    for eight in range(BLOCK // 8):
        minus = 0
        for j in range(eight * 8, eight * 8 + 8):
            minus += np.int64(x[j] < 0)
        odd[eight] = minus % 2 == 1


@_jit  # type: ignore[untyped-decorator]
def _sign_bits(x: Any, product: Any, codebook: Any, width: int, kept: Any, out: Any) -> None:
    """A bit for every weight below zero; in a run that must, the sign that costs least is turned."""
    halves = codebook[1]
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


@_jit  # type: ignore[untyped-decorator]
def _search(weight: Any, importance: Any, codebook: Any, constants: Any, shape: Any, out: Any) -> None:
    rows, columns = weight.shape
    width, sub, magnitudes, shifts = shape[0], shape[1], shape[3], shape[5]
    halves = codebook[1]
    runs, subs, patterns = BLOCK // width, BLOCK // sub, halves.shape[1]
    sum_a = np.zeros((shifts, runs, 2 * patterns), np.float32)
    sum_b, least = np.zeros((runs, 2 * patterns), np.float32), np.zeros((runs, 2 * patterns), np.float32)
    total, odd, product = np.zeros(runs, np.float32), np.zeros(BLOCK // 8, np.bool_), np.zeros(BLOCK, np.float32)
    scratch = (
        np.zeros(2 * patterns, np.float32),
        np.zeros((4, _SCANS, 3), np.float32),
        np.zeros((2, _SCANS, 2), np.float32),
        np.zeros((2, runs), np.uint32),
        np.zeros(runs, np.int64),
        np.zeros(runs, np.bool_),
    )
    lists = (
        np.zeros(subs, np.float32),
        np.zeros((subs, _SCANS + _WIDER + _ROUNDS, 2), np.float32),
        np.zeros(subs, np.int64),
        np.zeros(subs, np.int64),
        np.zeros(_SCANS, np.float32),
    )
    kept = (np.zeros(runs, np.uint32), np.zeros(runs, np.int64), np.zeros(runs, np.bool_), np.zeros(subs, np.int64))
    for block in range(columns // BLOCK):
        weights = importance[block * BLOCK : (block + 1) * BLOCK]
        _tabulate_columns(weights, halves, shifts, sum_a)
        for row in range(rows):
            x = weight[row, block * BLOCK : (block + 1) * BLOCK]
            tables = (x, sum_a, sum_b, least, total, odd)
            _tabulate(weights, halves, shape, tables, product)
            kept[0][:], kept[1][:], kept[2][:], kept[3][:] = codebook[2][0], 0, False, 0
            out[4][row, block] = _encode(weights, shape, constants, codebook, tables, scratch, lists, kept)
            if magnitudes:
                _sign_bits(x, product, codebook, width, kept, out[2][row, block])
            for run in range(runs):
                out[0][row, block, run] = kept[0][run] & np.uint32(0xFFFF)
            out[1][row, block], out[3][row, block] = kept[1], kept[3]
