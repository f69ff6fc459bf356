"""Solving the linears on one input, and the choice between several ways to do it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch

from lowbit.formats import PER_TENSOR, FloatSpec, FloatTensor, WeightSpec, WeightTensor
from lowbit.pipeline.architectures import fused_groups
from lowbit.pipeline.folding import Fold
from lowbit.pipeline.module_plan import ModulePlan
from lowbit.pipeline.recipe import Recipe, method_options
from lowbit.quant import METHODS, InputStatistics, Solution
from lowbit.quant.methods import Options
from lowbit.quant.sparse import DEFAULT_PRUNER, PRUNERS, Pruned, parse_sparsity

__all__ = ["Attempt", "better", "options_of", "prune", "rows_of", "units"]


_CLEARLY = 0.98
"""A scaling that gains less than 2 % on the text that it was searched on gains nothing on other text."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """Linears on one input as they were solved, each alone or several as one matrix, after the scaling ``fold``."""

    fold: Fold | None
    solved: Mapping[tuple[str, ...], Solution]

    @property
    def error(self) -> float:
        """The squared output error of those linears that had a choice of methods."""
        return sum((s.errors.get(s.method or "", 0.0) * s.energy for s in self.solved.values()), 0.0)

    def without(self, name: str) -> Attempt:
        """The same, ``name`` noted as left out where there was a choice."""
        return Attempt(
            self.fold,
            {
                names: solution if solution.method is None else replace(solution, left_out=(*solution.left_out, name))
                for names, solution in self.solved.items()
            },
        )


def options_of(recipe: Recipe, plan: ModulePlan) -> Options:
    """The options of a module's method: the recipe's where it is the recipe's method, its ordering and budget."""
    given = dict(recipe.options) if plan.method == recipe.method else {}
    known = {field.name for field in fields(METHODS[plan.method].options)}
    own = {"ordering": plan.ordering, "budget": recipe.budget}
    given |= {name: value for name, value in own.items() if value is not None and name in known}
    return method_options(METHODS[plan.method].options, given)


def prune(weight: torch.Tensor, statistics: InputStatistics | None, plan: ModulePlan) -> Pruned | None:
    """``weight`` with the zeros that ``plan`` asks for; by magnitude where there are no statistics."""
    if plan.sparsity is None:
        return None
    pruner = (plan.pruner or DEFAULT_PRUNER) if statistics is not None else "magnitude"
    return PRUNERS[pruner](weight, statistics, parse_sparsity(plan.sparsity))


def better(first: Attempt, second: Attempt) -> Attempt:
    """``second`` where it has clearly less error of what had a choice, or else ``first``.

    It says what the candidates of both came to.
    """
    best, other = (second, first) if second.error < _CLEARLY * first.error else (first, second)
    return Attempt(
        best.fold,
        {
            names: replace(
                solution,
                errors={**other.solved[names].errors, **solution.errors},
                left_out=(*other.solved[names].left_out, *solution.left_out),
            )
            for names, solution in best.solved.items()
        },
    )


def units(planned: Sequence[str], plans: Mapping[str, ModulePlan]) -> list[tuple[str, ...]]:
    """What is solved as one matrix: linears that engines merge, where the matrix has a scale of its own."""
    merged = [group for group in fused_groups(list(planned)) if _has_whole_scale(plans[group[0]].spec)]
    inside = {name for group in merged for name in group}
    return [*merged, *((name,) for name in planned if name not in inside)]


def _has_whole_scale(spec: WeightSpec) -> bool:
    """Whether one scale spans the matrix, so that engines that merge matrices need the same one in all of them."""
    return isinstance(spec, FloatSpec) and (spec.group_size == PER_TENSOR or spec.scale == "e4m3")


def rows_of(tensor: WeightTensor, rows: slice) -> WeightTensor:
    """Some rows of a matrix of floats that share its whole scale."""
    assert isinstance(tensor, FloatTensor)
    scales = tensor.scales if tensor.spec.group_size == PER_TENSOR else tensor.scales[rows]
    return replace(tensor, codes=tensor.codes[rows], scales=scales)
