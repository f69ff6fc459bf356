"""Decoding of the ggml types whose codes name entries of a codebook: IQ1, IQ2 and IQ3.

Each function takes contiguous blocks uint8 ``[n, block_bytes]`` and returns float32 with the values in order. The
layouts are those of ggml's block structures; the float operations are in ggml's order, so that the bits agree.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from lowbit.formats.ggml.codebooks import grid, sign_patterns
from lowbit.formats.ggml.decode_legacy import half, nibbles

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_HALF, _QUARTER, _DELTA = np.float32(0.5), np.float32(0.25), np.float32(0.125)


@cache
def _levels(name: str) -> Floats:
    return grid(name).astype(np.float32)


@cache
def _signs() -> Floats:
    """float32 ``[256, 8]``: +1 or -1 for each bit of a byte, lowest first."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits == 1, np.float32(-1), np.float32(1))


def _assemble(scales: Floats, name: str, codes: npt.NDArray[np.integer], signs: Bytes) -> Floats:
    """``scales`` [n, s], ``codes`` [n, c], ``signs`` uint8 [n, 32] (a byte for 8 weights) to float32 [n, 256]."""
    values: Floats = _levels(name)[codes].reshape(*scales.shape, -1)
    values *= scales[:, :, None]
    values = values.reshape(len(scales), 32, 8)
    values *= _signs()[signs]
    return values


def _words(blocks: Bytes, begin: int, end: int, dtype: type[np.uint16] | type[np.uint32]) -> npt.NDArray[np.integer]:
    return np.ascontiguousarray(blocks[:, begin:end]).view(dtype)


def _high_bits(packed: Bytes, per_code: int, codes: int) -> npt.NDArray[np.uint16]:
    """uint16 ``[n, bytes * codes]``: bits 8 and up of the codes, ``per_code`` bits each, lowest first."""
    shifts = np.arange(codes, dtype=np.uint8) * np.uint8(per_code)
    fields = (packed[:, :, None] >> shifts) & np.uint8((1 << per_code) - 1)
    return fields.reshape(len(packed), -1).astype(np.uint16) << np.uint16(8)


def _scale_and_signs(words: npt.NDArray[np.integer]) -> tuple[Floats, Bytes]:
    """Words uint32 ``[n, 8]``: four 7-bit sign patterns, 4-bit scale; gives the scale plus a half and ``[n, 32]``."""
    patterns = (words[:, :, None] >> np.array([0, 7, 14, 21], dtype=np.uint32)) & np.uint32(127)
    return _HALF + (words >> np.uint32(28)).astype(np.float32), sign_patterns()[patterns].reshape(len(words), 32)


def iq2_xxs(blocks: Bytes) -> Floats:
    """Scale, 8 x (four 8-bit codes, word of signs and scale)."""
    words = _words(blocks, 2, 66, np.uint32).reshape(-1, 8, 2)
    scales, signs = _scale_and_signs(words[:, :, 1])
    codes = np.ascontiguousarray(words[:, :, 0]).view(np.uint8)
    return _assemble(half(blocks, 0) * scales * _QUARTER, "IQ2_XXS", codes, signs)


def iq2_xs(blocks: Bytes) -> Floats:
    """Scale, 32 x (9-bit code, 7-bit sign pattern), 16 4-bit scales."""
    words = _words(blocks, 2, 66, np.uint16)
    scales = half(blocks, 0) * (_HALF + nibbles(blocks[:, 66:], 1).astype(np.float32)) * _QUARTER
    return _assemble(scales, "IQ2_XS", words & np.uint16(511), sign_patterns()[words >> np.uint16(9)])


def iq2_s(blocks: Bytes) -> Floats:
    """Scale, 32 low bytes of 10-bit codes, 32 sign bytes, high bits of the codes, 16 4-bit scales."""
    scales = half(blocks, 0) * (_HALF + nibbles(blocks[:, 74:], 1).astype(np.float32)) * _QUARTER
    codes = blocks[:, 2:34] | _high_bits(blocks[:, 66:74], 2, 4)
    return _assemble(scales, "IQ2_S", codes, blocks[:, 34:66])


def iq3_xxs(blocks: Bytes) -> Floats:
    """Scale, 64 codes of 8 bits, 8 words of signs and scale."""
    scales, signs = _scale_and_signs(_words(blocks, 66, 98, np.uint32))
    return _assemble(half(blocks, 0) * scales * _HALF, "IQ3_XXS", blocks[:, 2:66], signs)


def iq3_s(blocks: Bytes) -> Floats:
    """Scale, 64 low bytes of 9-bit codes, their high bits, 32 sign bytes, 8 4-bit scales."""
    scales = half(blocks, 0) * (2 * nibbles(blocks[:, 106:], 1) + 1).astype(np.float32)
    codes = blocks[:, 2:66] | _high_bits(blocks[:, 66:74], 1, 8)
    return _assemble(scales, "IQ3_S", codes, blocks[:, 74:106])


def iq1_s(blocks: Bytes) -> Floats:
    """Scale, 32 low bytes of 11-bit codes, 8 x (12 high bits, 3-bit scale, sign of the shift)."""
    words = _words(blocks, 34, 50, np.uint16)
    scales = half(blocks, 0) * (2 * ((words >> np.uint16(12)) & np.uint16(7)) + 1).astype(np.float32)
    high = (words[:, :, None] >> np.array([0, 3, 6, 9], dtype=np.uint16)) & np.uint16(7)
    shifts = np.where(words >> np.uint16(15), -_DELTA, _DELTA)
    return _shifted(scales, blocks[:, 2:34] | (high.reshape(-1, 32) << np.uint16(8)), shifts)


def iq1_m(blocks: Bytes) -> Floats:
    """32 low bytes of 11-bit codes, 32 nibbles (3 high bits, sign of the shift), 16 3-bit scales, scale in 4 parts."""
    words = _words(blocks, 48, 56, np.uint16)
    parts = (words >> np.uint16(12)) << np.array([0, 4, 8, 12], dtype=np.uint16)
    scale = np.bitwise_or.reduce(parts, axis=1, keepdims=True).view(np.float16).astype(np.float32)
    fields = (words[:, :, None] >> np.array([0, 3, 6, 9], dtype=np.uint16)) & np.uint16(7)
    scales = scale * (2 * fields.reshape(-1, 16) + 1).astype(np.float32)
    high = nibbles(blocks[:, 32:48], 1).astype(np.uint16)
    shifts = np.where(high >> np.uint16(3), -_DELTA, _DELTA)
    return _shifted(scales, blocks[:, :32] | ((high & np.uint16(7)) << np.uint16(8)), shifts)


def _shifted(scales: Floats, codes: npt.NDArray[np.integer], shifts: Floats) -> Floats:
    """``scales`` [n, s], ``codes`` [n, 32], ``shifts`` [n, t], added to the entries, to float32 [n, 256]."""
    values: Floats = _levels("IQ1_S")[codes].reshape(*shifts.shape, -1)
    values += shifts[:, :, None]
    values = values.reshape(*scales.shape, -1)
    values *= scales[:, :, None]
    return values
