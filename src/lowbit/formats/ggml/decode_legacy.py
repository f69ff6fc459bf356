"""Decoding of the ggml types whose blocks have one scale level: floats, Q4_0 to Q8_0, ternary and 4-bit floats.

Each function takes contiguous blocks uint8 ``[n, block_bytes]`` and returns float32 with the values in order. The
layouts are those of ggml's block structures; the float operations are in ggml's order, so that the bits agree.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from lowbit.formats.ggml.codebooks import fp4_values, iq4_values

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def half(blocks: Bytes, at: int) -> Floats:
    """float32 ``[n, 1]``: the float16 at byte ``at`` of each block."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def nibbles(packed: Bytes, half_run: int) -> Bytes:
    """uint8 ``[n, 2 * bytes]``: of each run of ``half_run`` bytes first the low nibbles, then the high ones."""
    runs = packed.reshape(len(packed), -1, 1, half_run)
    return np.concatenate([runs & np.uint8(15), runs >> np.uint8(4)], axis=2).reshape(len(packed), -1)


def f32(blocks: Bytes) -> Floats:
    """Values as they stand."""
    return blocks.view(np.float32)


def f16(blocks: Bytes) -> Floats:
    """IEEE half precision."""
    return blocks.view(np.float16).astype(np.float32)


def bf16(blocks: Bytes) -> Floats:
    """The upper half of a float32."""
    return (blocks.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def q4_0(blocks: Bytes) -> Floats:
    """Scale, 32 codes of 4 bits less 8."""
    return half(blocks, 0) * (nibbles(blocks[:, 2:], 16).view(np.int8) - np.int8(8)).astype(np.float32)


def q4_1(blocks: Bytes) -> Floats:
    """Scale, minimum, 32 codes of 4 bits."""
    return half(blocks, 0) * nibbles(blocks[:, 4:], 16).astype(np.float32) + half(blocks, 2)


def q5_0(blocks: Bytes) -> Floats:
    """Scale, 32 fifth bits, 32 codes of 4 bits; less 16."""
    return half(blocks, 0) * (_five_bits(blocks, 2).view(np.int8) - np.int8(16)).astype(np.float32)


def q5_1(blocks: Bytes) -> Floats:
    """Scale, minimum, 32 fifth bits, 32 codes of 4 bits."""
    return half(blocks, 0) * _five_bits(blocks, 4).astype(np.float32) + half(blocks, 2)


def _five_bits(blocks: Bytes, at: int) -> Bytes:
    high = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    return nibbles(blocks[:, at + 4 :], 16) | (high << np.uint8(4))


def q8_0(blocks: Bytes) -> Floats:
    """Scale, 32 signed bytes."""
    return blocks[:, 2:].view(np.int8).astype(np.float32) * half(blocks, 0)


def iq4_nl(blocks: Bytes) -> Floats:
    """Scale, 32 codes of 4 bits into a table of 16 levels."""
    return half(blocks, 0) * iq4_values().astype(np.float32)[nibbles(blocks[:, 2:], 16)]


def tq1_0(blocks: Bytes) -> Floats:
    """256 ternary digits, five to a byte (the last sixteen four to a byte), each byte a base-3 fraction; scale."""
    digits = _ternary_digits()[blocks[:, :52]]  # [n, 52, 5]
    parts = (digits[:, :32], digits[:, 32:48], digits[:, 48:, :4])
    ordered = [part.transpose(0, 2, 1).reshape(len(blocks), -1) for part in parts]
    return half(blocks, 52) * np.concatenate(ordered, axis=1).astype(np.float32)


@cache
def _ternary_digits() -> npt.NDArray[np.int8]:
    """int8 ``[256, 5]``: the digits -1, 0, 1 that each byte holds."""
    powers = np.array([1, 3, 9, 27, 81], dtype=np.uint8)
    shifted = np.arange(256, dtype=np.uint8)[:, None] * powers  # modulo 256: what is left of the fraction
    digits: npt.NDArray[np.int8] = ((shifted.astype(np.uint16) * 3) >> 8).astype(np.int8) - np.int8(1)
    return digits


def tq2_0(blocks: Bytes) -> Floats:
    """256 codes of 2 bits less 1, four to a byte; scale."""
    return half(blocks, 64) * (pairs_of_bits(blocks[:, :64]).view(np.int8) - np.int8(1)).astype(np.float32)


def pairs_of_bits(packed: Bytes) -> Bytes:
    """uint8 ``[n, 4 * bytes]``: of each run of 32 bytes bits 0-1 first, then bits 2-3, 4-5 and 6-7."""
    runs = packed.reshape(len(packed), -1, 1, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    return ((runs >> shifts) & np.uint8(3)).reshape(len(packed), -1)


def mxfp4(blocks: Bytes) -> Floats:
    """Power-of-two scale (E8M0), 32 codes E2M1."""
    return e8m0_halves()[blocks[:, :1]] * fp4_values().astype(np.float32)[nibbles(blocks[:, 1:], 16)]


@cache
def e8m0_halves() -> Floats:
    """float32 ``[256]``: half of 2**(code - 127), the step between the doubled levels of MXFP4."""
    return np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)


def nvfp4(blocks: Bytes) -> Floats:
    """Four scales E4M3 without sign, four runs of 16 codes E2M1."""
    scales = e4m3_halves()[blocks[:, :4]].repeat(16, axis=1)
    return scales * fp4_values().astype(np.float32)[nibbles(blocks[:, 4:], 8)]


@cache
def e4m3_halves() -> Floats:
    """float32 ``[256]``: half of the E4M3 value of each code, its sign ignored; the code of NaN, 0x7F, stands for 0."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    values[0x7F] = 0
    return (values / 2).astype(np.float32)
