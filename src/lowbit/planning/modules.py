"""Linear modules as planning sees them: a name, a shape and what is to become of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lowbit.formats import ActivationSpec, WeightSpec

_BLOCK = re.compile(r"(.*?\.\d+)\.|(\d+)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")
ROW_PARALLEL = ("o_proj", "out_proj", "down_proj", "fc2", "dense_4h_to_h", "dense", "wo", "w2", "c_proj")
"""Last names of linears that engines split along their inputs; all others are split along their outputs."""


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """A linear of ``shape`` (out_features, in_features), quantized to ``spec`` by ``method``, or dense for None.

    ``inputs`` is the format that its inputs are rounded to while a model runs (None: none).
    """

    name: str
    shape: tuple[int, int]
    spec: WeightSpec | None = None
    method: str = "rtn"
    inputs: ActivationSpec | None = None

    @property
    def block(self) -> str:
        """The prefix of the transformer block that this is part of; empty outside the blocks."""
        match = _BLOCK.match(self.name)
        return (match[1] or match[2]) if match else ""

    @property
    def last_name(self) -> str:
        """The module's own name, without its parents."""
        return self.name.rpartition(".")[2]

    @property
    def is_row_parallel(self) -> bool:
        """Whether engines split this module along its inputs."""
        return self.last_name in ROW_PARALLEL

    @property
    def is_expert(self) -> bool:
        """Whether this belongs to one routed expert of a mixture."""
        return _EXPERT.search(self.name) is not None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    def stored_bytes(self, dense_itemsize: int) -> int:
        """Bytes on disk; ``dense_itemsize`` bytes for each weight that stays dense."""
        if self.spec is None:
            return self.weights * dense_itemsize
        return -(-int(self.spec.bits_per_weight(*self.shape) * self.weights) // 8)


def by_block(modules: Iterable[PlannedModule]) -> dict[str, list[PlannedModule]]:
    """Modules by block, in order of appearance."""
    blocks: dict[str, list[PlannedModule]] = {}
    for module in modules:
        blocks.setdefault(module.block, []).append(module)
    return blocks


def by_input(modules: Sequence[PlannedModule], fused_groups: Iterable[Sequence[str]]) -> list[list[PlannedModule]]:
    """Modules that receive the same input: those in one of ``fused_groups`` together, every other one alone."""
    leader = {name: group[0] for group in fused_groups for name in group}
    inputs: dict[str, list[PlannedModule]] = {}
    for module in modules:
        inputs.setdefault(leader.get(module.name, module.name), []).append(module)
    return list(inputs.values())


def told(names: Sequence[str]) -> str:
    """One name, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
