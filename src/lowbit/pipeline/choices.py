"""What can be chosen for a module, and what measuring says of each choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

from lowbit.pipeline.architectures import fused_groups
from lowbit.quant import InputStatistics

__all__ = [
    "Candidate", "GroupSensitivity", "Grouping", "Measured", "OneInput", "Restorable", "Table",
    "group_from_json", "shared_choices",
]  # fmt: skip

Grouping: TypeAlias = Callable[[Sequence[str]], Sequence[tuple[str, ...]]]


class Restorable(Protocol):
    """A quantized weight: what candidates produce."""

    def dequantize(self) -> torch.Tensor:
        """float32 ``[out, in]``."""


@dataclass(frozen=True, slots=True)
class OneInput:
    """Linears that read one input, as a candidate gets them.

    ``weights``     float32 ``[out, in]`` by full module name
    ``statistics``  of the input; None where there are none (token tables)
    ``shared``      what the candidates of this input keep for each other
    ``scalable``    whether what produces the input can take up a scaling of its channels
    """

    weights: Mapping[str, torch.Tensor]
    statistics: InputStatistics | None = None
    shared: MutableMapping[Any, Any] | None = None
    scalable: bool = False


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to store a linear.

    ``solve``  the quantized weights, by name; called with those linears that have a size
    ``size``   ``(out_features, in_features) -> bytes``, None where that shape does not fit
    ``exact``  whether nothing is lost, so that nothing is solved or measured
    """

    name: str
    solve: Callable[[OneInput], Mapping[str, Restorable]]
    size: Callable[[int, int], int | None]
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A matrix outside the blocks: the module ``name``, its ``shape`` where it is stored, whether it ``embeds`` tokens,
    and whether it is the output ``head``. A tied one is both."""

    name: str
    shape: tuple[int, int]
    embeds: bool
    head: bool


@dataclass(frozen=True, slots=True)
class Measured:
    """A candidate in one group: the ``bytes`` it takes, the KL ``divergence`` it causes in nats per token, and the
    squared ``error`` of the modules' outputs as a share of these outputs (None where there are no inputs)."""

    bytes: int
    divergence: float
    error: float | None = None


@dataclass(frozen=True, slots=True)
class GroupSensitivity:
    """Modules that must share one choice, and what each candidate does to them."""

    modules: tuple[str, ...]
    weights: int
    candidates: Mapping[str, Measured]


def group_from_json(entry: Mapping[str, Any]) -> GroupSensitivity:
    """The group whose ``asdict`` ``entry`` is; KeyError, TypeError or ValueError where it is none."""
    candidates = {name: Measured(**values) for name, values in entry["candidates"].items()}
    return GroupSensitivity(tuple(entry["modules"]), int(entry["weights"]), candidates)


def shared_choices(names: Sequence[str]) -> list[tuple[str, ...]]:
    """The modules (full names) cut into groups that engines want alike, in order.

    Fused shards (query, key, value; gate, up) go together, and so do all experts of a block.
    """
    group_of: dict[str, tuple[str, ...]] = {name: group for group in fused_groups(list(names)) for name in group}
    experts: dict[str, list[str]] = {}
    for name in names:
        if ".experts." in name:
            experts.setdefault(name.partition(".experts.")[0], []).append(name)
    group_of |= {name: tuple(together) for together in experts.values() for name in together}
    return list(dict.fromkeys(group_of.get(name, (name,)) for name in names))
