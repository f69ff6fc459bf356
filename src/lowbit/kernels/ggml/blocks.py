"""What the encoders prepare for the compiled searches: blocks, tables of levels, candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from lowbit.formats.ggml.codebooks import iq4_values

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

NO_TABLE = (np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.uint8))


@dataclass(frozen=True, slots=True)
class Search:
    """How wide to search.

    ``candidates``  float32: the first steps to try for a group, as :mod:`lowbit.kernels.ggml.search` takes them
    ``fractions``   float32: the first common steps to try for a super-block
    ``passes``      how often the common steps are fitted
    """

    candidates: Floats
    fractions: Floats
    passes: int = 2


def in_blocks(weight: Floats, importance: Floats | None, size: int) -> tuple[Floats, Floats]:
    """``[blocks, size]`` of the weights and ``[blocks of a row, size]`` of the importance, or ``[0, size]``."""
    if importance is None:
        return weight.reshape(-1, size), np.empty((0, size), dtype=np.float32)
    return weight.reshape(-1, size), importance.reshape(-1, size)


def ladder(first: float, last: float, count: int) -> Floats:
    """float32 ``[count]`` places to try for the weight of greatest magnitude, from ``first`` to ``last``."""
    return np.linspace(first, last, count).astype(np.float32)


def both_signs(negative: Floats, positive: Floats) -> Floats:
    """Places at either end of an asymmetric grid."""
    return np.concatenate([-negative, positive])


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


def spans_of(high: int, factors: Sequence[float] | Floats, shares: Sequence[float]) -> Floats:
    """float32 ``[n, 2]``: every number of steps ``high * factor`` with every share of the excess cut off below."""
    return np.array([(high * factor, share) for factor in factors for share in shares], dtype=np.float32)


def pairs(*values: tuple[float, float]) -> Floats:
    """float32 ``[n, 2]``."""
    return np.array(values, dtype=np.float32)
