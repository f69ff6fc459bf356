"""What the codebook search needs to know of a codebook: its points by halves, the nearest points of every cell."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from lowbit.formats.ggml.codebooks import grid

__all__ = ["Lattice", "lattice"]

_DENSE = 1024
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Lattice:
    """A codebook of points in ``width`` dimensions whose coordinates take few values.

    A point is split in two halves; a half is one of ``levels ** (width / 2)`` patterns, its number in base ``levels``
    with the first coordinate as the lowest digit.

    ``levels``      float32 ``[levels]``, ascending
    ``halves``      float32 ``[width / 2, patterns]``: the coordinates of every pattern
    ``points``      uint32 ``[points]``: every point (see below), by number
    ``order``       the same, sorted by left pattern
    ``start``       int64 ``[patterns + 1]``: where each left pattern begins in ``order``
    ``neighbours``  uint32 ``[patterns ** 2, near]``: for every combination of halves the nearest points, nearest
                    first; the combination is the left pattern plus ``patterns`` times the right one

    A point is its number, plus the pattern of its left half times 2**16, plus that of its right half times 2**24.
    """

    width: int
    levels: npt.NDArray[np.float32]
    halves: npt.NDArray[np.float32]
    points: npt.NDArray[np.uint32]
    order: npt.NDArray[np.uint32]
    start: npt.NDArray[np.int64]
    neighbours: npt.NDArray[np.uint32]


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
    packed = (np.arange(len(points)) | left << 16 | right << 24).astype(np.uint32)
    order = np.argsort(left, kind="stable")
    return Lattice(
        width=width,
        levels=levels,
        halves=np.ascontiguousarray(_patterns(levels, half).T),
        points=packed,
        order=packed[order],
        start=np.searchsorted(left[order], np.arange(patterns + 1)).astype(np.int64),
        neighbours=packed[_nearest(points, levels, 8 if len(points) > _DENSE else 12)],
    )


def _patterns(levels: npt.NDArray[np.float32], half: int) -> npt.NDArray[np.float32]:
    """``[patterns, half]``: the coordinates of every pattern of a half."""
    count = len(levels)
    return levels[np.arange(count**half)[:, None] // count ** np.arange(half) % count]


def _nearest(points: npt.NDArray[np.float32], levels: npt.NDArray[np.float32], near: int) -> npt.NDArray[np.uint16]:
    """The nearest points of every cell; ties go to the lower number, so that the table is the same everywhere."""
    values = _patterns(levels, points.shape[1] // 2)
    half = len(values)
    lengths = np.einsum("ij,ij->i", points, points)
    nearest = np.empty((half * half, near), np.uint16)
    number = np.arange(len(points), dtype=np.int64)
    for begin in range(0, half * half, _CHUNK):
        cells = np.arange(begin, min(begin + _CHUNK, half * half))
        centres = np.concatenate([values[cells % half], values[cells // half]], axis=1)
        # twice the squared distance is a whole number, so the sum with the point's number sorts exactly
        distances = np.rint(2 * (lengths - 2 * centres @ points.T)).astype(np.int64)
        keys = distances * len(points) + number
        found = np.partition(keys, near - 1, axis=1)[:, :near]
        found.sort(axis=1)
        nearest[cells] = found % len(points)
    return nearest
