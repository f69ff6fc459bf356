"""Which tensor-parallel degrees a quantized model will load with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowbit.planning.modules import PlannedModule

DEGREES = (2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """``workable`` degrees, 1 among them; ``obstacles`` gives the first reason against each other degree."""

    workable: tuple[int, ...]
    obstacles: dict[int, str]

    @property
    def largest(self) -> int:
        """The largest workable degree."""
        return self.workable[-1]


def tensor_parallel(
    modules: Sequence[PlannedModule], heads: int, kv_heads: int, degrees: Sequence[int] = DEGREES
) -> ParallelPlan:
    """Try each degree: heads, whole groups in each shard of row-parallel layers, whole packed words in every shard.

    Groups cut by a shard are the one misfit that engines cannot repair, and it only shows when they load the model.
    """
    obstacles = {}
    for degree in degrees:
        if reason := _obstacle(modules, heads, kv_heads, degree):
            obstacles[degree] = reason
    return ParallelPlan((1, *(d for d in degrees if d not in obstacles)), obstacles)


def _obstacle(modules: Sequence[PlannedModule], heads: int, kv_heads: int, degree: int) -> str | None:
    if heads % degree:
        return f"{heads} attention heads are not divisible by {degree}"
    if kv_heads % degree and degree % kv_heads:
        return f"{kv_heads} key-value heads neither divide {degree} nor are divisible by it"
    for module in modules:
        if module.spec is None:
            continue
        if reason := _split(module, degree, replicated=kv_heads < degree and module.last_name in ("k_proj", "v_proj")):
            return f"{module.name}: {reason}"
    return None


def _split(module: PlannedModule, degree: int, *, replicated: bool) -> str | None:
    """Why a quantized module cannot be split ``degree`` ways, or None."""
    assert module.spec is not None  # callers look at quantized modules only
    out_features, in_features = module.shape
    size = module.spec.group_size
    if module.is_row_parallel:
        if in_features % degree:
            return f"{in_features} input features are not divisible by {degree}"
        shard = in_features // degree
        if size > 0 and shard % size:
            return f"a shard of {shard} input features holds no whole groups of {size}"
        return _words(shard, module.spec.bits, "input")
    if replicated:
        return None
    if out_features % degree:
        return f"{out_features} output features are not divisible by {degree}"
    return _words(out_features // degree, module.spec.bits, "output")


def _words(features: int, bits: int, side: str) -> str | None:
    return None if features * bits % 32 == 0 else f"a shard of {features} {side} features holds no whole 32-bit words"
