"""MXFP4, TQ1_0 and TQ2_0 at the speed of memory: few scales are tried, and levels are found by arithmetic.

Weights pass through chunks as in :mod:`lowbit.kernels.ggml.direct`, sums go through eight partial ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.kernels.ggml.direct import fill, fill_shares, greatest_of, sources, store_halves
from lowbit.kernels.ggml.lanes import compiled, round_values

__all__ = ["encode_mxfp4", "encode_ternary"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.uint16]

_CHUNK, _LANES = 4096, 8
_ZERO = np.float32(0.0)
_NONE = np.int32(0)
_LEAST_PLACE = 5
"""The least scale of MXFP4 that has an inverse in float32, with some room."""
_TINY = np.float32(1e-37)
_HALF = np.float32(0.5)
_INFINITE = np.float32(np.inf)
_ONES = np.ones(_CHUNK, np.float32)
_PLACES = np.geomspace(1.2, 4.2, 5).astype(np.float32)
"""Where the weight of greatest magnitude is tried, in units of the scale."""
_LARGEST = np.float32(12.0)
"""The greatest level of MXFP4; the levels are those of E2M1, doubled."""


def encode_ternary(weight: Floats | Halves, importance: Floats | None, blocks: Bytes) -> int:
    """Encode ``weight`` ``[n]``, float32 or the bits of bfloat16, in the blocks of TQ1_0 or TQ2_0.

    ``importance`` is that of the columns of a row, or None. Returns the upper 16 bits of the greatest magnitude, see
    :func:`lowbit.kernels.ggml.direct.greatest_bits`. A scale beyond float16 is stored as infinity.
    """
    return int(_ternary(*sources(weight), _ONES[:0] if importance is None else importance, _LANES, blocks))


def encode_mxfp4(weight: Floats | Halves, importance: Floats | None, blocks: Bytes) -> int:
    """:func:`encode_ternary` for MXFP4: the better of the least scale that does not clip and the one below it."""
    return int(_mxfp4(*sources(weight), _ONES[:0] if importance is None else importance, _LANES, blocks))


@compiled  # type: ignore[untyped-decorator]
def _filled(
    halves: Any, weight: Any, importance: Any, start: int, size: int, bits: Any, magnitudes: Any, shares: Any
) -> Any:
    """The weights from ``start`` on, as many as fit: their bits, magnitudes and shares of the importance. Returns the
    number of blocks of ``size`` and the upper bits of the greatest magnitude."""
    blocks = fill(halves, weight, start, bits) // size
    count = blocks * size
    whole = magnitudes.view(np.int32)
    for i in range(count):
        whole[i] = bits[i] & np.int32(0x7FFFFFFF)
    if importance.shape[0]:
        fill_shares(importance, start, shares[:count])
    return blocks, greatest_of(halves, bits, start, count)


@compiled  # type: ignore[untyped-decorator]
def _ternary(halves: Any, weight: Any, importance: Any, lanes: int, blocks: Any) -> Any:
    size = 256
    bits, y, shares = np.empty(_CHUNK, np.int32), np.empty(_CHUNK, np.float32), np.ones(_CHUNK, np.float32)
    scales, sums = np.empty(_CHUNK // size, np.float32), np.empty((2, _LANES), np.float32)
    signs, codes = bits.view(np.float32), np.empty(size, np.uint8)
    greatest = np.uint16(0)
    for start in range(0, max(halves.shape[0], weight.shape[0]), _CHUNK):
        n, top = _filled(halves, weight, importance, start, size, bits, y, shares)
        greatest = max(greatest, top)
        for block in range(n):
            part, share = y[block * size : (block + 1) * size], shares[block * size : (block + 1) * size]
            scales[block] = _ternary_scale(part, share, lanes, sums[0], sums[1])
        round_values(scales[:n])
        out = blocks[start // size : start // size + n]
        store_halves(scales[:n], out, out.shape[1] - 2)
        for block in range(n):
            edge = scales[block] * _HALF if scales[block] > _TINY else _INFINITE
            for j in range(size):
                value = signs[block * size + j]
                codes[j] = np.uint8(1) + np.uint8(value > edge) - np.uint8(value < -edge)
            if out.shape[1] == 66:
                _pack_pairs(codes, out[block])
            else:
                _pack_digits(codes, out[block])
    return greatest


@compiled  # type: ignore[untyped-decorator]
def _ternary_scale(y: Any, share: Any, lanes: int, inside: Any, count: Any) -> Any:
    """The scale of least error for magnitudes ``y``: those above half of it get it, the others 0."""
    # by the bits: an integer maximum vectorises
    bits = y.view(np.int32)
    most = _NONE
    for i in range(bits.shape[0]):
        most = max(most, bits[i])
    count.view(np.int32)[0] = most
    top = count[0]
    best, scale = _ZERO, _ZERO
    for trial in range(len(_PLACES) + 2):
        edge = _HALF * (top / _PLACES[trial] if trial < len(_PLACES) else scale)
        inside[:], count[:] = _ZERO, _ZERO
        for i in range(y.shape[0] // _LANES):
            for j in range(lanes):
                value, weight = y[i * _LANES + j], share[i * _LANES + j]
                weight = weight if value > edge else _ZERO
                inside[j] += weight * value
                count[j] += weight
        product, square = inside.sum(), count.sum()
        gain = product * (product / square) if square > _ZERO else _ZERO
        if gain > best:
            best, scale = gain, product / square
    return scale


@compiled  # type: ignore[untyped-decorator]
def _pack_pairs(codes: Any, block: Any) -> None:
    """TQ2_0: the codes of four runs of 32 in a byte each, twice."""
    for half in range(2):
        for j in range(32):
            at = half * 128 + j
            byte = codes[at] | (codes[at + 32] << np.uint8(2))
            block[half * 32 + j] = np.uint8(byte | (codes[at + 64] << np.uint8(4)) | (codes[at + 96] << np.uint8(6)))


@compiled  # type: ignore[untyped-decorator]
def _pack_digits(codes: Any, block: Any) -> None:
    """TQ1_0: five codes to a byte, as the fraction ``digits / 243`` rounded up; four to each of the last."""
    at, byte = 0, 0
    for run, digits in ((32, 5), (16, 5), (4, 4)):
        for j in range(run):
            value = np.int32(0)
            for digit in range(digits):
                value = value * np.int32(3) + np.int32(codes[at + digit * run + j])
            value = value if digits == 5 else value * np.int32(3)
            block[byte + j] = np.uint8((value * np.int32(256) + np.int32(242)) // np.int32(243))
        at += run * digits
        byte += run


@compiled  # type: ignore[untyped-decorator]
def _level(value: Any) -> Any:
    """The level next to a magnitude, of 0, 1, 2, 3, 4, 6, 8 and 12."""
    fine, middle = np.rint(value), np.rint(value * np.float32(0.5)) * np.float32(2.0)
    coarse = min(np.rint(value * np.float32(0.25)) * np.float32(4.0), _LARGEST)
    return fine if value < np.float32(4.0) else (middle if value < np.float32(8.0) else coarse)


@compiled  # type: ignore[untyped-decorator]
def _mxfp4(halves: Any, weight: Any, importance: Any, lanes: int, blocks: Any) -> Any:
    size = 32
    bits, y, shares = np.empty(_CHUNK, np.int32), np.empty(_CHUNK, np.float32), np.ones(_CHUNK, np.float32)
    places, inverses = np.empty(_CHUNK // size, np.int32), np.empty(_CHUNK // size, np.float32)
    least, partial = np.empty((2, _CHUNK // size), np.float32), np.empty(_CHUNK // size * _LANES, np.float32)
    greatest = np.uint16(0)
    for start in range(0, max(halves.shape[0], weight.shape[0]), _CHUNK):
        n, top = _filled(halves, weight, importance, start, size, bits, y, shares)
        greatest = max(greatest, top)
        _places(y, lanes, partial, places[:n])
        for below in range(2):
            _level_errors(y, shares, lanes, places[:n], below, inverses, partial, least[below])
        for block in range(n):
            lower = least[1, block] < least[0, block]
            places[block] = max(places[block] - np.int32(1), _NONE) if lower else places[block]
            blocks[start // size + block, 0] = np.uint8(places[block])
        _invert(places[:n], 0, inverses)
        _level_codes(bits, y, inverses[:n], blocks[start // size : start // size + n])
    return greatest


@compiled  # type: ignore[untyped-decorator]
def _invert(places: Any, below: int, inverses: Any) -> None:
    """One over half of 2 ** (place - 127), the scale ``below`` places under ``places``; 0 where it is tiny.

    Half, for the levels are doubled; see :func:`lowbit.formats.ggml.decode_legacy.e8m0_halves`.
    """
    bits = inverses.view(np.int32)
    for block in range(places.shape[0]):
        place = max(places[block] - np.int32(below), _NONE)
        bits[block] = (np.int32(255) - place) << np.int32(23) if place >= _LEAST_PLACE else _NONE


@compiled  # type: ignore[untyped-decorator]
def _places(y: Any, lanes: int, most: Any, places: Any) -> None:
    """The number of the least scale whose greatest level is no less than the greatest of ``y``."""
    size = 32
    for block in range(places.shape[0]):
        for j in range(lanes):
            a, b = y[block * size + j], y[block * size + _LANES + j]
            c, d = y[block * size + 2 * _LANES + j], y[block * size + 3 * _LANES + j]
            most[block * _LANES + j] = max(max(a, b), max(c, d))
    wanted = np.empty(places.shape[0], np.float32)
    for block in range(places.shape[0]):
        top = most[block * _LANES]
        for j in range(1, _LANES):
            top = max(top, most[block * _LANES + j])
        wanted[block] = top / _LARGEST
    bits = wanted.view(np.int32)
    for block in range(places.shape[0]):
        exponent = (bits[block] >> np.int32(23)) + np.int32((bits[block] & np.int32(0x7FFFFF)) != 0)
        places[block] = min(exponent + np.int32(1), np.int32(254)) if bits[block] else np.int32(0)


@compiled  # type: ignore[untyped-decorator]
def _level_errors(
    y: Any, shares: Any, lanes: int, places: Any, below: int, inverses: Any, partial: Any, errors: Any
) -> None:
    """The errors of all blocks at the scales ``below`` places under ``places``."""
    size = 32
    _invert(places, below, inverses)
    for block in range(places.shape[0]):
        inverse = inverses[block]
        for j in range(lanes):
            at = block * size + j
            a, b = y[at] * inverse, y[at + _LANES] * inverse
            c, d = y[at + 2 * _LANES] * inverse, y[at + 3 * _LANES] * inverse
            a, b, c, d = a - _level(a), b - _level(b), c - _level(c), d - _level(d)
            upper = shares[at] * a * a + shares[at + _LANES] * b * b
            partial[block * _LANES + j] = upper + (shares[at + 2 * _LANES] * c * c + shares[at + 3 * _LANES] * d * d)
    for block in range(places.shape[0]):
        error = partial[block * _LANES]
        for j in range(1, _LANES):
            error += partial[block * _LANES + j]
        # in units of the scale above, so that neither of the two leaves the range of float32
        errors[block] = error * np.float32(0.25) if below else error


@compiled  # type: ignore[untyped-decorator]
def _level_codes(bits: Any, y: Any, inverses: Any, blocks: Any) -> None:
    """Codes of 4 bits, the sign uppermost, of weights 0 to 15 in low nibbles, of 16 to 31 in high ones."""
    size, half = 32, 16
    numbers = np.empty(size, np.int32)
    for block in range(inverses.shape[0]):
        for j in range(size):
            level = _level(y[block * size + j] * inverses[block])
            number = level if level <= np.float32(4.0) else min(level * _HALF + np.float32(2.0), np.float32(7.0))
            sign = np.float32(8.0) if bits[block * size + j] < 0 and level > _ZERO else _ZERO
            numbers[j] = np.int32(number + sign)
        for j in range(half):
            blocks[block, 1 + j] = np.uint8(numbers[j] | (numbers[half + j] << np.int32(4)))
