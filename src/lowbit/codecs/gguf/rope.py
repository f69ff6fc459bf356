"""Rotary position embedding: what transformers' ``rope_parameters`` say, in llama.cpp's keys and back.

llama.cpp scales positions (``linear``), blends (``yarn``), or divides each frequency by a stored factor: ``rope_freqs``
for Llama 3, ``rope_factors_long`` and ``rope_factors_short`` for LongRoPE (``src/llama-model.cpp``, ``load_hparams``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lowbit.codecs.gguf.metadata import MetadataValue, Value
from lowbit.errors import CheckpointError, UnsupportedError

__all__ = ["Rope", "rope_from_metadata", "rope_to_metadata", "shortest"]

DEFAULT_BASE = 10000.0
_LLAMA3_CONTEXT = 8192
_TOLERANCE = 1e-4
_YARN_TURNS: Mapping[str, float] = {"beta_fast": 32.0, "beta_slow": 1.0}
"""Turns within the trained context between which yarn blends; llama.cpp reads no others in these architectures."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Keys (after the architecture's name) and the float32 tensors by their GGUF names, that make up an embedding."""

    metadata: dict[str, MetadataValue] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def rope_to_metadata(config: Mapping[str, Any], rotated: int) -> Rope:
    """llama.cpp's keys for a full transformers config; ``rotated`` counts the features of a head that are rotated.

    Raises :class:`UnsupportedError` for a kind that llama.cpp does not compute.
    """
    parameters = config.get("rope_parameters") or {}
    local = parameters.get("sliding_attention")
    parameters = parameters.get("full_attention", parameters)
    base = _real(parameters, "rope_theta", DEFAULT_BASE)
    found = Rope({"rope.dimension_count": rotated, "rope.freq_base": base})
    if local is not None:
        if local.get("rope_type", "default") != "default":
            raise UnsupportedError("llama.cpp does not scale the rotary embedding of sliding-window layers")
        found.metadata["rope.freq_base_swa"] = _real(local, "rope_theta", DEFAULT_BASE)
    kind = parameters.get("rope_type", "default")
    if kind == "linear":
        found.metadata.update({"rope.scaling.type": "linear", "rope.scaling.factor": _real(parameters, "factor")})
    elif kind == "yarn":
        found.metadata.update(_yarn(config, parameters))
    elif kind == "llama3":
        found.tensors["rope_freqs.weight"] = _llama3_factors(parameters, base, rotated)
    elif kind == "longrope":
        _longrope(config, parameters, found)
    elif kind not in ("default", "dynamic"):  # dynamic begins to differ beyond the trained context
        raise UnsupportedError(
            f"rotary embedding of type {kind!r} has no counterpart in GGUF",
            ["default, linear, dynamic, yarn, llama3 and longrope have"],
        )
    return found


def _real(parameters: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number of ``rope_parameters``; one that is missing, null or 0 is ``default``."""
    value = parameters.get(key) or default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2**63:
        raise CheckpointError(f"config.json: rope {key} must be a positive number, not {value!r:.80}")
    return float(value)


def _yarn(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, MetadataValue]:
    if parameters.get("truncate") is False:
        raise UnsupportedError("llama.cpp rounds the range that yarn blends over, this model does not (truncate)")
    blended = tuple(_real(parameters, key, usual) for key, usual in _YARN_TURNS.items())
    if blended != tuple(_YARN_TURNS.values()):
        raise UnsupportedError(f"llama.cpp blends yarn between 32 turns and 1, this model between {blended}")
    original = _original(config, parameters)
    factor = _real(parameters, "factor", config["max_position_embeddings"] / original)
    usual = wanted = _magnitude(factor)
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        wanted = _magnitude(factor, _real(parameters, "mscale")) / _magnitude(
            factor, _real(parameters, "mscale_all_dim")
        )
    wanted = _real(parameters, "attention_factor", wanted)
    found: dict[str, MetadataValue] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
    }
    if wanted != usual:
        found["rope.scaling.attn_factor"] = float(wanted / usual)
    return found


def _original(config: Mapping[str, Any], parameters: Mapping[str, Any]) -> int:
    """The context length before it was extended, in tokens."""
    value = _real(parameters, "original_max_position_embeddings", config["max_position_embeddings"])
    return max(1, int(value))


def _magnitude(factor: float, scale: float = 1.0) -> float:
    """How much yarn scales rotated features (equation 22 of its paper)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _long_magnitude(factor: float, original: int) -> float:
    """How much LongRoPE scales rotated features where the model does not say."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 < original else 1.0


def _llama3_factors(parameters: Mapping[str, Any], base: float, rotated: int) -> torch.Tensor:
    """What Llama 3.1 divides each frequency by, float32 ``[rotated / 2]``: 1 for short waves, ``factor`` for long."""
    context = _real(parameters, "original_max_position_embeddings", _LLAMA3_CONTEXT)
    low, high = _real(parameters, "low_freq_factor", 1.0), _real(parameters, "high_freq_factor", 4.0)
    factor = _real(parameters, "factor", 8.0)
    if high == low:
        raise CheckpointError("config.json: rope low_freq_factor and high_freq_factor must differ")
    turns = context * _frequencies(base, rotated) / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - kept) / factor + kept)).float()


def _frequencies(base: float, rotated: int) -> torch.Tensor:
    """Angle per position of each pair of features, float64."""
    return base ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)


def _longrope(config: Mapping[str, Any], parameters: Mapping[str, Any], found: Rope) -> None:
    original = _original(config, parameters)
    factor = _real(parameters, "factor", config["max_position_embeddings"] / original)
    found.metadata["rope.scaling.type"] = "longrope"
    found.metadata["rope.scaling.original_context_length"] = original
    found.metadata["rope.scaling.attn_factor"] = _real(
        parameters, "attention_factor", _long_magnitude(factor, original)
    )
    for kind in ("long", "short"):
        factors = parameters.get(f"{kind}_factor")
        if not isinstance(factors, list) or not all(type(value) in (int, float) and value > 0 for value in factors):
            raise CheckpointError(f"config.json: rope {kind}_factor must be a list of positive numbers")
        if len(factors) * 2 != found.metadata["rope.dimension_count"]:
            raise CheckpointError(f"config.json: rope {kind}_factor has {len(factors)} numbers, not one per pair")
        found.tensors[f"rope_factors_{kind}.weight"] = torch.tensor(factors, dtype=torch.float32)


def rope_from_metadata(
    metadata: Mapping[str, Value], tensors: Mapping[str, torch.Tensor], context: int, rotated: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``rope_parameters`` of full attention, and of sliding-window layers (empty where they have none of their own).

    ``metadata`` has its keys without the architecture's name, ``tensors`` are those of :class:`Rope`. Raises
    :class:`UnsupportedError` for frequency factors that no kind of transformers' gives.
    """
    base = _number(metadata, "rope.freq_base", DEFAULT_BASE)
    full: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    factor = _number(metadata, "rope.scaling.factor", 0.0)
    original = int(_number(metadata, "rope.scaling.original_context_length", context))
    if original < 1:
        raise CheckpointError("metadata rope.scaling.original_context_length must be positive")
    scale = _number(metadata, "rope.scaling.attn_factor", 1.0)
    kind = metadata.get("rope.scaling.type", "linear")
    if "rope_factors_long.weight" in tensors and "rope_factors_short.weight" in tensors:
        full |= {"rope_type": "longrope", "original_max_position_embeddings": original}
        if not math.isclose(scale, _long_magnitude(context / original, original), rel_tol=1e-6):
            full["attention_factor"] = scale
        for name in ("long", "short"):
            full[f"{name}_factor"] = [shortest(v) for v in tensors[f"rope_factors_{name}.weight"].tolist()]
        full["factor"] = context / original
    elif "rope_freqs.weight" in tensors:
        full |= _llama3_parameters(tensors["rope_freqs.weight"].double(), base, rotated)
    elif kind == "yarn":
        full |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        if scale != 1.0:
            full["attention_factor"] = shortest(scale * _magnitude(factor))
    elif kind == "linear" and factor not in (0.0, 1.0):
        full |= {"rope_type": "linear", "factor": factor}
    elif kind not in ("linear", "none"):
        raise UnsupportedError(f"rotary embedding of type {kind!r} has no counterpart in transformers")
    local = {"rope_type": "default", "rope_theta": _number(metadata, "rope.freq_base_swa", DEFAULT_BASE)}
    return full, local


def _number(metadata: Mapping[str, Value], key: str, default: float) -> float:
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 2**31:
        raise CheckpointError(f"metadata {key} must be a number from 0, not {value!r:.80}")
    return shortest(value)


def shortest(value: float) -> float:
    """The shortest decimal that is stored as the same float32: what was written before it was rounded."""
    return float(str(np.float32(value)))


def _llama3_parameters(factors: torch.Tensor, base: float, rotated: int) -> dict[str, Any]:
    """The parameters that give these factors: the blended ones lie on a line over the frequency."""
    factor = float(factors.max())
    frequencies = _frequencies(base, rotated)
    low, high = 1.0, 4.0
    if len(factors) == len(frequencies) and factor > 1:
        kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
        blended = (kept > 1e-3) & (kept < 1 - 1e-3)
        if int(blended.sum()) >= 2:
            x, y = frequencies[blended] * _LLAMA3_CONTEXT / (2 * math.pi), kept[blended]
            slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
            low = _snapped(float(x.mean()) - float(y.mean()) / slope)
            high = _snapped(low + 1 / slope)
    found = {
        "rope_type": "llama3",
        "factor": _snapped(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }
    if len(factors) != len(frequencies) or not torch.allclose(
        _llama3_factors(found, base, rotated).double(), factors, rtol=_TOLERANCE
    ):
        raise UnsupportedError("the frequency factors (rope_freqs) are not those of Llama 3, which transformers knows")
    return found


def _snapped(value: float) -> float:
    nearest = round(value * 8) / 8
    return nearest if abs(value - nearest) < 1e-3 * max(1.0, abs(value)) else value
