"""Encoding in the ggml types whose blocks have one float16 scale: Q4_0 to Q5_1 with importance, and IQ4_NL.

Signatures and rules are those of :mod:`lowbit.kernels.ggml.encoders`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lowbit.kernels.ggml import packing
from lowbit.kernels.ggml.blocks import NO_TABLE, both_signs, four_bit_levels, in_blocks, ladder, spans_of
from lowbit.kernels.ggml.search import solve_ranges, solve_steps

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def steps_and_codes(
    weight: Floats,
    importance: Floats | None,
    size: int,
    grid: tuple[int, int],
    places: Floats,
    table: tuple[Floats, Bytes],
) -> tuple[Floats, Bytes]:
    """float32 ``[blocks]`` and uint8 ``[blocks, size]``: see :func:`lowbit.kernels.ggml.search.solve_steps`."""
    blocks, shares = in_blocks(weight, importance, size)
    codes = np.empty(blocks.shape, dtype=np.uint8)
    steps = np.empty(len(blocks), dtype=np.float32)
    low, high = (np.float32(end) for end in grid)
    solve_steps(blocks, shares, low, high, *table, places, 2, codes, steps)
    return steps, codes


def ranges_and_codes(
    weight: Floats, importance: Floats | None, high: int, spans: Floats
) -> tuple[Floats, Floats, Bytes]:
    """float32 ``[blocks]`` twice and uint8 ``[blocks, 32]``: see :func:`lowbit.kernels.ggml.search.solve_ranges`."""
    blocks, shares = in_blocks(weight, importance, 32)
    codes = np.empty(blocks.shape, dtype=np.uint8)
    steps, offsets = np.empty((2, len(blocks)), dtype=np.float32)
    solve_ranges(blocks, shares, np.float32(high), spans, 2, codes, steps, offsets)
    return steps, offsets, codes


_PLACES_4 = both_signs(ladder(6.2, 10.2, 15), ladder(5.8, 9.2, 13))
_PLACES_5 = both_signs(ladder(13.5, 19.0, 13), ladder(13.0, 17.5, 11))
_PLACES_NL = (
    both_signs(ladder(95.0, 145.0, 11), ladder(88.0, 128.0, 9)),
    both_signs(ladder(92.0, 155.0, 16), ladder(84.0, 135.0, 12)),
)
_SPANS_4 = spans_of(15, ladder(0.8, 1.3, 12), (0.0, 0.5, 1.0))
_SPANS_5 = spans_of(31, ladder(0.92, 1.15, 12), (0.0, 0.5, 1.0))


def q4_0(weight: Floats, importance: Floats | None) -> Bytes:
    """Scale, codes of 4 bits."""
    steps, codes = steps_and_codes(weight, importance, 32, (-8, 7), _PLACES_4, NO_TABLE)
    return packing.as_rows(weight, packing.half_bytes(steps), packing.join_nibbles(codes, 16))


def q5_0(weight: Floats, importance: Floats | None) -> Bytes:
    """Scale, fifth bits, codes of 4 bits."""
    steps, codes = steps_and_codes(weight, importance, 32, (-16, 15), _PLACES_5, NO_TABLE)
    return packing.as_rows(
        weight, packing.half_bytes(steps), packing.fifth_bits(codes), packing.join_nibbles(codes, 16)
    )


def iq4_nl(weight: Floats, importance: Floats | None) -> Bytes:
    """Scale, codes of 4 bits into a table of levels."""
    steps, codes = steps_and_codes(
        weight, importance, 32, (0, 0), _PLACES_NL[importance is not None], four_bit_levels()
    )
    return packing.as_rows(weight, packing.half_bytes(steps), packing.join_nibbles(codes, 16))


def q4_1(weight: Floats, importance: Floats | None) -> Bytes:
    """Scale, minimum, codes of 4 bits."""
    steps, offsets, codes = ranges_and_codes(weight, importance, 15, _SPANS_4)
    halves = (packing.half_bytes(steps), packing.half_bytes(offsets))
    return packing.as_rows(weight, *halves, packing.join_nibbles(codes, 16))


def q5_1(weight: Floats, importance: Floats | None) -> Bytes:
    """Scale, minimum, fifth bits, codes of 4 bits."""
    steps, offsets, codes = ranges_and_codes(weight, importance, 31, _SPANS_5)
    halves = (packing.half_bytes(steps), packing.half_bytes(offsets))
    return packing.as_rows(weight, *halves, packing.fifth_bits(codes), packing.join_nibbles(codes, 16))
