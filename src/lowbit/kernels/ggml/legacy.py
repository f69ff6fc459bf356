"""Encoding in the ggml types whose blocks have one float16 scale: Q4_0 to Q8_0, IQ4_NL, TQ1_0 and TQ2_0.

Signatures and rules are those of :mod:`lowbit.kernels.ggml.encoders`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lowbit.kernels.ggml import packing
from lowbit.kernels.ggml.blocks import NO_TABLE, both_signs, four_bit_levels, in_blocks, ladder, spans_of
from lowbit.kernels.ggml.direct import codes_of_a_byte, codes_of_a_nibble, extremes, refit
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


_PLACES_4 = both_signs(ladder(6.8, 9.6, 9), ladder(6.2, 8.4, 7))
_PLACES_5 = both_signs(ladder(14.5, 18.0, 8), ladder(14.0, 16.5, 6))
_PLACES_8 = both_signs(ladder(127.0, 129.0, 3), ladder(126.0, 129.0, 4))
_PLACES_NL = (
    both_signs(ladder(95.0, 145.0, 11), ladder(88.0, 128.0, 9)),
    both_signs(ladder(92.0, 155.0, 16), ladder(84.0, 135.0, 12)),
)
_PLACES_TERNARY = np.geomspace(1.0, 5.0, 9).astype(np.float32)
_SPANS_4 = (
    spans_of(15, ladder(1.0, 1.08, 2), (0.5,)),
    spans_of(15, ladder(0.8, 1.3, 12), (0.0, 0.5, 1.0)),
)
_SPANS_5 = (
    spans_of(31, ladder(1.0, 1.04, 2), (0.5,)),
    spans_of(31, ladder(0.92, 1.15, 12), (0.0, 0.5, 1.0)),
)
"""Fewer candidates without importance: ggml's own conversion does not search there, and is fast."""


def q4_0(weight: Floats, importance: Floats | None) -> Bytes:
    """Scale, codes of 4 bits; without importance at the speed of memory instead of the least error."""
    if importance is None:
        flat = weight.reshape(-1)
        halves, rounded = _direct(flat, 8, 2)
        blocks = np.empty((len(halves), 18), dtype=np.uint8)
        blocks[:, :2] = halves
        codes_of_a_nibble(flat, rounded, blocks)
        return blocks.reshape(len(weight), -1)
    steps, codes = steps_and_codes(weight, importance, 32, (-8, 7), _PLACES_4, NO_TABLE)
    return packing.as_rows(weight, packing.half_bytes(steps), packing.join_nibbles(codes, 16))


def q5_0(weight: Floats, importance: Floats | None) -> Bytes:
    """Scale, fifth bits, codes of 4 bits; without importance at the speed of memory instead of the least error."""
    if importance is None:
        flat = weight.reshape(-1)
        halves, rounded = _direct(flat, 16, 2)
        blocks = np.empty((len(halves), 34), dtype=np.uint8)
        codes_of_a_byte(flat, rounded, np.float32(-16), np.float32(15), np.float32(-16), blocks)
        codes = blocks[:, 2:]
        return packing.as_rows(weight, halves, packing.fifth_bits(codes), packing.join_nibbles(codes, 16))
    steps, codes = steps_and_codes(weight, importance, 32, (-16, 15), _PLACES_5, NO_TABLE)
    return packing.as_rows(
        weight, packing.half_bytes(steps), packing.fifth_bits(codes), packing.join_nibbles(codes, 16)
    )


def q8_0(weight: Floats, importance: Floats | None) -> Bytes:
    """Scale, signed bytes; without importance at the speed of memory instead of the least error."""
    if importance is None:
        flat = weight.reshape(-1)
        halves, rounded = _direct(flat, 128, 1)
        blocks = np.empty((len(halves), 34), dtype=np.uint8)
        blocks[:, :2] = halves
        codes_of_a_byte(flat, rounded, np.float32(-128), np.float32(127), np.float32(0), blocks)
        return blocks.reshape(len(weight), -1)
    steps, codes = steps_and_codes(weight, importance, 32, (-128, 127), _PLACES_8, NO_TABLE)
    return packing.as_rows(weight, packing.half_bytes(steps), codes ^ np.uint8(128))


def iq4_nl(weight: Floats, importance: Floats | None) -> Bytes:
    """Scale, codes of 4 bits into a table of levels."""
    steps, codes = steps_and_codes(
        weight, importance, 32, (0, 0), _PLACES_NL[importance is not None], four_bit_levels()
    )
    return packing.as_rows(weight, packing.half_bytes(steps), packing.join_nibbles(codes, 16))


def tq1_0(weight: Floats, importance: Floats | None) -> Bytes:
    """Ternary digits five to a byte, scale."""
    steps, codes = steps_and_codes(weight, importance, 256, (-1, 1), _PLACES_TERNARY, NO_TABLE)
    return packing.as_rows(weight, packing.base_three(codes), packing.half_bytes(steps))


def tq2_0(weight: Floats, importance: Floats | None) -> Bytes:
    """Ternary digits four to a byte, scale."""
    steps, codes = steps_and_codes(weight, importance, 256, (-1, 1), _PLACES_TERNARY, NO_TABLE)
    return packing.as_rows(weight, packing.join_pairs(codes), packing.half_bytes(steps))


def q4_1(weight: Floats, importance: Floats | None) -> Bytes:
    """Scale, minimum, codes of 4 bits."""
    steps, offsets, codes = ranges_and_codes(weight, importance, 15, _SPANS_4[importance is not None])
    halves = (packing.half_bytes(steps), packing.half_bytes(offsets))
    return packing.as_rows(weight, *halves, packing.join_nibbles(codes, 16))


def q5_1(weight: Floats, importance: Floats | None) -> Bytes:
    """Scale, minimum, fifth bits, codes of 4 bits."""
    steps, offsets, codes = ranges_and_codes(weight, importance, 31, _SPANS_5[importance is not None])
    halves = (packing.half_bytes(steps), packing.half_bytes(offsets))
    return packing.as_rows(weight, *halves, packing.fifth_bits(codes), packing.join_nibbles(codes, 16))


def _direct(flat: Floats, end: int, rounds: int) -> tuple[Bytes, Floats]:
    """Float16 steps of blocks of 32, as bytes ``[blocks, 2]`` and float32, for codes from ``-end`` to ``end - 1``."""
    greatest = np.empty(flat.size // 32, dtype=np.int32)
    extremes(flat.view(np.int32), 32, greatest)
    steps = greatest.view(np.float32) / np.float32(-end)
    for _ in range(rounds):
        fitted = np.empty_like(steps)
        refit(flat, steps, np.float32(-end), np.float32(end - 1), 8, fitted)
        steps = fitted
    halves = packing.half_bytes(steps)
    return halves, halves.view(np.float16).astype(np.float32).reshape(-1)
