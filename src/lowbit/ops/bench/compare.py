"""Two benchmarks side by side: ratios, and whether the repeats tell them apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowbit.errors import UsageError
from lowbit.ops.bench.results import Bench, Run
from lowbit.ops.bench.stats import Verdict, compare_figures

__all__ = ["Row", "compare"]

_BESIDE_THE_POINT = ("late", "in_flight")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of a run in both: medians, ratio after / before, p-value and verdict on the second."""

    run: str
    figure: str
    before: float
    after: float
    ratio: float
    p: float
    verdict: Verdict


def compare(before: Bench, after: Bench) -> list[Row]:
    """Every figure of the runs that have the same name in both, or of the only run in each.

    Raises :class:`UsageError` where there is nothing to compare.
    """
    if before.kind != after.kind:
        raise UsageError(f"one run is {before.kind}, the other {after.kind}: only the same kind can be compared")
    pairs = [(first, second) for first in before.runs for second in after.runs if first.name == second.name]
    if not pairs and len(before.runs) == len(after.runs) == 1:
        pairs = [(before.runs[0], after.runs[0])]
    if not pairs:
        names = [", ".join(run.name for run in bench.runs) for bench in (before, after)]
        raise UsageError(f"no run has the same name in both: {names[0]} against {names[1]}")
    return [row for first, second in pairs for row in _rows(first, second)]


def _rows(first: Run, second: Run) -> list[Row]:
    name = first.name if first.name == second.name else f"{first.name} → {second.name}"
    found = []
    for key, figure in first.figures.items():
        other = second.figures.get(key)
        if other is None or key in _BESIDE_THE_POINT or math.isnan(figure.median) or math.isnan(other.median):
            continue
        ratio, p, verdict = compare_figures(figure, other)
        found.append(Row(name, key, figure.median, other.median, ratio, p, verdict))
    return found
