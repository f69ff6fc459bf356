"""Statistics of repeated measurements: quantiles, spread, and whether two sets of repeats differ at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

__all__ = ["ALPHA", "Better", "Figure", "Verdict", "compare_figures", "quantile", "rank_test"]

Better: TypeAlias = Literal["less", "more"]
Verdict: TypeAlias = Literal["better", "worse", "no difference", "too few repeats"]

ALPHA = 0.05
"""The largest chance of a difference where there is none."""


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of ``values`` lie, interpolated linearly; nan of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    if low == len(ordered) - 1:
        return ordered[low]
    return ordered[low] + (ordered[low + 1] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity, measured once per repeat: ``values`` in ``unit``, and which direction is ``better``."""

    unit: str
    better: Better
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of the repeats."""
        return quantile(self.values, 0.5)

    @property
    def spread(self) -> tuple[float, float]:
        """The first and third quartile of the repeats."""
        return quantile(self.values, 0.25), quantile(self.values, 0.75)

    def to_json(self) -> dict[str, Any]:
        """Unit, direction, median, quartiles and every value."""
        low, high = self.spread
        return {
            "unit": self.unit,
            "better": self.better,
            "median": self.median,
            "q1": low,
            "q3": high,
            "values": list(self.values),
        }


def rank_test(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value of the Mann-Whitney rank test that both come from one distribution, exact.

    Ties count half; they make the exact null distribution one of the actual mid-ranks, counted here by dynamic
    programming over the subsets of ``len(first)`` of all ranks (Mann and Whitney 1947; Streitberg and Roehmel 1986).
    """
    n, everything = len(first), [*first, *second]
    if not n or n == len(everything):
        return 1.0
    ordered = sorted(everything)
    ranks: dict[float, int] = {}
    index = 0
    while index < len(ordered):
        end = index
        while end < len(ordered) and ordered[end] == ordered[index]:
            end += 1
        ranks[ordered[index]] = index + end + 1  # twice the mid-rank
        index = end
    doubled = [ranks[value] for value in everything]
    observed = sum(doubled[:n])
    counts: list[dict[int, int]] = [{0: 1}, *({} for _ in range(n))]
    for rank in doubled:
        for size in range(n - 1, -1, -1):
            for total, ways in counts[size].items():
                counts[size + 1][total + rank] = counts[size + 1].get(total + rank, 0) + ways
    centre = n * (len(everything) + 1)  # twice the mean of the rank sum
    extreme = sum(ways for total, ways in counts[n].items() if abs(total - centre) >= abs(observed - centre))
    return extreme / math.comb(len(everything), n)


def compare_figures(before: Figure, after: Figure) -> tuple[float, float, Verdict]:
    """``(ratio of the medians after / before, p-value, verdict)``.

    ``too few repeats`` where not even complete separation would be significant (four and four are enough).
    """
    ratio = after.median / before.median if before.median else math.nan
    p = rank_test(before.values, after.values)
    fewest = 2 / math.comb(len(before.values) + len(after.values), len(after.values))
    if fewest > ALPHA:
        return ratio, p, "too few repeats"
    if p > ALPHA or after.median == before.median:
        return ratio, p, "no difference"
    return ratio, p, "better" if (after.median < before.median) == (after.better == "less") else "worse"
