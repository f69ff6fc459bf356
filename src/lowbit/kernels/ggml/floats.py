"""Encoding in the float types of ggml: rounding to nearest, ties to even."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def f32(weight: Floats, importance: Floats | None) -> Bytes:
    """The bytes as they stand."""
    return weight.view(np.uint8)


def f16(weight: Floats, importance: Floats | None) -> Bytes:
    """IEEE half precision; values beyond it become infinite, which the caller refuses."""
    return weight.astype(np.float16).view(np.uint8)


def bf16(weight: Floats, importance: Floats | None) -> Bytes:
    """The upper half of a float32; values beyond the greatest bfloat16 become infinite, which the caller refuses."""
    bits = weight.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return rounded.astype(np.uint16).view(np.uint8)
