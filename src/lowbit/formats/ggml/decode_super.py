"""Decoding of the ggml types with super-blocks of 256 weights: Q2_K to Q6_K and IQ4_XS.

Each function takes contiguous blocks uint8 ``[n, block_bytes]`` and returns float32 with the values in order. The
layouts are those of ggml's block structures; the float operations are in ggml's order, so that the bits agree.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lowbit.formats.ggml.codebooks import iq4_values
from lowbit.formats.ggml.decode_legacy import half, nibbles, pairs_of_bits

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def _spread(scales: Floats, codes: npt.NDArray[np.generic]) -> Floats:
    """float32 ``[n, sub-blocks, size]``: each code times the scale of its sub-block."""
    split = codes.reshape(*scales.shape, -1).astype(np.float32)
    split *= scales[:, :, None]
    return split


def q2_k(blocks: Bytes) -> Floats:
    """16 sub-blocks with 4-bit scale (low) and minimum (high), codes of 2 bits, scale, scale of the minima."""
    scales, minima = blocks[:, :16] & np.uint8(15), blocks[:, :16] >> np.uint8(4)
    values = _spread(half(blocks, 80) * scales.astype(np.float32), pairs_of_bits(blocks[:, 16:80]))
    values -= (half(blocks, 82) * minima.astype(np.float32))[:, :, None]
    return values


def q3_k(blocks: Bytes) -> Floats:
    """Third bits, codes of 2 bits, 16 sub-blocks with 6-bit scales less 32, scale."""
    low = nibbles(blocks[:, 96:104], 8)
    high = ((blocks[:, None, 104:108] >> np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]) & np.uint8(3)).reshape(-1, 16)
    scales = (low | (high << np.uint8(4))).view(np.int8) - np.int8(32)
    codes = (pairs_of_bits(blocks[:, 32:96]) | (_eight_planes(blocks[:, :32]) << np.uint8(2))).view(np.int8)
    return _spread(half(blocks, 108) * scales.astype(np.float32), codes - np.int8(4))


def _eight_planes(packed: Bytes) -> Bytes:
    """uint8 ``[n, 256]`` of 0 and 1: of 32 bytes all bits 0 first, then all bits 1, and so on."""
    return ((packed[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)).reshape(len(packed), -1)


def q4_k(blocks: Bytes) -> Floats:
    """Scale, scale of the minima, 8 sub-blocks with 6-bit scale and minimum, codes of 4 bits."""
    return _with_minima(blocks, nibbles(blocks[:, 16:], 32))


def q5_k(blocks: Bytes) -> Floats:
    """Scale, scale of the minima, 8 sub-blocks with 6-bit scale and minimum, fifth bits, codes of 4 bits."""
    return _with_minima(blocks, nibbles(blocks[:, 48:], 32) | (_eight_planes(blocks[:, 16:48]) << np.uint8(4)))


def _with_minima(blocks: Bytes, codes: Bytes) -> Floats:
    scales, minima = scales_and_minima(blocks[:, 4:16])
    values = _spread(half(blocks, 0) * scales.astype(np.float32), codes)
    values -= (half(blocks, 2) * minima.astype(np.float32))[:, :, None]
    return values


def scales_and_minima(packed: Bytes) -> tuple[Bytes, Bytes]:
    """uint8 ``[n, 8]`` twice: the 6-bit scales and minima in the 12 bytes of Q4_K and Q5_K.

    The first four scales and minima fill bits 0-5 of bytes 0-3 and 4-7; the others have their low nibbles in bytes
    8-11 and their two high bits on top of the former.
    """
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    six, four, top = np.uint8(63), np.uint8(4), np.uint8(0x30)
    scales = np.concatenate([first & six, (third & np.uint8(15)) | ((first >> np.uint8(2)) & top)], axis=1)
    minima = np.concatenate([second & six, (third >> four) | ((second >> np.uint8(2)) & top)], axis=1)
    return scales, minima


def q6_k(blocks: Bytes) -> Floats:
    """Low nibbles, upper 2 bits, 16 sub-blocks with signed 8-bit scales, scale; codes less 32."""
    codes = nibbles(blocks[:, :128], 64) | (pairs_of_bits(blocks[:, 128:192]) << np.uint8(4))
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return _spread(half(blocks, 208) * scales, codes.view(np.int8) - np.int8(32))


def iq4_xs(blocks: Bytes) -> Floats:
    """Scale, 8 sub-blocks with 6-bit scales less 32 (two high bits first), codes of 4 bits into a table of levels."""
    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    low = nibbles(blocks[:, 4:8], 1)
    scales = (low | ((high & np.uint16(3)).astype(np.uint8) << np.uint8(4))).view(np.int8) - np.int8(32)
    return _spread(half(blocks, 0) * scales.astype(np.float32), iq4_values()[nibbles(blocks[:, 8:], 16)])
