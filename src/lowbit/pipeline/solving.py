"""Solving the linears on one input: what decides the result is data, so that any worker can do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from lowbit.errors import NumericsError
from lowbit.formats import Scheme, WeightTensor
from lowbit.pipeline.attempts import Attempt, better, options_of, prune, rows_of, units
from lowbit.pipeline.folding import Fold, Producer, folded
from lowbit.pipeline.module_plan import ModulePlan
from lowbit.pipeline.recipe import Recipe
from lowbit.quant import METHODS, InputStatistics, Pace, output_error, weight_error
from lowbit.quant.solution import Solution
from lowbit.quant.transforms import NO_TRANSFORM, TRANSFORMS

__all__ = ["ModuleReport", "Problem", "Result", "Solved", "joined_weight", "search", "solve", "solve_part"]


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What happened to one linear; ``error`` is the relative squared output error, None without statistics.

    ``zeros`` is the share of weights that are zero, of pruned ones. Where there was a choice of methods, ``candidates``
    are the errors of those that were tried (:class:`lowbit.quant.Solution`), ``left_out`` the others, and ``method``
    the one that was chosen.
    """

    name: str
    spec: str
    method: str
    bits_per_weight: float
    weights: int
    weight_error: float
    error: float | None = None
    tokens: int = 0
    damping: float | None = None
    scaled: bool = False
    zeros: float | None = None
    starved: bool = False
    dropped: int = 0
    candidates: Mapping[str, float] | None = None
    left_out: Sequence[str] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that are set, for the manifest and the journal."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {key: value for key, value in values.items() if value not in (None, False) or key == "weight_error"}


@dataclass(frozen=True, slots=True)
class Problem:
    """Linears on one input, by names relative to their block, in the order in which they are solved.

    ``weights``       as the block has them
    ``full_names``    the checkpoint's names
    ``producer``      what can take up a scaling of the input
    ``least_tokens``  with fewer tokens than that, weights alone decide
    """

    weights: Mapping[str, torch.Tensor]
    plans: Mapping[str, ModulePlan]
    full_names: Mapping[str, str]
    recipe: Recipe
    producer: Producer | None = None
    least_tokens: float = 0.0

    @property
    def first(self) -> ModulePlan:
        """The plan that decides how the input is scaled."""
        return next(iter(self.plans.values()))

    def parts(self) -> list[Problem]:
        """One problem for each matrix: with the same scaling, they can be solved apart."""
        return [
            replace(
                self,
                weights={name: self.weights[name] for name in names},
                plans={name: self.plans[name] for name in names},
                full_names={name: self.full_names[name] for name in names},
            )
            for names in units(list(self.plans), self.plans)
        ]


@dataclass(frozen=True, slots=True)
class Solved:
    """A solved linear: ``weight`` is what the block computes with from now on."""

    name: str
    tensor: WeightTensor
    weight: torch.Tensor
    report: ModuleReport


@dataclass(frozen=True, slots=True)
class Result:
    """How a problem was solved; ``largest`` is the largest input there was, scaled, None without any statistics."""

    linears: tuple[Solved, ...]
    fold: Fold | None
    largest: float | None


def solve(
    problem: Problem,
    statistics: InputStatistics | None,
    pace: Pace | None = None,
    tell: Callable[[str], None] | None = None,
) -> Result:
    """Solve all of it, after each transform that its method tries; the least error wins.

    ``pace`` limits methods that try others, ``tell`` is told of each module as it is begun. ``statistics`` may change
    in their last bits. Raises :class:`NumericsError` naming a module that cannot be solved.
    """
    usable = _usable(problem, statistics)
    pace = pace or Pace.unlimited()
    weights = sum(weight.numel() for weight in problem.weights.values())
    best: Attempt | None = None
    for transform in problem.first.transforms if usable is not None else (NO_TRANSFORM,):
        label = f"search of {transform}"
        if best is not None and not pace.allows(label, weights):
            best = best.without(transform)
            continue
        fold = pace.timed(label, weights, partial(_search, problem, transform, usable))
        if best is None or fold is not None:
            attempt = _attempt(problem, transform, fold, usable, pace, tell)
            best = attempt if best is None else better(best, attempt)
    assert best is not None
    chosen = [name for name, plan in problem.plans.items() if METHODS[plan.method].scope == "candidates"]
    pace.done += sum(problem.weights[name].numel() for name in chosen)
    return _result(problem, best, statistics)


def search(problem: Problem, statistics: InputStatistics | None) -> Fold | None:
    """The scaling of the input, for :func:`solve_part`; for methods that try one transform only."""
    usable = _usable(problem, statistics)
    return None if usable is None else _search(problem, problem.first.transforms[0], usable)


def solve_part(problem: Problem, statistics: InputStatistics | None, fold: Fold | None) -> Result:
    """What :func:`solve` makes of one of a problem's parts, once the scaling is known."""
    usable = _usable(problem, statistics)
    transform = NO_TRANSFORM if usable is None else problem.first.transforms[0]
    return _result(problem, _attempt(problem, transform, fold, usable, Pace.unlimited(), None), statistics)


def joined_weight(weights: Sequence[torch.Tensor], scales: torch.Tensor | None) -> torch.Tensor:
    """Float32 weights of linears on one input, one below the other, their columns times ``scales``."""
    floats = [weight.float() for weight in weights]
    weight = torch.cat(floats) if len(floats) > 1 else floats[0]
    return weight if scales is None else weight * scales


def _usable(problem: Problem, statistics: InputStatistics | None) -> InputStatistics | None:
    """The statistics, unless there are too few tokens in them."""
    return None if statistics is None or statistics.tokens < problem.least_tokens else statistics


def _search(problem: Problem, transform: str, statistics: InputStatistics | None) -> Fold | None:
    """Search a scaling of the input; None where there is none."""
    if transform == NO_TRANSFORM or statistics is None or problem.producer is None:
        return None
    plan, row = problem.first, TRANSFORMS[transform]
    options = problem.recipe.options_of_transform(transform, options_of(problem.recipe, plan))
    found = row.search(list(problem.weights.values()), statistics, plan.spec, plan.inputs, options)
    return None if found is None else problem.producer.fold(found)


def _attempt(
    problem: Problem,
    transform: str,
    fold: Fold | None,
    statistics: InputStatistics | None,
    pace: Pace,
    tell: Callable[[str], None] | None,
) -> Attempt:
    """Solve what is planned on one input, scaled as ``fold`` says."""
    solved: dict[tuple[str, ...], Solution] = {}
    shared: dict[Any, Any] = {}
    with folded(statistics, fold):
        for names in units(list(problem.plans), problem.plans):
            full = problem.full_names[names[0]]
            if tell is not None:
                tell(full)
            plan = problem.plans[names[0]]
            if statistics is None and METHODS[plan.method].needs_statistics:
                plan = replace(plan, method="rtn")
            weight = joined_weight([problem.weights[name] for name in names], None if fold is None else fold.scales)
            solved[names] = METHODS[plan.method].solve(
                weight,
                statistics,
                plan.spec,
                options_of(problem.recipe, plan),
                shared=shared,
                name=full,
                pruned=prune(weight, statistics, plan),
                transform=None if fold is None else transform,
                pace=pace,
            )
    return Attempt(fold, solved)


def _result(problem: Problem, attempt: Attempt, statistics: InputStatistics | None) -> Result:
    """What is wrong with the solutions, measured, and the weights to go on with."""
    usable = _usable(problem, statistics)
    scales = None if attempt.fold is None else attempt.fold.scales
    linears: list[Solved] = []
    with folded(usable, attempt.fold):
        largest = None if statistics is None else float(statistics.abs_max.max())
        for names, solution in attempt.solved.items():
            weight, first = joined_weight([problem.weights[name] for name in names], scales), 0
            for name in names:
                rows = slice(first, first + problem.weights[name].shape[0])
                tensor = solution.tensor if len(names) == 1 else rows_of(solution.tensor, rows)
                part = replace(solution, tensor=tensor)
                linears.append(_solved(problem, name, weight[rows], part, usable, scales, statistics))
                first = rows.stop
    return Result(tuple(linears), attempt.fold, largest)


def _solved(
    problem: Problem,
    name: str,
    weight: torch.Tensor,
    solution: Solution,
    usable: InputStatistics | None,
    scales: torch.Tensor | None,
    statistics: InputStatistics | None,
) -> Solved:
    """One linear; ``weight`` is what it was solved from."""
    full, plan = problem.full_names[name], problem.plans[name]
    method = plan.method if usable is not None or not METHODS[plan.method].needs_statistics else "rtn"
    restored = solution.tensor.dequantize()
    if not bool(torch.isfinite(restored).all()):
        raise NumericsError(f"{full}: the quantized weight is not finite: try --method rtn for it")
    report = ModuleReport(
        name=full,
        spec=str(Scheme(plan.spec, plan.inputs)),
        method=solution.method or method,
        bits_per_weight=solution.tensor.bits_per_weight,
        weights=weight.numel(),
        error=None if usable is None else output_error(weight, restored, usable),
        weight_error=weight_error(weight, restored).relative,
        tokens=0 if statistics is None else statistics.tokens,
        damping=solution.damping or None,
        scaled=scales is not None,
        zeros=None if plan.sparsity is None else float((restored == 0).float().mean()),
        starved=(statistics is None and problem.least_tokens > 0) or statistics is not usable,
        dropped=0 if statistics is None else statistics.nonfinite,
        candidates=dict(solution.errors) or None,
        left_out=solution.left_out or None,
    )
    computed = (restored if scales is None else restored.div_(scales)).to(problem.weights[name].dtype)
    return Solved(name, solution.tensor, computed, report)
