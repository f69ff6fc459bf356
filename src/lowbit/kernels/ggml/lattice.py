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

from lowbit.kernels.ggml.lattice_tables import Lattice

__all__ = ["Codes", "Layout", "search"]

BLOCK = 256
_SCANS = 16
_TRIALS = 24
_LEAST_SHARE, _MOST_SHARE = 0.8, 1.1
_DELTA = 0.125
_TOO_LARGE = 1e30
_ROUNDS = 2
_PATIENCE = 1
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

    ``importance`` is ``[columns]``, positive, about 1; None stands for ones. Weights must be finite; a block too large for
    its float16 scale gets an infinite one.
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
        (table.levels, table.left, table.right, table.order, table.start, table.neighbours),
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
def _half_sums(values: Any, levels: Any, width: int, out: Any) -> None:
    """``out[p]`` = sum over the coordinates of a half of ``values[j] * levels[digit j of p]``."""
    out[0] = 0.0
    size = 1
    for j in range(width):
        for level in range(len(levels) - 1, -1, -1):
            term = values[j] * levels[level]
            for i in range(size):
                out[level * size + i] = out[i] + term
        size *= len(levels)


@_jit  # type: ignore[untyped-decorator]
def _half_least(values: Any, levels: Any, width: int, out: Any) -> None:
    """``out[p]`` = the least of ``values[j] * levels[digit j of p]``."""
    out[0] = np.float32(np.inf)
    size = 1
    for j in range(width):
        for level in range(len(levels) - 1, -1, -1):
            term = values[j] * levels[level]
            for i in range(size):
                out[level * size + i] = min(out[i], term)
        size *= len(levels)


@_jit  # type: ignore[untyped-decorator]
def _best_point(
    scale: Any, cell: int, flip: bool, exact: bool, sum_a: Any, sum_b: Any, least: Any, codebook: Any, gain: Any
) -> tuple[Any, int]:
    """The point of a run that takes most off the error at ``scale``, and how much; ``flip``: a sign must change."""
    _, left, right, order, start, neighbours = codebook
    patterns = sum_a.shape[1]
    twice, square = np.float32(2.0) * scale, scale * scale
    for half in range(2):
        for i in range(patterns):
            gain[half, i] = twice * sum_b[half, i] - square * sum_a[half, i]
    best, point = np.float32(-np.inf), np.int64(0)
    near = neighbours[cell]
    if flip:
        for k in range(len(near)):
            a, b = left[near[k]], right[near[k]]
            value = gain[0, a] + gain[1, b] - np.float32(2.0) * twice * min(least[0, a], least[1, b])
            if value > best:
                best, point = value, np.int64(near[k])
    else:
        for k in range(len(near)):
            value = gain[0, left[near[k]]] + gain[1, right[near[k]]]
            if value > best:
                best, point = value, np.int64(near[k])
    if exact:
        top = gain[1, 0]
        for i in range(patterns):
            top = max(top, gain[1, i])
        for a in range(patterns):
            if gain[0, a] + top > best:
                for k in range(start[a], start[a + 1]):
                    b = right[order[k]]
                    value = gain[0, a] + gain[1, b]
                    if flip:
                        value -= np.float32(2.0) * twice * min(least[0, a], least[1, b])
                    if value > best:
                        best, point = value, np.int64(order[k])
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
def _one(
    scale: Any, run: int, t: int, flip: bool, exact: bool, shape: Any, codebook: Any, tables: Any, gain: Any
) -> Any:
    """:func:`_best_point` of a run with the codebook shifted up (``t`` 0) or down, if it can be shifted."""
    x, sum_a, sum_b, least, total, _ = tables
    width, magnitudes, shifts = shape[0], shape[3], shape[5]
    delta = np.float32(0.0)
    if shifts == 2:
        delta = np.float32(_DELTA) if t == 0 else np.float32(-_DELTA)
    cell = _cell(x, run * width, np.float32(1.0) / scale, delta, codebook[0], width, magnitudes)
    value, point = _best_point(scale, cell, flip, exact, sum_a[t, run], sum_b[run], least[run], codebook, gain)
    return value + np.float32(2.0) * scale * delta * total[run], point


@_jit  # type: ignore[untyped-decorator]
def _code(
    scale: Any, first: int, runs: int, exact: bool, shape: Any, codebook: Any, tables: Any, scratch: Any
) -> tuple[Any, Any]:
    """Code ``runs`` runs from ``first`` on at ``scale``, into ``scratch``; return the A and B of all of them.

    ``flipped`` is set for the run in which a sign must change.
    """
    sum_a, sum_b, least, total, odd = tables[1], tables[2], tables[3], tables[4], tables[5]
    gain, chosen, point, shifted, flipped = scratch
    even, shifts, shared = shape[4], shape[5], shape[6]
    step = 8 // shape[0] if even else 1
    best_all = np.float32(-np.inf)
    best_a = best_b = np.float32(0.0)
    for attempt in range(shifts if shared else 1):
        all_a = all_b = np.float32(0.0)
        for run in range(first, first + runs, step):
            must = even and odd[run // step]
            if must and step == 2:
                # one of the two runs of four gives up a sign
                keep0, p0 = _one(scale, run, 0, False, exact, shape, codebook, tables, gain)
                keep1, p1 = _one(scale, run + 1, 0, False, exact, shape, codebook, tables, gain)
                flip0, q0 = _one(scale, run, 0, True, exact, shape, codebook, tables, gain)
                flip1, q1 = _one(scale, run + 1, 0, True, exact, shape, codebook, tables, gain)
                left_flips = flip0 + keep1 > keep0 + flip1
                flipped[run], flipped[run + 1] = left_flips, not left_flips
                chosen[run] = q0 if left_flips else p0
                chosen[run + 1] = p1 if left_flips else q1
            else:
                for u in range(run, run + step):
                    flipped[u] = must
                    best = np.float32(-np.inf)
                    for t in range(attempt, attempt + 1 if shared else shifts):
                        value, p = _one(scale, u, t, must, exact, shape, codebook, tables, gain)
                        if value > best:
                            best, chosen[u] = value, p
                            if not shared:
                                shifted[u] = t
            for u in range(run, run + step):
                t = attempt if shared else shifted[u]
                a, b = codebook[1][chosen[u]], codebook[2][chosen[u]]
                all_a += sum_a[t, u, 0, a] + sum_a[t, u, 1, b]
                all_b += sum_b[u, 0, a] + sum_b[u, 1, b]
                if shifts == 2:
                    all_b += (np.float32(_DELTA) if t == 0 else np.float32(-_DELTA)) * total[u]
                if flipped[u]:
                    all_b -= np.float32(2.0) * min(least[u, 0, a], least[u, 1, b])
        value = np.float32(2.0) * scale * all_b - scale * scale * all_a
        if value > best_all:
            best_all, best_a, best_b = value, all_a, all_b
            for u in range(first, first + runs):
                point[u] = chosen[u]
                if shared:
                    shifted[u] = attempt
    return best_a, best_b


@_jit  # type: ignore[untyped-decorator]
def _half(value: Any) -> Any:
    """The float16 next to ``value``, as float32."""
    fraction, exponent = math.frexp(value)
    ulp = math.ldexp(1.0, max(exponent, -13) - 11)
    return np.float32(np.rint(value / ulp) * ulp)


@_jit  # type: ignore[untyped-decorator]
def _scan(
    middle: Any, ratio: Any, first: int, runs: int, shape: Any, codebook: Any, tables: Any, scratch: Any, sums: Any
) -> tuple[Any, int]:
    """Code a sub-block at scales up and down from ``middle`` as long as that helps; return the best and the number.

    ``sums`` ``[_SCANS + _ROUNDS, 2]`` receives the A and B found.
    """
    count = 0
    best, best_scale = np.float32(-np.inf), np.float32(0.0)
    for way in range(2):
        factor = ratio if way == 0 else np.float32(1.0) / ratio
        scale = middle if way == 0 else middle * factor
        worse = 0
        while worse < _PATIENCE and count < _SCANS:
            a, b = _code(scale, first, runs, False, shape, codebook, tables, scratch)
            sums[count, 0], sums[count, 1] = a, b
            count += 1
            # least squares for these codes
            value = b * b / a if a > 0 and b > 0 else np.float32(0.0)
            if value > best:
                best, best_scale = value, b / a if value > 0 else np.float32(0.0)
            else:
                worse += 1
            scale *= factor
    return best_scale, count


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
    point, shifted, flipped = scratch[2], scratch[3], scratch[4]
    wanted, sums, counts, number = lists
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
            wanted[s], counts[s] = _scan(middle, ratio, s * runs, runs, shape, codebook, tables, scratch, sums[s])
        else:
            wanted[s], counts[s] = np.float32(0.0), 1
            sums[s, 0, 0], sums[s, 0, 1] = _code(
                np.float32(1.0), s * runs, runs, False, shape, codebook, tables, scratch
            )
    scale = _block_scale(unit, steps, wanted, sums, counts)
    best, best_scale = np.float32(0.0), np.float32(0.0)
    for _ in range(_ROUNDS):
        if not scale > 0:
            break
        all_a = all_b = np.float32(0.0)
        for s in range(subs):
            number[s] = _number(scale, wanted[s], steps, sums[s], counts[s])[0]
            factor = np.float32(2 * number[s] + 1)
            a, b = _code(scale * factor, s * runs, runs, True, shape, codebook, tables, scratch)
            sums[s, counts[s], 0], sums[s, counts[s], 1] = a, b
            counts[s] += 1
            all_a += factor * factor * a
            all_b += factor * b
        refitted = _half(all_b / all_a / unit) * unit
        improved = False
        for candidate in (scale, refitted):
            value = np.float32(2.0) * candidate * all_b - candidate * candidate * all_a
            if value > best:
                best, best_scale, improved = value, candidate, True
        if improved:
            kept[0][:], kept[1][:], kept[2][:], kept[3][:] = point, shifted, flipped, number
        if refitted == scale:
            break
        scale = refitted
    return best_scale / unit


@_jit  # type: ignore[untyped-decorator]
def _tabulate_columns(importance: Any, levels: Any, width: int, shifts: int, sum_a: Any) -> None:
    """The sums over halves that depend on the importance of a block's columns only."""
    half = width // 2
    for t in range(shifts):
        squares = levels * levels
        if shifts == 2:
            squares = (levels + np.float32(_DELTA if t == 0 else -_DELTA)) ** 2
        for run in range(BLOCK // width):
            for side in range(2):
                begin = run * width + side * half
                _half_sums(importance[begin : begin + half], squares, half, sum_a[t, run, side])


@_jit  # type: ignore[untyped-decorator]
def _tabulate(importance: Any, levels: Any, shape: Any, tables: Any, product: Any) -> None:
    """The sums over halves that depend on a block's weights, and which runs have an odd number of minus signs."""
    x, _, sum_b, least, total, odd = tables
    width, magnitudes, even = shape[0], shape[3], shape[4]
    half = width // 2
    for j in range(BLOCK):
        product[j] = importance[j] * (abs(x[j]) if magnitudes else x[j])
    for run in range(BLOCK // width):
        total[run] = product[run * width : (run + 1) * width].sum()
        for side in range(2):
            begin = run * width + side * half
            _half_sums(product[begin : begin + half], levels, half, sum_b[run, side])
            if even:
                _half_least(product[begin : begin + half], levels, half, least[run, side])
    for eight in range(BLOCK // 8):
        minus = 0
        for j in range(eight * 8, eight * 8 + 8):
            minus += np.int64(x[j] < 0)
        odd[eight] = minus % 2 == 1


@_jit  # type: ignore[untyped-decorator]
def _sign_bits(
    x: Any, product: Any, grid_left: Any, grid_right: Any, levels: Any, width: int, kept: Any, out: Any
) -> None:
    """A bit for every weight below zero; in a run that must, the sign that costs least is turned."""
    half = width // 2
    for eight in range(BLOCK // 8):
        bits = 0
        for j in range(8):
            bits |= np.int64(x[eight * 8 + j] < 0) << j
        for run in range(eight * 8 // width, (eight * 8 + 8) // width):
            if kept[2][run]:
                least, where = np.float32(np.inf), 0
                patterns = (np.int64(grid_left[kept[0][run]]), np.int64(grid_right[kept[0][run]]))
                for side in range(2):
                    pattern = patterns[side]
                    for j in range(run * width + side * half, run * width + side * half + half):
                        cost = product[j] * levels[pattern % len(levels)]
                        pattern //= len(levels)
                        if cost < least:
                            least, where = cost, j
                bits ^= 1 << (where - eight * 8)
        out[eight] = bits


@_jit  # type: ignore[untyped-decorator]
def _search(weight: Any, importance: Any, codebook: Any, constants: Any, shape: Any, out: Any) -> None:
    rows, columns = weight.shape
    width, sub, magnitudes, shifts = shape[0], shape[1], shape[3], shape[5]
    levels = codebook[0]
    runs, subs = BLOCK // width, BLOCK // sub
    patterns = len(levels) ** (width // 2)
    sum_a = np.zeros((shifts, runs, 2, patterns), np.float32)
    sum_b, least = np.zeros((runs, 2, patterns), np.float32), np.zeros((runs, 2, patterns), np.float32)
    total, odd, product = np.zeros(runs, np.float32), np.zeros(BLOCK // 8, np.bool_), np.zeros(BLOCK, np.float32)
    scratch = (
        np.zeros((2, patterns), np.float32),
        np.zeros(runs, np.int64),
        np.zeros(runs, np.int64),
        np.zeros(runs, np.int64),
        np.zeros(runs, np.bool_),
    )
    lists = (
        np.zeros(subs, np.float32),
        np.zeros((subs, _SCANS + _ROUNDS, 2), np.float32),
        np.zeros(subs, np.int64),
        np.zeros(subs, np.int64),
    )
    kept = (np.zeros(runs, np.int64), np.zeros(runs, np.int64), np.zeros(runs, np.bool_), np.zeros(subs, np.int64))
    for block in range(columns // BLOCK):
        weights = importance[block * BLOCK : (block + 1) * BLOCK]
        _tabulate_columns(weights, levels, width, shifts, sum_a)
        for row in range(rows):
            x = weight[row, block * BLOCK : (block + 1) * BLOCK]
            tables = (x, sum_a, sum_b, least, total, odd)
            _tabulate(weights, levels, shape, tables, product)
            kept[0][:], kept[1][:], kept[2][:], kept[3][:] = 0, 0, False, 0
            out[4][row, block] = _encode(weights, shape, constants, codebook, tables, scratch, lists, kept)
            out[0][row, block], out[1][row, block], out[3][row, block] = kept[0], kept[1], kept[3]
            if magnitudes:
                _sign_bits(x, product, codebook[1], codebook[2], levels, width, kept, out[2][row, block])
