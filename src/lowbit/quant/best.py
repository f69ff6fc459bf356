"""The best of several methods: each is tried on a linear, and the one whose outputs come out best is kept.

What is compared is the error of the outputs on the calibration inputs, by the Gram matrix that all candidates share.
The outputs that are wanted are the *float* model's, as far as the quantized model's inputs can give them: what
:mod:`lowbit.quant.gptaq` solves for. Measured against the original weights instead, plain GPTQ would win by definition.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import torch

from lowbit.errors import NumericsError, UsageError
from lowbit.quant.error import spaced_rows
from lowbit.quant.factor import quadratic_form
from lowbit.quant.solution import Solution
from lowbit.quant.statistics import InputStatistics

__all__ = ["DEFAULT_BUDGET", "BestOptions", "Pace", "choose", "parse_budget"]

CANDIDATES = ("rtn", "hqq", "awq", "gptq", "gptaq")
"""From the cheapest to the dearest."""
DEFAULT_BUDGET = "30m"
_T = TypeVar("_T")
_ROWS = 512
_START = 0.2
_COMPARISON = "comparison"
_TIME = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[smh]?)")
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class BestOptions:
    """How the best method is found.

    ``candidates``  methods that are tried, in this order; one that does not solve for a format is passed over
    ``budget``      time for solving, of the whole run: ``30m``, ``2h``, ``90s`` (:class:`Pace`)
    ``strength``    GPTAQ's: how far the float model's outputs are what is wanted, 0 for the original weights' own
    """

    candidates: Sequence[str] = CANDIDATES
    budget: str = DEFAULT_BUDGET
    strength: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.candidates, str) or not self.candidates or set(self.candidates) - set(CANDIDATES):
            raise UsageError(f"best candidates must be a list of {', '.join(CANDIDATES)}, not {self.candidates!r}")
        if not 0.0 <= self.strength <= 1.0:
            raise UsageError(f"best strength must be from 0 to 1, not {self.strength}")
        parse_budget(self.budget)


def parse_budget(text: str) -> float:
    """Seconds of ``30m``, ``1.5h``, ``90s`` or ``90``. Raises :class:`UsageError`."""
    match = _TIME.fullmatch(text.strip())
    if match is None or float(match["number"]) <= 0:
        raise UsageError(f"--budget {text!r} is not a time: write e.g. 30m, 2h or 90s")
    return float(match["number"]) * _SECONDS[match["unit"]]


@dataclass(slots=True)
class Pace:
    """Whether there is time for one more candidate.

    A fifth of the budget ``seconds`` is there from the beginning, for what is slow only once; of the rest every weight
    has the same share. What is not used is there for the weights to come. A candidate that would take longer, at what
    it took per weight so far, is not begun.

    ``weights``  all weights of the run that have a choice
    ``spent``    seconds already spent, of which other processes may have spent some (``--resume``)
    ``done``     weights already solved
    """

    seconds: float
    weights: int
    spent: float = 0.0
    done: int = 0
    clock: Callable[[], float] = time.perf_counter
    _rates: dict[str, tuple[float, int]] = field(default_factory=dict)

    @classmethod
    def unlimited(cls) -> Pace:
        """Time for everything."""
        return cls(float("inf"), 1)

    def allows(self, name: str, weights: int) -> bool:
        """Whether candidate ``name`` may be tried on ``weights`` weights, the next to be solved."""
        seconds, seen = self._rates.get(name, (0.0, 1))
        due = self.seconds * (_START + (1 - _START) * min(1.0, (self.done + weights) / max(1, self.weights)))
        return self.spent + seconds / seen * weights <= due

    def timed(self, name: str, weights: int, attempt: Callable[[], _T]) -> _T:
        """The result of ``attempt``, a trial of candidate ``name`` on ``weights`` weights; its time is noted."""
        began = self.clock()
        try:
            return attempt()
        finally:
            taken = self.clock() - began
            seconds, seen = self._rates.get(name, (0.0, 0))
            self._rates[name] = (seconds + taken, seen + weights)
            self.spent += taken


@torch.no_grad()
def choose(
    wanted: Callable[[], torch.Tensor],
    statistics: InputStatistics | None,
    attempts: Mapping[str, Callable[[], Solution]],
    pace: Pace,
    weights: int,
) -> Solution:
    """Try ``attempts`` in their order and keep the one nearest to ``wanted`` in its outputs; of equals, the first.

    The first is always tried; each other one if ``pace`` allows it for so many ``weights``. One that fails is passed
    over. ``wanted`` is asked for when there is something to compare. Errors are measured on about 512 output features,
    evenly spaced, as everywhere. Raises :class:`NumericsError` when every attempt fails.
    """
    solved: dict[str, Solution] = {}
    late: list[str] = []
    failed: list[str] = []
    for name, attempt in attempts.items():
        if solved and not pace.allows(name, weights):
            late.append(name)
            continue
        try:
            solved[name] = pace.timed(name, weights, attempt)
        except NumericsError as error:
            failed.append(f"{name} failed: {error}")
    if not solved:
        raise NumericsError("; ".join(failed))
    errors: dict[str, float] = {}
    energy = 0.0
    if statistics is not None and statistics.tokens and (len(solved) > 1 or not late):
        errors, energy = pace.timed(_COMPARISON, weights, partial(_errors, wanted, statistics, solved))
    best = min(solved, key=lambda name: errors.get(name, 0.0))
    return replace(
        solved[best],
        notes=(*solved[best].notes, *failed),
        method=best,
        errors=errors,
        energy=energy,
        left_out=tuple(late),
    )


def _errors(
    wanted: Callable[[], torch.Tensor], statistics: InputStatistics, solved: Mapping[str, Solution]
) -> tuple[dict[str, float], float]:
    """The share of the output that is error, for each of ``solved``, and what they are shares of."""
    goal = wanted()
    rows = spaced_rows(goal.shape[0], _ROWS)
    goal = goal[rows]
    energy = float(quadratic_form(goal, statistics.upper_gram).sum())
    errors = {}
    for name, solution in solved.items():
        lost = float(quadratic_form(goal - solution.tensor.dequantize()[rows], statistics.upper_gram).sum())
        errors[name] = max(lost, 0.0) / (energy or 1.0) if math.isfinite(lost) else math.inf
    return errors, energy
