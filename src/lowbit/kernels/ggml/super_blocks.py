"""Encoding in the ggml types with super-blocks of 256 weights: Q2_K to Q6_K and IQ4_XS.

Signatures and rules are those of :mod:`lowbit.kernels.ggml.encoders`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lowbit.kernels.ggml import packing
from lowbit.kernels.ggml.blocks import NO_TABLE, both_signs, four_bit_levels, in_blocks, ladder, spans_of
from lowbit.kernels.ggml.search import solve_super_ranges, solve_super_steps

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

PASSES = 2
_SQUARE = np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)], dtype=np.float32)
_LINE = np.array([(0, 0), (1, 0), (-1, 0)], dtype=np.float32)


def _super_ranges(
    weight: Floats, importance: Floats | None, size: int, high: int, spans: Floats, most: int, fractions: Floats
) -> tuple[Bytes, npt.NDArray[np.int8], Floats]:
    blocks, shares = in_blocks(weight, importance, 256)
    codes = np.empty(blocks.shape, dtype=np.uint8)
    scales = np.empty((2, len(blocks), 256 // size), dtype=np.int8)
    steps = np.empty((2, len(blocks)), dtype=np.float32)
    ends = np.float32(high), np.float32(most)
    solve_super_ranges(
        blocks, shares, size, ends[0], spans, 1, ends[1], fractions, _SQUARE, PASSES, codes, scales, steps
    )
    return codes, scales, steps


def _super_steps(
    weight: Floats,
    importance: Floats | None,
    size: int,
    grid: tuple[int, int],
    table: tuple[Floats, Bytes],
    places: Floats,
    ends: tuple[int, int],
    fractions: Floats,
) -> tuple[Bytes, npt.NDArray[np.int8], Floats]:
    blocks, shares = in_blocks(weight, importance, 256)
    codes = np.empty(blocks.shape, dtype=np.uint8)
    scales = np.empty((2, len(blocks), 256 // size), dtype=np.int8)
    steps = np.empty((2, len(blocks)), dtype=np.float32)
    low, high, least, most = (np.float32(end) for end in (*grid, *ends))
    solve_super_steps(
        blocks, shares, size, low, high, *table, places, 1, least, most, fractions, _LINE, PASSES, codes, scales, steps
    )
    return codes, scales, steps


_SPANS_2 = spans_of(3, ladder(0.8, 1.6, 8), (0.2, 0.8))
_SPANS_4 = spans_of(15, ladder(0.9, 1.25, 6), (0.2, 0.8))
_SPANS_5 = spans_of(31, ladder(0.95, 1.15, 5), (0.2, 0.8))
_PLACES_3 = both_signs(ladder(2.8, 5.0, 7), ladder(2.4, 3.9, 5))
_PLACES_6 = both_signs(ladder(31.0, 33.5, 4), ladder(30.5, 32.5, 3))
_PLACES_XS = both_signs(ladder(95.0, 145.0, 9), ladder(88.0, 128.0, 7))
_ONCE_63 = np.array([(63, 63)], dtype=np.float32)
_FEW_15 = np.array([(15, 15), (14, 14), (13, 15), (15, 13)], dtype=np.float32)
_FEW_32 = np.array([-32, -31, -30, -28.5, -27], dtype=np.float32)
_FEW_128 = np.array([-128], dtype=np.float32)


def q2_k(weight: Floats, importance: Floats | None) -> Bytes:
    """Scales and minima of 4 bits, codes of 2 bits, steps of both."""
    codes, scales, steps = _super_ranges(weight, importance, 16, 3, _SPANS_2, 15, _FEW_15)
    both = scales.view(np.uint8)
    joined = both[0] | (both[1] << np.uint8(4))
    return packing.as_rows(weight, joined, packing.join_pairs(codes), *map(packing.half_bytes, steps))


def q4_k(weight: Floats, importance: Floats | None) -> Bytes:
    """Steps of scales and minima, both of 6 bits, codes of 4 bits."""
    codes, scales, steps = _super_ranges(weight, importance, 32, 15, _SPANS_4, 63, _ONCE_63)
    joined = packing.scales_and_minima(*scales.view(np.uint8))
    return packing.as_rows(weight, *map(packing.half_bytes, steps), joined, packing.join_nibbles(codes, 32))


def q5_k(weight: Floats, importance: Floats | None) -> Bytes:
    """Steps of scales and minima, both of 6 bits, fifth bits, codes of 4 bits."""
    codes, scales, steps = _super_ranges(weight, importance, 32, 31, _SPANS_5, 63, _ONCE_63)
    joined = packing.scales_and_minima(*scales.view(np.uint8))
    fifth = packing.join_planes(codes >> np.uint8(4))
    return packing.as_rows(weight, *map(packing.half_bytes, steps), joined, fifth, packing.join_nibbles(codes, 32))


def q3_k(weight: Floats, importance: Floats | None) -> Bytes:
    """Third bits, codes of 2 bits, scales of 6 bits, step."""
    codes, scales, steps = _super_steps(weight, importance, 16, (-4, 3), NO_TABLE, _PLACES_3, (-32, 31), _FEW_32)
    third = packing.join_planes(codes >> np.uint8(2))
    joined = packing.three_k_scales(scales[0])
    return packing.as_rows(weight, third, packing.join_pairs(codes), joined, packing.half_bytes(steps[0]))


def q6_k(weight: Floats, importance: Floats | None) -> Bytes:
    """Low nibbles, upper 2 bits, signed 8-bit scales, step."""
    codes, scales, steps = _super_steps(weight, importance, 16, (-32, 31), NO_TABLE, _PLACES_6, (-128, 127), _FEW_128)
    low, high = packing.join_nibbles(codes, 64), packing.join_pairs(codes >> np.uint8(4))
    return packing.as_rows(weight, low, high, scales[0].view(np.uint8), packing.half_bytes(steps[0]))


def iq4_xs(weight: Floats, importance: Floats | None) -> Bytes:
    """Step, scales of 6 bits, codes of 4 bits into a table of levels."""
    codes, scales, steps = _super_steps(
        weight, importance, 32, (0, 0), four_bit_levels(), _PLACES_XS, (-32, 31), _FEW_32
    )
    joined = packing.four_xs_scales(scales[0])
    return packing.as_rows(weight, packing.half_bytes(steps[0]), joined, packing.join_nibbles(codes, 16))
