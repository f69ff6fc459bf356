"""Calibrated FP8 scales of the key-value cache: measured while a model is quantized, stored, and simulated.

A cache in FP8 (E4M3) keeps ``key / k_scale`` and ``value / v_scale``, with one scale for a layer or one for each of
its key-value heads. Without calibrated scales engines take 1, which saturates large keys and wastes the range of small
ones. compressed-tensors stores ``k_scale`` and ``v_scale`` beside the attention's projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from lowbit.checkpoint import Checkpoint
from lowbit.errors import CheckpointError, UsageError
from lowbit.formats import ActivationSpec
from lowbit.formats.activations import static_scale
from lowbit.formats.floating import E4M3_MAX

__all__ = [
    "KV_CACHES",
    "CacheHook",
    "CacheRange",
    "KvScales",
    "cache_scheme",
    "check_kind",
    "intercepted_attention",
    "round_with_scales",
]

CacheHook: TypeAlias = Callable[[nn.Module, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""``(attention module, key, value) -> (key, value)``, both ``[batch, kv heads, length, head_dim]``, keys rotated."""

KV_CACHES: Mapping[str, str] = {"fp8": "tensor", "fp8-head": "attn_head"}
"""Caches that can be calibrated, by ``--kv-cache``, and the config's word for how many scales a layer has."""

_STATIC = ActivationSpec("e4m3", "tensor", dynamic=False)


@dataclass(frozen=True, slots=True)
class KvScales:
    """Scales of one layer, float32 ``[1]`` or ``[kv heads, 1, 1]``."""

    key: torch.Tensor
    value: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names that they are stored under, local to the attention module."""
        return {"k_scale": self.key, "v_scale": self.value}

    @classmethod
    def read(cls, checkpoint: Checkpoint, attention: str) -> KvScales | None:
        """The scales of the module ``attention``; None where there are none. :class:`CheckpointError` if damaged."""
        names = [f"{attention}.{local}" for local in ("k_scale", "v_scale")]
        if not all(name in checkpoint.tensors for name in names):
            return None
        found = [checkpoint.read(name).float() for name in names]
        for name, scale in zip(names, found, strict=True):
            if not bool(torch.isfinite(scale).all() & (scale > 0).all()):
                raise CheckpointError(f"{checkpoint.path}: tensor {name} must be positive and finite")
        return cls(*(scale.reshape(-1, 1, 1) if scale.numel() > 1 else scale.reshape(1) for scale in found))


class CacheRange:
    """The largest keys and values that one attention module has seen, by head and (for values) by channel."""

    def __init__(self) -> None:
        self._key: torch.Tensor | None = None
        self._value: torch.Tensor | None = None

    def note(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Count a batch; values that are not finite are left out."""
        self._key = _maximum(self._key, _largest(key, (0, 2)).amax(1))
        self._value = _maximum(self._value, _largest(value, (0, 2)))

    def join(self, other: CacheRange) -> None:
        """Count what ``other`` has counted."""
        if other._key is not None and other._value is not None:
            self._key, self._value = _maximum(self._key, other._key), _maximum(self._value, other._value)

    def scales(self, kind: str, divisor: torch.Tensor | None = None) -> KvScales | None:
        """The scales for a cache ``kind`` of :data:`KV_CACHES`; None before the first batch.

        ``divisor`` float32 ``[kv heads * head_dim]`` is what the values will be divided by in the checkpoint.
        """
        if self._key is None or self._value is None:
            return None
        value = self._value if divisor is None else self._value / divisor.to(self._value.device).view_as(self._value)
        by_head = (self._key, value.amax(1))
        if KV_CACHES[kind] == "tensor":
            return KvScales(*(static_scale(float(largest.max()), _STATIC) for largest in by_head))
        scales = [torch.cat([static_scale(float(one), _STATIC) for one in largest]) for largest in by_head]
        return KvScales(*(scale.reshape(-1, 1, 1) for scale in scales))


def round_with_scales(vectors: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``vectors`` ``[batch, kv heads, length, head_dim]`` as an FP8 cache with ``scale`` gives them back."""
    step = scale.to(vectors.device)
    stored = (vectors.float() / step).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (stored.float() * step).to(vectors.dtype)


def cache_scheme(kind: str) -> dict[str, Any]:
    """``kv_cache_scheme`` of compressed-tensors for a cache ``kind`` of :data:`KV_CACHES`."""
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": KV_CACHES[kind], "dynamic": False}


def check_kind(kind: str) -> None:
    """Raise :class:`UsageError` unless ``kind`` is one of :data:`KV_CACHES`."""
    if kind not in KV_CACHES:
        raise UsageError(f"--kv-cache {kind}: unknown: use {' or '.join(KV_CACHES)}")


@contextmanager
def intercepted_attention(hook: CacheHook) -> Iterator[None]:
    """Keys and values of all attention that goes through transformers' interface pass through ``hook``.

    Contexts must end in the reverse order of their beginnings; not for several threads at once.
    """
    from transformers.modeling_utils import AttentionInterface

    original = AttentionInterface.get_interface

    def get_interface(self: Any, *arguments: Any, **named: Any) -> Callable[..., Any]:
        attend = original(self, *arguments, **named)

        def through_cache(
            module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **others: Any
        ) -> Any:
            key, value = hook(module, key, value)
            return attend(module, query, key, value, *rest, **others)

        return through_cache

    AttentionInterface.get_interface = get_interface
    try:
        yield
    finally:
        AttentionInterface.get_interface = original


def _largest(vectors: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    magnitudes = vectors.detach().float().abs()
    return torch.where(torch.isfinite(magnitudes), magnitudes, 0.0).amax(dims)


def _maximum(known: torch.Tensor | None, found: torch.Tensor) -> torch.Tensor:
    return found if known is None else torch.maximum(known, found)
