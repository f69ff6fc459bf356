"""Key-value caches that an evaluation can simulate, by the names of ``--kv-dtype``.

What each does to keys and values is exact in value; the order of an engine's products is its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import nn

from lowbit.errors import UsageError
from lowbit.formats import ActivationSpec, fake_quantize
from lowbit.pipeline.kv_cache import SIMULATED, CacheFormat
from lowbit.pipeline.kv_scales import CacheHook, KvScales, intercepted_attention, round_with_scales
from lowbit.pipeline.streamed import StreamedModel

__all__ = ["CACHE_HOOKS", "model_cache", "parse_cache"]

_ALIASES = {"int8": "int8_per_token_head", "fp8_e4m3": "fp8"}
_ONE = KvScales(torch.ones(1), torch.ones(1))


def _fp8(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 with the checkpoint's scales, or 1 where it has none, as vLLM's ``fp8``."""
    scales = getattr(module, "cache_scales", None) or _ONE
    return round_with_scales(key, scales.key), round_with_scales(value, scales.value)


def _per_token_head(element: Literal["int8", "e4m3"]) -> CacheHook:
    """A scale for every token and head, found as they are written, as vLLM's ``*_per_token_head``."""
    spec = ActivationSpec(element)
    return lambda module, key, value: (fake_quantize(key, spec), fake_quantize(value, spec))


def _blocks(entry: CacheFormat) -> CacheHook:
    """A cache of llama.cpp."""

    def hook(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if key.shape[-1] % entry.multiple or value.shape[-1] % entry.multiple:
            raise UsageError(f"--kv-dtype {entry.name}: heads of {key.shape[-1]} are no multiple of {entry.multiple}")
        return entry.key(key), entry.value(value)

    return hook


CACHE_HOOKS: Mapping[str, CacheHook] = {
    "fp8": _fp8,
    "fp8_per_token_head": _per_token_head("e4m3"),
    "int8_per_token_head": _per_token_head("int8"),
    **{name: _blocks(entry) for name, entry in SIMULATED.items() if name != "fp8"},
}
"""What happens to keys and values on their way through each cache."""


def parse_cache(name: str) -> str:
    """The cache called ``name`` (``int8`` is ``int8_per_token_head``); :class:`UsageError` naming those there are."""
    found = _ALIASES.get(name.lower(), name.lower())
    if found not in CACHE_HOOKS and found != "auto":
        close = difflib.get_close_matches(found, CACHE_HOOKS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of auto, {', '.join(CACHE_HOOKS)}"
        raise UsageError(f"--kv-dtype {name}: cannot be simulated: {hint}")
    return found


def model_cache(model: StreamedModel, name: str = "auto") -> AbstractContextManager[None]:
    """While it lasts, attention sees keys and values as the cache ``name`` gives them back.

    ``auto`` is what an engine does by itself: FP8 where the checkpoint brings scales for it, else the model's dtype.
    """
    if name == "auto":
        config = model.checkpoint.quantization_config or {}
        return intercepted_attention(_fp8) if config.get("kv_cache_scheme") else nullcontext()
    return intercepted_attention(CACHE_HOOKS[name])
