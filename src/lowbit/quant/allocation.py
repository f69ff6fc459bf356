"""Mixed precision: the choice of one option per group that costs least within a budget of bytes.

The multiple-choice knapsack problem, solved by dynamic programming over the bytes that are spent beyond the smallest
choice everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lowbit.errors import ResourceError

__all__ = ["Option", "allocate"]

EXACT = 200_000
"""Most parts of the bytes to spend for which the problem is solved exactly."""
STEPS = 20_000
"""Parts that they are counted in otherwise: a choice may then leave at most groups / STEPS of them unspent."""


@dataclass(frozen=True, slots=True)
class Option:
    """A way to store a group of modules: its ``bytes``, and what it costs (nats of KL divergence, usually)."""

    bytes: int
    cost: float


def allocate(groups: Sequence[Mapping[str, Option]], budget: int) -> list[str]:
    """One option name per group, with the least total cost of all choices of at most ``budget`` bytes in total.

    Sizes of weights have large common divisors, and then it is exact; otherwise each group's bytes are rounded to
    1/20000 of what there is to choose, always upwards, so that the budget holds. Raises :class:`ResourceError` saying
    what the smallest choice needs when even that is too large.
    """
    useful = [_undominated(options) for options in groups]
    floor = sum(options[0][1].bytes for options in useful)
    if floor > budget:
        raise ResourceError(
            f"the smallest choice takes {floor:,} bytes, {floor - budget:,} more than the {max(budget, 0):,} there are"
        )
    room = min(budget, sum(options[-1][1].bytes for options in useful)) - floor
    unit = _unit(useful, room)
    best = np.zeros(room // unit + 1)
    chosen: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []
    for options in useful:
        totals = np.full((len(options), len(best)), np.inf)
        for index, (_, option) in enumerate(options):
            extra = -(-(option.bytes - options[0][1].bytes) // unit)
            if extra < len(best):
                totals[index, extra:] = best[: len(best) - extra] + option.cost
        picks = totals.argmin(axis=0)
        chosen.append(picks.astype(np.uint8))
        best = totals[picks, np.arange(len(best))]
    spent = len(best) - 1
    names = []
    for options, picks in zip(reversed(useful), reversed(chosen), strict=True):
        name, option = options[int(picks[spent])]
        names.append(name)
        spent -= -(-(option.bytes - options[0][1].bytes) // unit)
    return names[::-1]


def _unit(groups: Sequence[Sequence[tuple[str, Option]]], room: int) -> int:
    """Bytes in a part: the greatest that all differences are made of, or more where those are too many."""
    common = math.gcd(*(option.bytes - options[0][1].bytes for options in groups for _, option in options))
    return common if common and room // common <= EXACT else max(1, -(-room // STEPS))


def _undominated(options: Mapping[str, Option]) -> list[tuple[str, Option]]:
    """The options by size, without those that cost no less than a smaller one."""
    kept: list[tuple[str, Option]] = []
    for name, option in sorted(options.items(), key=lambda item: (item[1].bytes, item[1].cost)):
        if not kept or option.cost < kept[-1][1].cost:
            kept.append((name, option))
    return kept
