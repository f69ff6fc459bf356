"""Configs that need no defaults: what most decoders' ``config.json`` says is all that a GGUF file asks for.

Filling in defaults is transformers' business, and importing its configuration classes costs more time than copying a
small model. Where a config says everything itself, in the plain forms below, the result for GGUF is the same without.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["explicit_config"]

_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
_REQUIRED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "llama": (),
        "mistral": ("sliding_window",),
        "mixtral": ("sliding_window", "num_local_experts", "num_experts_per_tok"),
        "qwen2": (),
        "qwen3": ("head_dim",),
    }
)
"""Model types whose defaults are known to be of no consequence where these keys, and the shared ones, are there."""
_ELSEWHERE = ("text_config", "partial_rotary_factor", "use_bidirectional_attention", "layer_types")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def explicit_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """``config`` with ``rope_parameters`` in transformers' current form, or None if transformers must complete it.

    None too for anything unusual or contradictory, which transformers explains better.
    """
    required = _REQUIRED.get(str(config.get("model_type")))
    if required is None or any(name in config for name in _ELSEWHERE) or config.get("use_sliding_window"):
        return None
    if not all(name in config for name in required) or not all(_is_count(config.get(name)) for name in _COUNTS):
        return None
    heads, head_dim = config["num_attention_heads"], config.get("head_dim")
    if head_dim is None:
        if config["hidden_size"] % heads:
            return None
    elif not _is_count(head_dim):
        return None
    usual = isinstance(config.get("hidden_act"), str) and isinstance(config.get("tie_word_embeddings"), bool)
    rope = _rope_parameters(config)
    if not usual or not _is_positive(config.get("rms_norm_eps")) or rope is None:
        return None
    return {**config, "rope_parameters": rope, "sliding_window": _window(config)}


def _window(config: Mapping[str, Any]) -> int | None:
    return None if str(config["model_type"]).startswith("qwen") else config.get("sliding_window")


def _rope_parameters(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of a config of transformers 5 as they are, of an older one put together from its two keys."""
    found = config.get("rope_parameters")
    if found is None:
        scaling = config.get("rope_scaling")
        if scaling is not None and not isinstance(scaling, Mapping):
            return None
        found = {"rope_type": "default", **(scaling or {}), "rope_theta": config.get("rope_theta")}
    if not isinstance(found, Mapping) or "type" in found or not _is_positive(found.get("rope_theta")):
        return None
    kind = found.get("rope_type")
    needed = {"default": (), "llama3": _LLAMA3}.get(str(kind))
    if needed is None or set(found) != {"rope_type", "rope_theta", *needed}:
        return None
    return dict(found) if all(_is_positive(found[name]) for name in needed) else None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 2**63  # type: ignore[operator]
