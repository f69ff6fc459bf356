"""Q4_0, Q5_0 and Q8_0 without a search, at the speed of memory.

The step puts the weight of greatest magnitude at the far end of the grid and is then moved to the least squared error
for the codes that it leads to; the codes stored are those nearest to the weights for the step as float16 holds it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lowbit.kernels.ggml.lanes import compiled

_SIZE, _LANES = 32, 8
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_PER_SUBNORMAL = np.float32(2.0**24)
_TINY = np.float32(1e-37)
_MAGNITUDE = np.int32(0x7FFFFFFF)


@compiled  # type: ignore[untyped-decorator]
def extremes(bits: Any, size: int, greatest: Any) -> None:
    """For every ``size`` of ``bits`` int32 ``[n]`` (float32 weights) the one of greatest magnitude, to ``greatest``.

    Magnitudes order like their bits, and a maximum of integers vectorises.
    """
    for block in range(greatest.shape[0]):
        most, magnitude = np.int32(0), np.int32(0)
        for j in range(size):
            value = bits[block * size + j]
            most = max(most, value)
            magnitude = max(magnitude, value & _MAGNITUDE)
        greatest[block] = most if most == magnitude else magnitude | np.int32(-0x80000000)


@compiled  # type: ignore[untyped-decorator]
def refit(weight: Any, steps: Any, low: Any, high: Any, lanes: int, fitted: Any) -> None:
    """Fill ``fitted`` with the steps of least squared error for the codes that ``steps`` float32 ``[blocks]`` lead to.

    Sums go through 8 partial ones (``lanes``, an argument so that the loop stays one and vectorises) in a fixed order.
    """
    sums = np.zeros(2 * _LANES, np.float32)
    for block in range(steps.shape[0]):
        step = steps[block]
        inverse = _ONE / step if abs(step) > _TINY else _ZERO
        for j in range(lanes):
            a, b = weight[block * _SIZE + j], weight[block * _SIZE + _LANES + j]
            c, d = weight[block * _SIZE + 2 * _LANES + j], weight[block * _SIZE + 3 * _LANES + j]
            code_a = min(max(np.rint(a * inverse), low), high)
            code_b = min(max(np.rint(b * inverse), low), high)
            code_c = min(max(np.rint(c * inverse), low), high)
            code_d = min(max(np.rint(d * inverse), low), high)
            sums[j] = (a * code_a + b * code_b) + (c * code_c + d * code_d)
            sums[_LANES + j] = (code_a * code_a + code_b * code_b) + (code_c * code_c + code_d * code_d)
        products, squares = _ZERO, _ZERO
        for j in range(_LANES):
            products += sums[j]
            squares += sums[_LANES + j]
        fitted[block] = products / squares if squares > _ZERO else step


@compiled  # type: ignore[untyped-decorator]
def codes_of_a_byte(weight: Any, steps: Any, low: Any, high: Any, zero: Any, blocks: Any) -> None:
    """Codes ``low`` to ``high``, less ``zero``, of 32 weights each to bytes 2 and up of ``blocks`` uint8 [n, 34]."""
    for block in range(steps.shape[0]):
        step = steps[block]
        inverse = _ONE / step if abs(step) > _TINY else _ZERO
        for j in range(_SIZE):
            code = min(max(np.rint(weight[block * _SIZE + j] * inverse), low), high)
            blocks[block, 2 + j] = np.uint8(np.int32(code - zero))


@compiled  # type: ignore[untyped-decorator]
def codes_of_a_nibble(weight: Any, steps: Any, blocks: Any) -> None:
    """Codes -8 to 7 plus 8 of 32 weights float32 ``[n]`` to bytes 2 and up of ``blocks`` uint8 ``[n, 18]``."""
    least, most, middle, half = np.float32(-8), np.float32(7), np.int32(8), _SIZE // 2
    for block in range(steps.shape[0]):
        step = steps[block]
        inverse = _ONE / step if abs(step) > _TINY else _ZERO
        for j in range(half):
            first = min(max(np.rint(weight[block * _SIZE + j] * inverse), least), most)
            second = min(max(np.rint(weight[block * _SIZE + half + j] * inverse), least), most)
            low, high = np.int32(first) + middle, np.int32(second) + middle
            blocks[block, 2 + j] = np.uint8(low | (high << np.int32(4)))


@compiled  # type: ignore[untyped-decorator]
def to_bfloat16(bits: Any, rounded: Any) -> None:
    """float32 ``bits`` uint32 ``[n]``, finite, to bfloat16 ``rounded`` uint16, to nearest, ties to even."""
    for j in range(bits.shape[0]):
        value = np.uint32(bits[j])
        rounded[j] = np.uint16((value + np.uint32(0x7FFF) + ((value >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@compiled  # type: ignore[untyped-decorator]
def to_float16(weight: Any, bits: Any, rounded: Any) -> None:
    """float32 ``weight`` ``[n]`` (and its ``bits`` uint32), finite, to float16 ``rounded`` uint16, ties to even."""
    for j in range(bits.shape[0]):
        sign = (bits[j] >> np.uint32(16)) & np.uint32(0x8000)
        magnitude = bits[j] & np.uint32(0x7FFFFFFF)
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        # the exponents differ by 112, the fractions by 13 bits
        normal = (magnitude + np.uint32(0xFFF) + odd - np.uint32(112 << 23)) >> np.uint32(13)
        small = np.uint32(np.int32(np.rint(min(abs(weight[j]), _ONE) * _PER_SUBNORMAL)))
        half = small if magnitude < np.uint32(113 << 23) else min(normal, np.uint32(0x7C00))
        rounded[j] = np.uint16(half | sign)
