"""A model at one precision, as its headers would tell it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from lowbit.planning import PlannedModule
from lowbit.sizing.headers import tensor_kind


@dataclass(frozen=True, slots=True)
class Variant:
    """A model at one precision.

    ``bits``          nominal bits per weight, as rules of thumb take them
    ``files``         weight file to its bytes; ``exact`` says that they are so to the byte
    ``tensors``       stored tensor to its bytes; ``kinds`` sums them by kind of module
    ``modules``       the linears as planning sees them
    ``problem``       why it cannot be made or loaded, else empty
    ``repacked``      bytes that llama.cpp keeps twice on this CPU
    """

    name: str
    format: str
    bits: float
    files: Mapping[str, int] = field(default_factory=dict)
    tensors: Mapping[str, int] = field(default_factory=dict)
    modules: tuple[PlannedModule, ...] = ()
    exact: bool = True
    problem: str = ""
    repacked: int = 0

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(self.files.values())

    @property
    def data(self) -> int:
        """Bytes of the tensors."""
        return sum(self.tensors.values())

    @property
    def kinds(self) -> dict[str, int]:
        """Bytes by kind of module, in the order of a picture; kinds without any are left out."""
        found: defaultdict[str, int] = defaultdict(int)
        for name, size in self.tensors.items():
            found[tensor_kind(name)] += size
        return {kind: found[kind] for kind in KINDS if found[kind]}


KINDS = ("embedding", "attention", "mlp", "experts", "router", "norm", "encoder", "head", "other")
"""Kinds of modules in the order of a picture."""
