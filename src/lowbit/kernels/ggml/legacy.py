"""Encoding in the ggml types whose blocks have one float16 scale: Q4_0 to Q8_0, IQ4_NL, TQ1_0 and TQ2_0.

Signatures and rules are those of :mod:`lowbit.kernels.ggml.encoders`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from lowbit.formats.ggml.codebooks import iq4_values
from lowbit.kernels.ggml import packing
from lowbit.kernels.ggml.search import solve_ranges, solve_steps

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

NO_TABLE = (np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.uint8))


def in_blocks(weight: Floats, importance: Floats | None, size: int) -> tuple[Floats, Floats]:
    """``[blocks, size]`` of the weights and ``[blocks of a row, size]`` of the importance."""
    if importance is None:
        return weight.reshape(-1, size), np.ones((1, size), dtype=np.float32)
    return weight.reshape(-1, size), importance.reshape(-1, size)


def both_signs(negative: Floats, positive: Floats) -> Floats:
    """Places to try for the weight of greatest magnitude, at either end of an asymmetric grid."""
    return np.concatenate([-negative, positive]).astype(np.float32)


@cache
def level_table(levels: bytes) -> tuple[Floats, Bytes]:
    """The level (float32 ``[512]``) and its code (uint8 ``[512]``) nearest to ``v`` at ``floor(2 * v) + 256``.

    ``levels`` are int8. Of equal levels the first counts.
    """
    values = np.frombuffer(levels, dtype=np.int8).astype(np.float64)
    points = (np.arange(512) - 256) / 2 + 0.25  # inside the interval that the entry stands for
    codes = np.abs(points[:, None] - values).argmin(axis=1).astype(np.uint8)
    return values[codes].astype(np.float32), codes


def four_bit_levels() -> tuple[Floats, Bytes]:
    """The table of IQ4_NL and IQ4_XS."""
    return level_table(iq4_values().tobytes())


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


def spans_of(high: int, factors: Floats, shares: tuple[float, ...]) -> Floats:
    """float32 ``[n, 2]``: every number of steps ``high * factor`` with every share of the excess cut off below."""
    return np.array([(high * factor, share) for factor in factors for share in shares], dtype=np.float32)


_PLACES_4 = both_signs(np.linspace(6.8, 9.6, 9), np.linspace(6.2, 8.4, 7))
_PLACES_5 = both_signs(np.linspace(14.5, 18.0, 8), np.linspace(14.0, 16.5, 6))
_PLACES_8 = both_signs(np.linspace(127.0, 129.0, 3), np.linspace(126.0, 129.0, 4))
_PLACES_NL = both_signs(np.linspace(95.0, 145.0, 11), np.linspace(88.0, 128.0, 9))
_PLACES_TERNARY = np.geomspace(0.9, 5.0, 14).astype(np.float32)
_SPANS_4 = spans_of(15, np.linspace(0.9, 1.3, 9), (0.2, 0.8))
_SPANS_5 = spans_of(31, np.linspace(0.95, 1.15, 9), (0.2, 0.8))


def q4_0(weight: Floats, importance: Floats | None) -> Bytes:
    """Scale, codes of 4 bits."""
    steps, codes = steps_and_codes(weight, importance, 32, (-8, 7), _PLACES_4, NO_TABLE)
    return _rows(weight, packing.half_bytes(steps), packing.join_nibbles(codes, 16))


def q5_0(weight: Floats, importance: Floats | None) -> Bytes:
    """Scale, fifth bits, codes of 4 bits."""
    steps, codes = steps_and_codes(weight, importance, 32, (-16, 15), _PLACES_5, NO_TABLE)
    return _rows(weight, packing.half_bytes(steps), packing.fifth_bits(codes), packing.join_nibbles(codes, 16))


def q8_0(weight: Floats, importance: Floats | None) -> Bytes:
    """Scale, signed bytes."""
    steps, codes = steps_and_codes(weight, importance, 32, (-128, 127), _PLACES_8, NO_TABLE)
    return _rows(weight, packing.half_bytes(steps), codes ^ np.uint8(128))


def iq4_nl(weight: Floats, importance: Floats | None) -> Bytes:
    """Scale, codes of 4 bits into a table of levels."""
    steps, codes = steps_and_codes(weight, importance, 32, (0, 0), _PLACES_NL, four_bit_levels())
    return _rows(weight, packing.half_bytes(steps), packing.join_nibbles(codes, 16))


def tq1_0(weight: Floats, importance: Floats | None) -> Bytes:
    """Ternary digits five to a byte, scale."""
    steps, codes = steps_and_codes(weight, importance, 256, (-1, 1), _PLACES_TERNARY, NO_TABLE)
    return _rows(weight, packing.base_three(codes), packing.half_bytes(steps))


def tq2_0(weight: Floats, importance: Floats | None) -> Bytes:
    """Ternary digits four to a byte, scale."""
    steps, codes = steps_and_codes(weight, importance, 256, (-1, 1), _PLACES_TERNARY, NO_TABLE)
    return _rows(weight, packing.join_pairs(codes), packing.half_bytes(steps))


def q4_1(weight: Floats, importance: Floats | None) -> Bytes:
    """Scale, minimum, codes of 4 bits."""
    steps, offsets, codes = ranges_and_codes(weight, importance, 15, _SPANS_4)
    halves = (packing.half_bytes(steps), packing.half_bytes(offsets))
    return _rows(weight, *halves, packing.join_nibbles(codes, 16))


def q5_1(weight: Floats, importance: Floats | None) -> Bytes:
    """Scale, minimum, fifth bits, codes of 4 bits."""
    steps, offsets, codes = ranges_and_codes(weight, importance, 31, _SPANS_5)
    halves = (packing.half_bytes(steps), packing.half_bytes(offsets))
    return _rows(weight, *halves, packing.fifth_bits(codes), packing.join_nibbles(codes, 16))


def _rows(weight: Floats, *fields: Bytes) -> Bytes:
    return np.concatenate(fields, axis=1).reshape(len(weight), -1)
