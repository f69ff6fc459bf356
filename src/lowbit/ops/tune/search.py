"""The pure core of ``lowbit tune``: settings to try, and successive halving in interleaved rounds.

Two races. The first runs the default against each single change; the second runs the default against the changes that
did well, alone and together. A race is successive halving (Jamieson and Talwalkar 2016): every rung costs about the
same, its candidates run in rounds (each once, in an order drawn anew, so that drift meets all alike), and the best
third goes on with more rounds. The default is never dropped.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

__all__ = [
    "DEFAULT",
    "Candidate",
    "Dimension",
    "Race",
    "combinations_of",
    "race",
    "rounds_of",
    "rungs_of",
    "single_changes",
]

ETA = 3
"""One in so many goes on to the next rung."""
MOST_ROUNDS = 6
"""Of a rung: measurements that could be repeated more often should be longer instead."""
_NOISE = 1.02
"""A change has to be better than the default by so much to be tried together with others."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Settings to be changed, by dotted key of a tier (``concurrency``, ``flags.threads``); nothing for the default."""

    name: str
    changes: tuple[tuple[str, Any], ...] = ()

    def joined(self, other: Candidate) -> Candidate:
        """Both changes; where they touch the same key, ``other`` wins."""
        return Candidate(f"{self.name} + {other.name}", tuple({**dict(self.changes), **dict(other.changes)}.items()))


DEFAULT = Candidate("default")


@dataclass(frozen=True, slots=True)
class Dimension:
    """One thing that can be set, and the values to try beside the default's: label to changes."""

    name: str
    options: Mapping[str, Mapping[str, Any]]

    def candidates(self) -> list[Candidate]:
        """A candidate for each option."""
        return [Candidate(f"{self.name} {label}", tuple(changes.items())) for label, changes in self.options.items()]


def single_changes(dimensions: Sequence[Dimension]) -> list[Candidate]:
    """The default, and every option alone."""
    return [DEFAULT, *(each for dimension in dimensions for each in dimension.candidates())]


def combinations_of(scores: Mapping[Candidate, float], dimensions: Sequence[Dimension]) -> list[Candidate]:
    """The default, each dimension's best change that beat it, all of those together, and all but one.

    ``scores``: mean score of each candidate of the first race, those that were dropped included; more is better.
    """
    base = scores.get(DEFAULT, 0.0)
    best: list[Candidate] = []
    for dimension in dimensions:
        known = [each for each in dimension.candidates() if scores.get(each, -math.inf) > base * _NOISE]
        if known:
            best.append(max(known, key=lambda each: scores[each]))
    best.sort(key=lambda each: -scores[each])
    found = [DEFAULT, *best]
    if len(best) > 1:
        found.append(_together(best))
    if len(best) > 2:
        found += [_together([each for each in best if each is not left_out]) for left_out in best]
        found.append(_together(best[:2]))
    return list(dict.fromkeys(found))


def _together(candidates: Sequence[Candidate]) -> Candidate:
    joined = candidates[0]
    for each in candidates[1:]:
        joined = joined.joined(each)
    return joined


def rungs_of(candidates: int) -> int:
    """How many rungs a race of so many has, until the default and one other are left."""
    rungs = 0
    while candidates > 2 or not rungs:
        candidates, rungs = survivors_of(candidates), rungs + 1
    return rungs


def survivors_of(candidates: int) -> int:
    """How many of so many go on, the default included: a third, at least the default and one other."""
    return min(candidates, max(2, math.ceil(candidates / ETA)))


def rounds_of(candidates: int, alive: int, slices: int) -> int:
    """Rounds of a rung with ``alive`` of ``candidates`` left, where the whole race may run ``slices`` engines."""
    return min(MOST_ROUNDS, max(1, slices // (rungs_of(candidates) * alive)))


@dataclass(slots=True)
class Race:
    """The state of a race: scores by candidate, in the order of the rounds."""

    alive: list[Candidate]
    scores: dict[Candidate, list[float]] = field(default_factory=dict)
    failed: dict[Candidate, str] = field(default_factory=dict)

    def record(self, candidate: Candidate, score: float) -> None:
        """One measurement."""
        self.scores.setdefault(candidate, []).append(score)

    def fail(self, candidate: Candidate, reason: str) -> None:
        """Take a candidate out that cannot run."""
        self.failed[candidate] = reason
        self.scores.pop(candidate, None)
        self.alive = [each for each in self.alive if each is not candidate]

    def mean(self, candidate: Candidate) -> float:
        """Mean score; those that are alive have been in the same rounds."""
        return fmean(self.scores[candidate]) if self.scores.get(candidate) else -math.inf

    def means(self) -> dict[Candidate, float]:
        """Mean score of everyone who has run, dropped or not."""
        return {each: self.mean(each) for each in self.scores}

    def halve(self) -> None:
        """Keep the default and the best of the others."""
        others = sorted((each for each in self.alive if each != DEFAULT), key=self.mean, reverse=True)
        kept = others[: survivors_of(len(self.alive)) - 1]
        self.alive = [each for each in self.alive if each == DEFAULT or each in kept]

    def best(self) -> Candidate:
        """The best of those that are left, the default included."""
        return max(self.alive, key=self.mean)

    def best_change(self) -> Candidate | None:
        """The best of those that are left beside the default."""
        return max((each for each in self.alive if each != DEFAULT), key=self.mean, default=None)


async def race(
    candidates: Sequence[Candidate],
    measure: Callable[[Candidate, int], Awaitable[float | str]],
    *,
    slices: int,
    in_time: Callable[[], bool],
    rng: random.Random,
    first_round: int = 0,
) -> Race:
    """Run a race; ``measure(candidate, round)`` gives a score (more is better), or says why it cannot run.

    ``slices`` measurements are planned; when ``in_time()`` says no, the round is finished and the race ends.
    """
    state = Race(list(candidates))
    number = first_round
    for _ in range(rungs_of(len(candidates))):
        for _ in range(rounds_of(len(candidates), len(state.alive), slices)):
            for candidate in rng.sample(state.alive, len(state.alive)):
                found = await measure(candidate, number)
                if isinstance(found, str):
                    state.fail(candidate, found)
                else:
                    state.record(candidate, found)
            number += 1
            if not in_time():
                return state
        state.halve()
    return state
