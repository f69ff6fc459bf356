"""Q4_0 to Q8_0 and F16 with hardly a search, at the speed of memory.

The step puts the weight of greatest magnitude at the far end of the grid (of Q4_1 and Q5_1, the range of the weights
over all of it) and is then moved to the least squared error for the codes that it leads to; the codes stored are those
nearest to the weights for the step as float16 holds it. Q8_0 with importance tries a few places for that weight.

Weights pass through a chunk of the first-level cache, bfloat16 ones widened on the way, so that each is read and
written once. Loops over blocks and over the eight partial sums of a block are apart: both vectorise then. ``lanes`` is
always 8, an argument so that the inner loops stay loops.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.kernels.ggml.lanes import compiled, round_values

__all__ = [
    "encode_direct",
    "encode_ranges",
    "encode_weighted",
    "fill",
    "fill_shares",
    "greatest_bits",
    "greatest_of",
    "sources",
    "store_halves",
    "to_bfloat16",
    "to_float16",
    "to_halves",
    "widened",
]

_SIZE, _LANES = 32, 8
_CHUNK = 4096
_COUNT = np.float32(_SIZE)
_LEAST_STEP = np.float32(2.0**-23)
"""Twice the least float16: smaller steps are rounded to something else altogether, and the mean is better."""
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_PER_SUBNORMAL = np.float32(2.0**24)
_TINY = np.float32(1e-37)
_MAGNITUDE = np.uint16(0x7FFF)
_NOTHING = (np.zeros(0, np.uint16), np.zeros(0, np.float32))

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.uint16]


def encode_direct(weight: Floats | Halves, end: int, rounds: int, blocks: Bytes) -> int:
    """Encode ``weight`` ``[n]``, float32 or the bits of bfloat16, with codes from ``-end`` to ``end - 1``.

    ``blocks`` uint8 ``[n / 32, bytes]`` of Q4_0, Q5_0 or Q8_0 is filled, the step refitted ``rounds`` times. Returns
    the upper 16 bits of the greatest magnitude, as :func:`greatest_bits` does. A step beyond float16 is stored as
    infinity.
    """
    return int(_encode(*sources(weight), _NOTHING[1], _NOTHING[1], np.float32(end), rounds, _LANES, blocks))


def encode_weighted(weight: Floats | Halves, importance: Floats, end: int, places: Floats, blocks: Bytes) -> int:
    """:func:`encode_direct` of rows of ``len(importance)`` weights, against the error weighted by ``importance``.

    The weight of greatest magnitude is tried at each of ``places``, the best step refitted once more.
    """
    return int(_encode(*sources(weight), importance, places, np.float32(end), 1, _LANES, blocks))


def encode_ranges(weight: Floats | Halves, high: int, blocks: Bytes) -> int:
    """:func:`encode_direct` with codes from 0 to ``high`` and a minimum, in the blocks of Q4_1 or Q5_1."""
    return int(_encode_ranges(*sources(weight), np.float32(high), _LANES, blocks))


def sources(weight: Floats | Halves) -> tuple[Halves, Floats]:
    """The two forms in which compiled loops take ``weight``, the one that it has not being empty."""
    return (weight, _NOTHING[1]) if weight.dtype == np.uint16 else (_NOTHING[0], weight)  # type: ignore[return-value]


def to_halves(weight: Floats | Halves, halves: Halves) -> tuple[int, float, float]:
    """Round ``weight`` ``[n]``, float32 or the bits of bfloat16, to the bits of float16, ties to even.

    Returns the upper 16 bits of the greatest magnitude, the squared error of the rounding, and the sum of squares.
    """
    greatest, error, energy = _round_all(*sources(weight), _LANES, halves)
    return int(greatest), float(error), float(energy)


def widened(weight: Floats | Halves) -> Floats:
    """``weight`` if it is float32, or in float32 if it is the bits of bfloat16."""
    if weight.dtype != np.uint16:
        return weight.view(np.float32)
    bits = np.empty(weight.shape, np.int32)
    _widen(weight.reshape(-1), bits.reshape(-1))
    return bits.view(np.float32)


def greatest_bits(weight: Floats | Halves) -> int:
    """The upper 16 bits of the greatest magnitude in ``weight``, float32 or 16-bit floats: from 0x7F80 (float32 and
    bfloat16) or 0x7C00 (float16) on, something is not finite."""
    if weight.dtype == np.uint16:
        return int(_greatest(weight.reshape(-1)))
    return int(_greatest(weight.reshape(-1).view(np.uint16)[1::2]))


@compiled  # type: ignore[untyped-decorator]
def _widen(halves: Any, bits: Any) -> None:
    for i in range(bits.shape[0]):
        bits[i] = np.int32(halves[i]) << np.int32(16)


@compiled  # type: ignore[untyped-decorator]
def _greatest(halves: Any) -> Any:
    masked = np.empty(_CHUNK, np.uint16)
    greatest = np.uint16(0)
    for start in range(0, halves.shape[0], _CHUNK):
        part = halves[start : start + _CHUNK]
        # masked in a pass of its own: numba computes with wider integers, which stay narrow only when stored
        for i in range(part.shape[0]):
            masked[i] = part[i] & _MAGNITUDE
        for i in range(part.shape[0]):
            greatest = max(greatest, masked[i])
    return greatest


@compiled  # type: ignore[untyped-decorator]
def greatest_of(halves: Any, bits: Any, start: int, count: int) -> Any:
    """:func:`greatest_bits` of the chunk of ``count`` weights at ``start``, which :func:`fill` has put in ``bits``."""
    if halves.shape[0]:
        return _greatest(halves[start : start + count])
    return _greatest(bits[:count].view(np.uint16)[1::2])


@compiled  # type: ignore[untyped-decorator]
def fill(halves: Any, weight: Any, start: int, bits: Any) -> int:
    """Copy the chunk at ``start`` of whichever source there is to ``bits`` int32; returns its weights."""
    if halves.shape[0]:
        part = halves[start : start + _CHUNK]
        _widen(part, bits[: part.shape[0]])
        return int(part.shape[0])
    whole = weight[start : start + _CHUNK].view(np.int32)
    for i in range(whole.shape[0]):
        bits[i] = whole[i]
    return int(whole.shape[0])


@compiled  # type: ignore[untyped-decorator]
def _encode(
    halves: Any, weight: Any, importance: Any, places: Any, end: Any, rounds: int, lanes: int, blocks: Any
) -> Any:
    count = _CHUNK // _SIZE
    bits = np.empty(_CHUNK, np.int32)
    x, shares = bits.view(np.float32), np.empty(_CHUNK, np.float32)
    sums = np.empty((3, _LANES * count), np.float32)
    steps, inverses, best = np.empty(count, np.float32), np.empty(count, np.float32), np.empty(count, np.float32)
    extremes, offsets = np.empty(count, np.float32), np.zeros(count, np.float32)
    low, high = -end, end - _ONE
    greatest = np.uint16(0)
    for start in range(0, max(halves.shape[0], weight.shape[0]), _CHUNK):
        n = fill(halves, weight, start, bits) // _SIZE
        greatest = max(greatest, greatest_of(halves, bits, start, n * _SIZE))
        _extremes(x, lanes, sums[0], sums[1], extremes[:n])
        for block in range(n):
            steps[block] = extremes[block] / low
        if importance.shape[0]:
            fill_shares(importance, start, shares[: n * _SIZE])
            best[:n] = np.float32(np.inf)
            for place in places:
                for block in range(n):
                    offsets[block] = extremes[block] / place
                _weighted_refit(x, shares, low, high, lanes, sums, inverses, offsets[:n], steps[:n], best)
            best[:n] = np.float32(np.inf)
            offsets[:n] = steps[:n]
            _weighted_refit(x, shares, low, high, lanes, sums, inverses, offsets[:n], steps[:n], best)
            offsets[:n] = _ZERO
        else:
            for _ in range(rounds):
                _refit(x, low, high, lanes, sums[0], sums[1], inverses, steps[:n])
        round_values(steps[:n])
        part = blocks[start // _SIZE : start // _SIZE + n]
        store_halves(steps[:n], part, 0)
        _invert(steps[:n], inverses)
        if part.shape[1] == 34:
            _codes_of_a_byte(x, inverses[:n], low, high, part)
        else:
            _codes_of_a_nibble(x, offsets, inverses[:n], low, high, part)
    return greatest


@compiled  # type: ignore[untyped-decorator]
def _encode_ranges(halves: Any, weight: Any, high: Any, lanes: int, blocks: Any) -> Any:
    count = _CHUNK // _SIZE
    bits = np.empty(_CHUNK, np.int32)
    x = bits.view(np.float32)
    sums = np.empty((4, _LANES * count), np.float32)
    steps, inverses, offsets = np.empty(count, np.float32), np.empty(count, np.float32), np.empty(count, np.float32)
    greatest = np.uint16(0)
    for start in range(0, max(halves.shape[0], weight.shape[0]), _CHUNK):
        n = fill(halves, weight, start, bits) // _SIZE
        greatest = max(greatest, greatest_of(halves, bits, start, n * _SIZE))
        _ranges(x, high, lanes, sums[0], sums[1], steps[:n], offsets)
        _refit_ranges(x, high, lanes, sums, inverses, steps[:n], offsets)
        round_values(steps[:n])
        round_values(offsets[:n])
        part = blocks[start // _SIZE : start // _SIZE + n]
        store_halves(steps[:n], part, 0)
        store_halves(offsets[:n], part, 2)
        _invert(steps[:n], inverses)
        _codes_of_a_nibble(x, offsets, inverses[:n], _ZERO, high, part)
    return greatest


@compiled  # type: ignore[untyped-decorator]
def fill_shares(importance: Any, start: int, shares: Any) -> None:
    """``shares`` of the weights from ``start`` on, blocks of 32, of rows of ``len(importance)`` weights."""
    per_row, first = importance.shape[0] // _SIZE, start // _SIZE
    for block in range(shares.shape[0] // _SIZE):
        row = importance[(first + block) % per_row * _SIZE :]
        for j in range(_SIZE):
            shares[block * _SIZE + j] = row[j]


@compiled  # type: ignore[untyped-decorator]
def store_halves(values: Any, blocks: Any, at: int) -> None:
    """float32 ``values`` that float16 holds, or too large ones as infinity, to bytes ``at`` and up of ``blocks``."""
    stored = np.empty(values.shape[0], np.uint16)
    to_float16(values, values.view(np.uint32), stored)
    for block in range(values.shape[0]):
        blocks[block, at] = np.uint8(stored[block] & np.uint16(0xFF))
        blocks[block, at + 1] = np.uint8(stored[block] >> np.uint16(8))


@compiled  # type: ignore[untyped-decorator]
def _extremes(x: Any, lanes: int, most: Any, least: Any, extremes: Any) -> None:
    """The weight of greatest magnitude of every block of ``x``."""
    _ends(x, lanes, most, least, extremes.shape[0])
    for block in range(extremes.shape[0]):
        top, bottom = most[block * _LANES], least[block * _LANES]
        for j in range(1, _LANES):
            top, bottom = max(top, most[block * _LANES + j]), min(bottom, least[block * _LANES + j])
        extremes[block] = bottom if -bottom > top else top


@compiled  # type: ignore[untyped-decorator]
def _ranges(x: Any, high: Any, lanes: int, most: Any, least: Any, steps: Any, offsets: Any) -> None:
    """The steps and offsets that lay ``high`` steps over the range of every block of ``x``."""
    _ends(x, lanes, most, least, steps.shape[0])
    for block in range(steps.shape[0]):
        top, bottom = most[block * _LANES], least[block * _LANES]
        for j in range(1, _LANES):
            top, bottom = max(top, most[block * _LANES + j]), min(bottom, least[block * _LANES + j])
        # divided first: the range of huge weights is beyond float32
        steps[block] = (top / high) - (bottom / high)
        offsets[block] = bottom


@compiled  # type: ignore[untyped-decorator]
def _ends(x: Any, lanes: int, most: Any, least: Any, count: int) -> None:
    for block in range(count):
        for j in range(lanes):
            a, b = x[block * _SIZE + j], x[block * _SIZE + _LANES + j]
            c, d = x[block * _SIZE + 2 * _LANES + j], x[block * _SIZE + 3 * _LANES + j]
            most[block * _LANES + j] = max(max(a, b), max(c, d))
            least[block * _LANES + j] = min(min(a, b), min(c, d))


@compiled  # type: ignore[untyped-decorator]
def _invert(steps: Any, inverses: Any) -> None:
    for block in range(steps.shape[0]):
        step = steps[block]
        inverses[block] = _ONE / step if abs(step) > _TINY else _ZERO


@compiled  # type: ignore[untyped-decorator]
def _refit(x: Any, low: Any, high: Any, lanes: int, products: Any, squares: Any, inverses: Any, steps: Any) -> None:
    """Move ``steps`` to the least squared error of the codes that they lead to, sums in a fixed order."""
    _invert(steps, inverses)
    for block in range(steps.shape[0]):
        inverse = inverses[block]
        for j in range(lanes):
            a, b = x[block * _SIZE + j], x[block * _SIZE + _LANES + j]
            c, d = x[block * _SIZE + 2 * _LANES + j], x[block * _SIZE + 3 * _LANES + j]
            code_a = min(max(np.rint(a * inverse), low), high)
            code_b = min(max(np.rint(b * inverse), low), high)
            code_c = min(max(np.rint(c * inverse), low), high)
            code_d = min(max(np.rint(d * inverse), low), high)
            products[block * _LANES + j] = (a * code_a + b * code_b) + (c * code_c + d * code_d)
            squares[block * _LANES + j] = (code_a * code_a + code_b * code_b) + (code_c * code_c + code_d * code_d)
    for block in range(steps.shape[0]):
        product, square = products[block * _LANES], squares[block * _LANES]
        for j in range(1, _LANES):
            product += products[block * _LANES + j]
            square += squares[block * _LANES + j]
        steps[block] = product / square if square > _ZERO else steps[block]


@compiled  # type: ignore[untyped-decorator]
def _weighted_refit(
    x: Any, shares: Any, low: Any, high: Any, lanes: int, sums: Any, inverses: Any, tried: Any, steps: Any, best: Any
) -> None:
    """Where the codes of ``tried`` can have an error below ``best``, keep it and the step that has it in ``steps``."""
    _invert(tried, inverses)
    errors, crossed, squares = sums[0], sums[1], sums[2]
    for block in range(tried.shape[0]):
        step, inverse = tried[block], inverses[block]
        for j in range(lanes):
            # four at a time by hand: a loop inside would keep the one around it from vectorising
            at = block * _SIZE + j
            a, b, c, d = x[at], x[at + _LANES], x[at + 2 * _LANES], x[at + 3 * _LANES]
            share_a, share_b = shares[at], shares[at + _LANES]
            share_c, share_d = shares[at + 2 * _LANES], shares[at + 3 * _LANES]
            code_a = min(max(np.rint(a * inverse), low), high)
            code_b = min(max(np.rint(b * inverse), low), high)
            code_c = min(max(np.rint(c * inverse), low), high)
            code_d = min(max(np.rint(d * inverse), low), high)
            miss_a, miss_b, miss_c, miss_d = a - step * code_a, b - step * code_b, c - step * code_c, d - step * code_d
            error = (share_a * miss_a * miss_a + share_b * miss_b * miss_b) + (
                share_c * miss_c * miss_c + share_d * miss_d * miss_d
            )
            share_a, share_b, share_c, share_d = share_a * code_a, share_b * code_b, share_c * code_c, share_d * code_d
            cross = (share_a * miss_a + share_b * miss_b) + (share_c * miss_c + share_d * miss_d)
            square = (share_a * code_a + share_b * code_b) + (share_c * code_c + share_d * code_d)
            errors[block * _LANES + j] = error
            crossed[block * _LANES + j] = cross
            squares[block * _LANES + j] = square
    for block in range(tried.shape[0]):
        error, cross, square = errors[block * _LANES], crossed[block * _LANES], squares[block * _LANES]
        for j in range(1, _LANES):
            error += errors[block * _LANES + j]
            cross += crossed[block * _LANES + j]
            square += squares[block * _LANES + j]
        change = cross / square if square > _ZERO else _ZERO
        least = error - change * cross
        better = least < best[block]
        best[block] = least if better else best[block]
        steps[block] = tried[block] + change if better else steps[block]


@compiled  # type: ignore[untyped-decorator]
def _refit_ranges(x: Any, high: Any, lanes: int, sums: Any, inverses: Any, steps: Any, offsets: Any) -> None:
    """Move ``steps`` and ``offsets`` to the least squared error of the codes that they lead to."""
    _invert(steps, inverses)
    codes, squares, products, values = sums[0], sums[1], sums[2], sums[3]
    for block in range(steps.shape[0]):
        inverse, offset = inverses[block], offsets[block]
        for j in range(lanes):
            a, b = x[block * _SIZE + j] - offset, x[block * _SIZE + _LANES + j] - offset
            c, d = x[block * _SIZE + 2 * _LANES + j] - offset, x[block * _SIZE + 3 * _LANES + j] - offset
            code_a, code_b = min(np.rint(a * inverse), high), min(np.rint(b * inverse), high)
            code_c, code_d = min(np.rint(c * inverse), high), min(np.rint(d * inverse), high)
            codes[block * _LANES + j] = (code_a + code_b) + (code_c + code_d)
            squares[block * _LANES + j] = (code_a * code_a + code_b * code_b) + (code_c * code_c + code_d * code_d)
            products[block * _LANES + j] = (a * code_a + b * code_b) + (c * code_c + d * code_d)
            values[block * _LANES + j] = (a + b) + (c + d)
    for block in range(steps.shape[0]):
        code, square = codes[block * _LANES], squares[block * _LANES]
        product, value = products[block * _LANES], values[block * _LANES]
        for j in range(1, _LANES):
            code += codes[block * _LANES + j]
            square += squares[block * _LANES + j]
            product += products[block * _LANES + j]
            value += values[block * _LANES + j]
        determinant = _COUNT * square - code * code
        step = (_COUNT * product - value * code) / determinant if determinant > _ZERO else steps[block]
        step = step if step > _LEAST_STEP else _ZERO
        offsets[block] += (value - step * code) / _COUNT
        steps[block] = step


@compiled  # type: ignore[untyped-decorator]
def _codes_of_a_byte(x: Any, inverses: Any, low: Any, high: Any, blocks: Any) -> None:
    """Signed codes of 32 weights each to bytes 2 and up of ``blocks`` uint8 ``[n, 34]``."""
    for block in range(inverses.shape[0]):
        inverse = inverses[block]
        for j in range(_SIZE):
            code = min(max(np.rint(x[block * _SIZE + j] * inverse), low), high)
            blocks[block, 2 + j] = np.uint8(np.int32(code))


@compiled  # type: ignore[untyped-decorator]
def _codes_of_a_nibble(x: Any, offsets: Any, inverses: Any, low: Any, high: Any, blocks: Any) -> None:
    """Codes less ``low`` of 32 weights each to the last 16 bytes of ``blocks``, their fifth bits before them."""
    half, last = _SIZE // 2, blocks.shape[1] - _SIZE // 2
    middle = np.int32(-low)
    for block in range(inverses.shape[0]):
        inverse, offset = inverses[block], offsets[block]
        for j in range(half):
            one = min(max(np.rint((x[block * _SIZE + j] - offset) * inverse), low), high)
            two = min(max(np.rint((x[block * _SIZE + half + j] - offset) * inverse), low), high)
            first, second = np.int32(one) + middle, np.int32(two) + middle
            blocks[block, last + j] = np.uint8((first & np.int32(15)) | (second << np.int32(4)))
    if high - low < np.float32(31):
        return
    for block in range(inverses.shape[0]):
        inverse, offset = inverses[block], offsets[block]
        fifth = np.uint32(0)
        for j in range(_SIZE):
            code = np.int32(min(max(np.rint((x[block * _SIZE + j] - offset) * inverse), low), high)) + middle
            fifth |= np.uint32(code >> np.int32(4)) << np.uint32(j)
        for j in range(4):
            blocks[block, last - 4 + j] = np.uint8((fifth >> np.uint32(8 * j)) & np.uint32(0xFF))


@compiled  # type: ignore[untyped-decorator]
def _round_all(halves: Any, weight: Any, lanes: int, rounded: Any) -> Any:
    bits = np.empty(_CHUNK, np.int32)
    x, near = bits.view(np.float32), np.empty(_CHUNK, np.float32)
    # float64, so that no square of what is lost vanishes
    errors, energies = np.zeros(_LANES, np.float64), np.zeros(_LANES, np.float64)
    greatest = np.uint16(0)
    for start in range(0, max(halves.shape[0], weight.shape[0]), _CHUNK):
        n = fill(halves, weight, start, bits)
        greatest = max(greatest, greatest_of(halves, bits, start, n))
        to_float16(x[:n], bits.view(np.uint32)[:n], rounded[start : start + n])
        near[:n] = x[:n]
        round_values(near[:n])
        for i in range(n, -(-n // _LANES) * _LANES):
            x[i] = near[i] = _ZERO
        for i in range(-(-n // _LANES)):
            for j in range(lanes):
                value = np.float64(x[i * _LANES + j])
                miss = value - np.float64(near[i * _LANES + j])
                errors[j] += miss * miss
                energies[j] += value * value
    return greatest, errors.sum(), energies.sum()


@compiled  # type: ignore[untyped-decorator]
def to_bfloat16(bits: Any, rounded: Any) -> None:
    """float32 ``bits`` uint32 ``[n]``, finite, to bfloat16 ``rounded`` uint16, to nearest, ties to even."""
    for j in range(bits.shape[0]):
        value = np.uint32(bits[j])
        rounded[j] = np.uint16((value + np.uint32(0x7FFF) + ((value >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled  # type: ignore[untyped-decorator]
def to_float16(weight: Any, bits: Any, rounded: Any) -> None:
    """float32 ``weight`` ``[n]`` (and its ``bits`` uint32), finite, to float16 ``rounded`` uint16, ties to even."""
    for j in range(weight.shape[0]):
        sign = (bits[j] >> np.uint32(16)) & np.uint32(0x8000)
        magnitude = bits[j] & np.uint32(0x7FFFFFFF)
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        # the exponents differ by 112, the fractions by 13 bits
        normal = (magnitude + np.uint32(0xFFF) + odd - np.uint32(112 << 23)) >> np.uint32(13)
        small = np.uint32(np.int32(np.rint(min(abs(weight[j]), _ONE) * _PER_SUBNORMAL)))
        half = small if magnitude < np.uint32(113 << 23) else min(normal, np.uint32(0x7C00))
        rounded[j] = np.uint16(half | sign)
