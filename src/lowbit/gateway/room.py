"""Bytes by pool: host memory first, then the memory of each GPU by its number; a pool that is left out holds none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TypeAlias

__all__ = ["Room", "added", "beyond", "fits", "pool_name", "taken"]

Room: TypeAlias = tuple[int, ...]


def added(rooms: Sequence[Room]) -> Room:
    """The sum, pool by pool."""
    return tuple(map(sum, zip_longest(*rooms, fillvalue=0)))


def taken(whole: Room, part: Room) -> Room:
    """``whole`` without ``part``; below zero where more is taken than there is."""
    return tuple(there - gone for there, gone in zip_longest(whole, part, fillvalue=0))


def beyond(wanted: Room, free: Room) -> list[int]:
    """Pools of which more is wanted than is free; who wants nothing of a pool lacks nothing there, full as it is."""
    pairs = zip_longest(wanted, free, fillvalue=0)
    return [pool for pool, (want, there) in enumerate(pairs) if want > 0 and want > there]


def fits(wanted: Room, free: Room) -> bool:
    """Whether no pool lacks anything."""
    return not beyond(wanted, free)


def pool_name(pool: int) -> str:
    """What people call a pool."""
    return "memory" if pool == 0 else f"memory of GPU {pool - 1}"
