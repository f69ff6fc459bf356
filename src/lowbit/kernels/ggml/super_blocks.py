"""Encoding in the ggml types with super-blocks of 256 weights: Q2_K to Q6_K and IQ4_XS.

Signatures and rules are those of :mod:`lowbit.kernels.ggml.encoders`. Searches are wider with importance, where they
gain more; both widths keep the cost of a weight near or below that of ggml's own conversion.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lowbit.kernels.ggml import packing
from lowbit.kernels.ggml.blocks import NO_TABLE, Search, both_signs, four_bit_levels, in_blocks, ladder, pairs, spans_of
from lowbit.kernels.ggml.search import solve_super_ranges, solve_super_steps

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_SQUARE = pairs((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1))
_LINE = pairs((0, 0), (1, 0), (-1, 0))

_Q2_K = Search(spans_of(3, ladder(0.8, 1.6, 8), (0.2, 0.8)), pairs((15, 15), (14, 14), (13, 15), (15, 13)))
_Q4_K = (
    Search(spans_of(15, ladder(0.85, 1.3, 8), (0.2, 0.8)), pairs((63, 63))),
    Search(spans_of(15, ladder(0.8, 1.3, 10), (0.0, 0.5, 1.0)), pairs((63, 63))),
)
_Q5_K = (
    Search(spans_of(31, ladder(0.92, 1.16, 8), (0.2, 0.8)), pairs((63, 63))),
    Search(spans_of(31, ladder(0.9, 1.16, 10), (0.0, 0.5, 1.0)), pairs((63, 63))),
)
_Q3_K = (
    Search(both_signs(ladder(3.3, 4.7, 3), ladder(3.2, 3.2, 1)), np.array([-32], dtype=np.float32), 1),
    Search(both_signs(ladder(2.8, 5.0, 7), ladder(2.4, 3.9, 5)), -ladder(27.0, 32.0, 5)),
)
_Q6_K = (
    Search(both_signs(ladder(30.0, 36.0, 8), ladder(29.0, 34.0, 6)), np.array([-128], dtype=np.float32), 1),
    Search(both_signs(ladder(29.0, 38.0, 14), ladder(28.0, 36.0, 10)), np.array([-128], dtype=np.float32), 1),
)
_IQ4_XS = (
    Search(both_signs(ladder(95.0, 145.0, 9), ladder(88.0, 128.0, 7)), -ladder(27.0, 32.0, 5)),
    Search(both_signs(ladder(92.0, 155.0, 16), ladder(84.0, 135.0, 12)), -ladder(27.0, 32.0, 5)),
)


def _super_ranges(
    weight: Floats, importance: Floats | None, size: int, high: int, most: int, search: Search
) -> tuple[Bytes, npt.NDArray[np.int8], Floats]:
    blocks, shares = in_blocks(weight, importance, 256)
    codes = np.empty(blocks.shape, dtype=np.uint8)
    scales = np.empty((2, len(blocks), 256 // size), dtype=np.int8)
    steps = np.empty((2, len(blocks)), dtype=np.float32)
    solve_super_ranges(
        blocks,
        shares,
        size,
        np.float32(high),
        search.candidates,
        1,
        np.float32(most),
        search.fractions,
        _SQUARE,
        search.passes,
        codes,
        scales,
        steps,
    )
    return codes, scales, steps


def _super_steps(
    weight: Floats,
    importance: Floats | None,
    size: int,
    grid: tuple[int, int],
    table: tuple[Floats, Bytes],
    ends: tuple[int, int],
    search: Search,
) -> tuple[Bytes, npt.NDArray[np.int8], Floats]:
    blocks, shares = in_blocks(weight, importance, 256)
    codes = np.empty(blocks.shape, dtype=np.uint8)
    scales = np.empty((2, len(blocks), 256 // size), dtype=np.int8)
    steps = np.empty((2, len(blocks)), dtype=np.float32)
    low, high, least, most = (np.float32(end) for end in (*grid, *ends))
    solve_super_steps(
        blocks,
        shares,
        size,
        low,
        high,
        *table,
        search.candidates,
        1,
        least,
        most,
        search.fractions,
        _LINE,
        search.passes,
        codes,
        scales,
        steps,
    )
    return codes, scales, steps


def q2_k(weight: Floats, importance: Floats | None) -> Bytes:
    """Scales and minima of 4 bits, codes of 2 bits, steps of both."""
    codes, scales, steps = _super_ranges(weight, importance, 16, 3, 15, _Q2_K)
    both = scales.view(np.uint8)
    joined = both[0] | (both[1] << np.uint8(4))
    return packing.as_rows(weight, joined, packing.join_pairs(codes), *map(packing.half_bytes, steps))


def q4_k(weight: Floats, importance: Floats | None) -> Bytes:
    """Steps of scales and minima, both of 6 bits, codes of 4 bits."""
    codes, scales, steps = _super_ranges(weight, importance, 32, 15, 63, _Q4_K[importance is not None])
    joined = packing.scales_and_minima(*scales.view(np.uint8))
    return packing.as_rows(weight, *map(packing.half_bytes, steps), joined, packing.join_nibbles(codes, 32))


def q5_k(weight: Floats, importance: Floats | None) -> Bytes:
    """Steps of scales and minima, both of 6 bits, fifth bits, codes of 4 bits."""
    codes, scales, steps = _super_ranges(weight, importance, 32, 31, 63, _Q5_K[importance is not None])
    joined = packing.scales_and_minima(*scales.view(np.uint8))
    fifth = packing.join_planes(codes >> np.uint8(4))
    return packing.as_rows(weight, *map(packing.half_bytes, steps), joined, fifth, packing.join_nibbles(codes, 32))


def q3_k(weight: Floats, importance: Floats | None) -> Bytes:
    """Third bits, codes of 2 bits, scales of 6 bits, step."""
    codes, scales, steps = _super_steps(
        weight, importance, 16, (-4, 3), NO_TABLE, (-32, 31), _Q3_K[importance is not None]
    )
    third = packing.join_planes(codes >> np.uint8(2))
    joined = packing.three_k_scales(scales[0])
    return packing.as_rows(weight, third, packing.join_pairs(codes), joined, packing.half_bytes(steps[0]))


def q6_k(weight: Floats, importance: Floats | None) -> Bytes:
    """Low nibbles, upper 2 bits, signed 8-bit scales, step."""
    codes, scales, steps = _super_steps(
        weight, importance, 16, (-32, 31), NO_TABLE, (-128, 127), _Q6_K[importance is not None]
    )
    low, high = packing.join_nibbles(codes, 64), packing.join_pairs(codes >> np.uint8(4))
    return packing.as_rows(weight, low, high, scales[0].view(np.uint8), packing.half_bytes(steps[0]))


def iq4_xs(weight: Floats, importance: Floats | None) -> Bytes:
    """Step, scales of 6 bits, codes of 4 bits into a table of levels."""
    codes, scales, steps = _super_steps(
        weight, importance, 32, (0, 0), four_bit_levels(), (-32, 31), _IQ4_XS[importance is not None]
    )
    joined = packing.four_xs_scales(scales[0])
    return packing.as_rows(weight, packing.half_bytes(steps[0]), joined, packing.join_nibbles(codes, 16))
