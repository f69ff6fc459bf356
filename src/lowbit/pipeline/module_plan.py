"""What a recipe means for each module of a model: its format and method, or None for one left dense."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lowbit.errors import UsageError
from lowbit.formats import ActivationSpec, CodebookSpec, Scheme, WeightSpec, parse_scheme
from lowbit.pipeline.recipe import Recipe, Rule, suggestion
from lowbit.quant import METHODS
from lowbit.quant.transforms import NO_TRANSFORM

_DENSE = re.compile(
    r"(?:.*\.)?(?:lm_head|embed_out|output_projection|embed_\w+|wte|wpe|\w*embeddings?"
    r"|gate|router|shared_expert_gate|score|classifier|qa_outputs)(?:\.(?:weight|linear|classifier|layer))?"
)
"""Left dense unless a rule says otherwise: heads, embeddings and the routers of mixtures of experts."""
_ALWAYS_KNOWN = ("lm_head", "model.embed_tokens")
"""Names that a skip rule may give although a model (with tied weights) has no such module."""


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """How one module is quantized; ``ordering`` None leaves it to the method's options.

    ``inputs`` is the format of its inputs (None: left alone); see :class:`Recipe` for the others.
    """

    spec: WeightSpec
    method: str
    ordering: str | None = None
    inputs: ActivationSpec | None = None
    transform: str | None = None
    sparsity: str | None = None
    pruner: str | None = None

    @property
    def applied_transform(self) -> str:
        """The transform before the method: the one asked for, else the method's own.

        Else SmoothQuant, where inputs become int8 beside 8-bit weights and the method calibrates anyway.
        """
        method = METHODS.get(self.method)
        if self.transform is not None or method is None:
            return self.transform or NO_TRANSFORM
        smooth = self.inputs is not None and self.inputs.element == "int8" and self.spec.bits == 8
        default = "smoothquant" if smooth and method.needs_statistics else NO_TRANSFORM
        return method.transform or default

    @property
    def transforms(self) -> tuple[str, ...]:
        """The transforms to try before the method, of which the one that serves its candidates best is taken."""
        method, first = METHODS.get(self.method), self.applied_transform
        if method is None or method.scope != "candidates" or self.transform is not None or first != NO_TRANSFORM:
            return (first,)
        return (NO_TRANSFORM, "awq")

    @property
    def needs_statistics(self) -> bool:
        """Whether calibration inputs decide anything about this module."""
        method, transform = METHODS.get(self.method), self.applied_transform
        static = self.inputs is not None and self.inputs.needs_calibration
        pruned = self.sparsity is not None and self.pruner != "magnitude"
        return static or pruned or transform != NO_TRANSFORM or (method is not None and method.needs_statistics)

    @property
    def needs_reference(self) -> bool:
        """Whether the float model has to run beside the quantized one for this module."""
        method = METHODS.get(self.method)
        return method is not None and method.needs_reference

    def __str__(self) -> str:
        parts = [f"{Scheme(self.spec, self.inputs)} by {self.method}"]
        parts += [f"with ordering {self.ordering}"] if self.ordering else []
        parts += [f"after {self.transform}"] if self.transform else []
        parts += [f"{self.sparsity} pruned by {self.pruner}"] if self.sparsity else []
        return " ".join(parts)


def resolve(
    recipe: Recipe,
    modules: Mapping[str, tuple[int, int]],
    fused_groups: Iterable[Sequence[str]] = (),
    *,
    methods: Collection[str] | None = None,
) -> dict[str, ModulePlan | None]:
    """The plan of each module, None for those left dense, in the order of ``modules``.

    ``modules`` maps full checkpoint names to ``(out_features, in_features)``; ``fused_groups`` names the modules that
    engines fuse into one matrix (q, k, v; gate, up), which must agree; ``methods`` are the known ones. Raises
    :class:`UsageError` for a rule that no module matches, an unknown method, a format that cannot be, shards that
    disagree, and a recipe that quantizes nothing.
    """
    for rule in recipe.rules:
        _check_rule(rule, modules)
    plan: dict[str, ModulePlan | None] = {}
    for name, (_, in_features) in modules.items():
        plan[name] = _plan_module(recipe, name)
        entry = plan[name]
        if entry is None:
            continue
        if methods is not None and entry.method not in methods:
            raise UsageError(f"{name}: unknown method {entry.method!r}{suggestion(entry.method, methods)}")
        if not isinstance(entry.spec, CodebookSpec) and entry.spec.group_size > in_features:
            raise UsageError(
                f"{name}: group size {entry.spec.group_size} exceeds its {in_features} input features: "
                f"use at most {in_features}, or -1 (one scale per row)"
            )
    for group in fused_groups:
        _check_fused([name for name in group if name in plan], plan)
    if not any(plan.values()):
        raise UsageError("the recipe quantizes no module: every one is skipped or left dense by default")
    return plan


def _plan_module(recipe: Recipe, name: str) -> ModulePlan | None:
    rule = next((rule for rule in recipe.rules if rule.matches(name)), None)
    if rule is None and _DENSE.fullmatch(name):
        return None
    scheme, method, ordering, transform = recipe.quantization, recipe.method, recipe.ordering, recipe.transform
    if rule is not None:
        if rule.skip:
            return None
        try:
            scheme = scheme if rule.scheme is None else parse_scheme(rule.scheme)
            scheme = scheme.changed(rule.bits, rule.group_size, rule.symmetric)
        except UsageError as error:
            raise UsageError(f"rule {rule.pattern!r} for {name}: {error}") from error
        method, ordering = rule.method or method, rule.ordering or ordering
        transform = rule.transform or transform
    return ModulePlan(scheme.weights, method, ordering, scheme.inputs, transform, recipe.sparsity, recipe.pruner)


def _check_rule(rule: Rule, modules: Mapping[str, tuple[int, int]]) -> None:
    """A rule without effect is a mistake that would cost a run: say so before it."""
    if any(rule.matches(name) for name in modules):
        return
    if rule.skip and any(rule.matches(name) for name in _ALWAYS_KNOWN):
        return
    inside = sum(re.search(rule.pattern, name) is not None for name in modules)
    if inside:
        hint = f"patterns start at the beginning of the full name: '.*{rule.pattern}' would match {inside}"
    else:
        close = difflib.get_close_matches(rule.pattern, modules, n=1, cutoff=0.0)
        hint = f"names look like {close[0]!r}" if close else "the model has no linear modules"
    raise UsageError(f"rule {rule.pattern!r} matches no module: {hint}")


def _check_fused(group: Sequence[str], plan: Mapping[str, ModulePlan | None]) -> None:
    if len({plan[name] for name in group}) <= 1:
        return
    told = ", ".join(f"{name} ({plan[name] or 'dense'})" for name in group)
    raise UsageError(f"engines fuse these modules into one, so they must be quantized alike: {told}: widen the rule")
