"""How many bits a checkpoint spends on what: parameters and bytes by kind of module."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from lowbit.codecs.names import owner

_KINDS: Mapping[str, str] = {
    "embedding": r"(^|\.)(embed_tokens|embed_in|wte|wpe|embed_positions|word_embeddings|tok_embeddings|embeddings?)\.",
    "head": r"(^|\.)(lm_head|embed_out|output_projection)\.",
    "norm": r"(norm|ln_f|ln_\d|layernorm|layer_norm)[^.]*\.(weight|bias)$",
    "router": r"(^|\.)(router|gate|shared_expert_gate)\.",
    "experts": r"\.(experts|shared_experts?)\.",
    "attention": r"\.(self_attn|attn|attention|self_attention|linear_attn|mixer)\.",
    "mlp": r"\.(mlp|feed_forward|ffn|block_sparse_moe|fc\d)\.",
}
"""Kinds of tensors by their names; the first that matches counts."""
_RULES = {kind: re.compile(pattern) for kind, pattern in _KINDS.items()}
OTHER = "other"
LINEAR_KINDS = ("attention", "mlp", "experts")
"""Kinds that hold the linears one quantizes."""


class Stored(Protocol):
    """A tensor of a checkpoint, without its data."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the elements."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents, outermost first."""
        ...


class StoredWeight(Protocol):
    """A quantized weight, by its shape ``(out_features, in_features)``."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        ...


@dataclass(slots=True)
class Part:
    """Parameters, bytes and storage of one kind of module; ``formats`` counts parameters by storage format."""

    parameters: int = 0
    bytes: int = 0
    formats: dict[str, int] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per parameter, scales, zero points and indices counted."""
        return 8 * self.bytes / self.parameters if self.parameters else 0.0


@dataclass(frozen=True, slots=True)
class Footprint:
    """Sizes of a checkpoint: by kind of module, of the linear weights alone, and in all."""

    kinds: Mapping[str, Part]
    linear: Part
    total: Part


def kind_of(name: str) -> str:
    """The kind of the tensor ``name``: embedding, attention, mlp, experts, router, norm, head or other."""
    return next((kind for kind, rule in _RULES.items() if rule.search(name)), OTHER)


def measure(tensors: Mapping[str, Stored], plan: Mapping[str, StoredWeight]) -> Footprint:
    """Sizes from headers alone; ``plan`` says which modules are quantized.

    A quantized module's tensors other than its bias are together one weight. ``linear`` is the quantized weights, or
    all matrices of attention, MLP and experts where nothing is quantized.
    """
    kinds = {kind: Part() for kind in (*_KINDS, OTHER)}
    linear, total = Part(), Part()
    for module, stored in plan.items():
        parameters = stored.shape[0] * stored.shape[1]
        storage = str(getattr(stored, "spec", "quantized"))
        for part in (kinds[kind_of(f"{module}.weight")], linear, total):
            _count(part, parameters, 0, storage)
    for name, info in tensors.items():
        found = owner(name, plan)
        size = math.prod(info.shape)
        parts = [kinds[kind_of(name)], total]
        if found is not None and name != f"{found}.bias":
            for part in (*parts, linear):
                part.bytes += size * info.dtype.itemsize
            continue
        if not plan and len(info.shape) >= 2 and kind_of(name) in LINEAR_KINDS:
            parts.append(linear)
        for part in parts:
            _count(part, size, size * info.dtype.itemsize, str(info.dtype).removeprefix("torch."))
    return Footprint({kind: part for kind, part in kinds.items() if part.parameters}, linear, total)


def _count(part: Part, parameters: int, size: int, storage: str) -> None:
    part.parameters += parameters
    part.bytes += size
    part.formats[storage] = part.formats.get(storage, 0) + parameters
