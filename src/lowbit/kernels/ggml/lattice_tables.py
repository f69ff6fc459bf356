"""What the codebook search needs to know of a codebook: its points by halves, the nearest points of every cell."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from lowbit.formats.ggml.codebooks import grid

__all__ = ["Lattice", "lattice"]

NEIGHBOURS = 24
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Lattice:
    """A codebook of points in ``width`` dimensions whose coordinates take few values.

    A point is split in two halves; a half is one of ``levels ** (width / 2)`` patterns, its number in base ``levels``
    with the first coordinate as the lowest digit.

    ``levels``      float32 ``[levels]``, ascending
    ``left``        uint8 ``[points]``, ``right`` the same: the patterns of the halves of each point
    ``order``       uint16 ``[points]``: the points sorted by left pattern
    ``start``       int32 ``[patterns + 1]``: where each left pattern begins in ``order``
    ``neighbours``  uint16 ``[patterns ** 2, NEIGHBOURS]``: for every combination of halves the nearest points
    """

    width: int
    levels: npt.NDArray[np.float32]
    left: npt.NDArray[np.uint8]
    right: npt.NDArray[np.uint8]
    order: npt.NDArray[np.uint16]
    start: npt.NDArray[np.int32]
    neighbours: npt.NDArray[np.uint16]

    @property
    def patterns(self) -> int:
        """How many patterns a half can have."""
        return int(len(self.levels) ** (self.width // 2))


@cache
def lattice(name: str) -> Lattice:
    """The tables of the codebook ``name`` (see :func:`lowbit.formats.ggml.codebooks.grid`), made at first use."""
    points = grid(name).astype(np.float32)
    width = points.shape[1]
    levels = np.unique(points)
    digits = np.searchsorted(levels, points)
    half = width // 2
    place = len(levels) ** np.arange(half)
    left, right = digits[:, :half] @ place, digits[:, half:] @ place
    patterns = len(levels) ** half
    order = np.argsort(left, kind="stable")
    start = np.searchsorted(left[order], np.arange(patterns + 1))
    return Lattice(
        width=width,
        levels=levels,
        left=left.astype(np.uint8),
        right=right.astype(np.uint8),
        order=order.astype(np.uint16),
        start=start.astype(np.int32),
        neighbours=_nearest(points, levels),
    )


def _nearest(points: npt.NDArray[np.float32], levels: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The nearest points of every cell; ties go to the lower number, so that the table is the same everywhere."""
    count, width = len(levels), points.shape[1]
    half = count ** (width // 2)
    digits = np.arange(half)[:, None] // count ** np.arange(width // 2) % count
    values = levels[digits]
    lengths = np.einsum("ij,ij->i", points, points)
    nearest = np.empty((half * half, NEIGHBOURS), np.uint16)
    number = np.arange(len(points), dtype=np.int64)
    for begin in range(0, half * half, _CHUNK):
        cells = np.arange(begin, min(begin + _CHUNK, half * half))
        centres = np.concatenate([values[cells % half], values[cells // half]], axis=1)
        # twice the squared distance is a whole number, so the sum with the point's number sorts exactly
        distances = np.rint(2 * (lengths - 2 * centres @ points.T)).astype(np.int64)
        keys = distances * len(points) + number
        found = np.partition(keys, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
        found.sort(axis=1)
        nearest[cells] = found % len(points)
    return nearest
