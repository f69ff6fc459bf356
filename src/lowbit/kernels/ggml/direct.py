"""Q4_0 and Q8_0 without a search, at the speed of memory: the step follows from the weight of greatest magnitude.

Unlike in ggml's own conversion the codes are those nearest to the weights for the step as float16 holds it, and the
weight of greatest magnitude takes the code at the far end of the grid in Q8_0 too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lowbit.kernels.ggml.lanes import compiled

_SIZE = 32
_ZERO = np.float32(0.0)
_ONE = np.float32(1.0)
_TINY = np.float32(1e-30)
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
def codes_of_a_byte(weight: Any, steps: Any, blocks: Any) -> None:
    """Signed codes of 32 weights float32 ``[n]`` to bytes 2 and up of ``blocks`` uint8 ``[n, 34]``."""
    least, most = np.float32(-128), np.float32(127)
    for block in range(steps.shape[0]):
        step = steps[block]
        inverse = _ONE / step if abs(step) > _TINY else _ZERO
        for j in range(_SIZE):
            code = min(max(np.rint(weight[block * _SIZE + j] * inverse), least), most)
            blocks[block, 2 + j] = np.uint8(np.int32(code))


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
