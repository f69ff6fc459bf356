"""A model's hyperparameters: ``config.json`` to llama.cpp's keys and back, by the tables of the families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lowbit.codecs.gguf.explicit_config import explicit_config
from lowbit.codecs.gguf.families import FAMILIES, Family
from lowbit.codecs.gguf.metadata import MetadataValue, Value
from lowbit.codecs.gguf.orders import Heads
from lowbit.codecs.gguf.rope import Rope, rope_from_metadata, rope_to_metadata, shortest
from lowbit.errors import CheckpointError, UnsupportedError

__all__ = ["config_from_metadata", "full_config", "head_size", "heads_of", "metadata_of", "objections"]

_QUANTIZATION = ("quantization_config", "compression_config")
_POSITIONS = "max_position_embeddings"
_WINDOW_PERIOD = {"gemma2": 2, "gemma3_text": 6}
"""Every how many layers llama.cpp expects one without a sliding window."""
_LARGEST = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the size that scales attention by the width per head instead of the head's."""


def full_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The text model's config with every default that matters filled in, by transformers unless there is none.

    Raises :class:`UnsupportedError` for an architecture that transformers or GGUF does not know,
    :class:`CheckpointError` naming ``where`` for a contradictory config.
    """
    if (explicit := explicit_config(config)) is not None:
        return explicit
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    values = {key: value for key, value in config.items() if key not in (*_QUANTIZATION, "model_type")}
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{where}: model_type is missing")
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedError(f"{where}: unknown architecture {model_type!r:.80}", [_known()])
    try:
        found: dict[str, Any] = AutoConfig.for_model(model_type, **values).get_text_config().to_dict()
    except (StrictDataclassError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: config.json: {' '.join(str(error).split())[:300]}") from error
    if found.get("model_type") not in FAMILIES:
        raise UnsupportedError(f"{where}: GGUF files of {found.get('model_type')!r} models cannot be made", [_known()])
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"):
        value = found.get(name)
        if value is not None and (type(value) is not int or not 0 < value < 2**31):
            raise CheckpointError(f"{where}: config.json: {name} must be a positive whole number, not {value!r:.80}")
    return found


def _known() -> str:
    return f"lowbit writes GGUF for {', '.join(FAMILIES)}"


def head_size(config: Mapping[str, Any]) -> int:
    """Features of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _rotated(family: Family, config: Mapping[str, Any]) -> int:
    parameters = config.get("rope_parameters") or {}
    part = parameters.get("partial_rotary_factor", 1.0) if family.partial_rotary else 1.0
    return int(head_size(config) * part)


def heads_of(config: Mapping[str, Any]) -> Heads:
    """What the order of rows depends on."""
    queries = config["num_attention_heads"]
    return Heads(
        queries=queries,
        keys=config.get("num_key_value_heads") or queries,
        size=head_size(config),
        positions=config.get(_POSITIONS) or 0,
        first_position=_first_position(config),
    )


def _first_position(config: Mapping[str, Any]) -> int:
    """RoBERTa counts positions from the one after padding's."""
    return int(config.get("pad_token_id") or 0) + 1 if config["model_type"] in ("roberta", "xlm-roberta") else 0


def objections(family: Family, config: Mapping[str, Any]) -> list[str]:
    """Reasons why llama.cpp would compute something else than transformers for this config."""
    reasons = []
    size, heads, hidden = head_size(config), config["num_attention_heads"], config["hidden_size"]
    activation = config.get("hidden_activation") or config.get("hidden_act")
    if activation not in family.activations:
        reasons.append(f"llama.cpp computes {family.activations[0]} in {family.architecture}, not {activation}")
    if family.square and size * heads != hidden:
        reasons.append(f"llama.cpp wants {heads} heads of {size} to be the hidden size, which is {hidden}")
    if size % 2:
        reasons.append(f"heads of {size} features cannot be rotated in pairs")
    for name, value in family.constants.items():
        if config.get(name, value) != value:
            reasons.append(f"llama.cpp takes {name} to be {value}, it is {config[name]}")
    partial = (config.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
    if partial != 1.0 and not family.partial_rotary:
        reasons.append("llama.cpp rotates the whole head in this architecture, the model a part of it")
    if config.get("use_bidirectional_attention"):
        reasons.append("llama.cpp computes causal attention in this architecture")
    if (scalar := config.get("query_pre_attn_scalar")) is not None:
        expected = _attention_scalar(config)
        if scalar != expected:
            reasons.append(f"llama.cpp scales attention by {expected}, the model by {scalar} (query_pre_attn_scalar)")
    return reasons


def metadata_of(family: Family, config: Mapping[str, Any], vocabulary: int) -> tuple[dict[str, MetadataValue], Rope]:
    """llama.cpp's keys, with the architecture's name, for a full config, and its rotary embedding.

    Raises :class:`CheckpointError` for a field that is missing or no number.
    """
    values: dict[str, MetadataValue] = {}
    for field in family.fields:
        value = next((config[name] for name in field.hf if config.get(name) is not None), None)
        if field.hf == ("head_dim",):
            value = head_size(config)
        elif field.hf == ("num_key_value_heads",):
            value = heads_of(config).keys
        elif field.hf == (_POSITIONS,) and value is not None:
            value -= _first_position(config)
        if value is None and not field.required:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(f"config.json: {field.hf[0]} must be a number, not {value!r:.80}")
        values[field.gguf] = field.kind(value)
    values["vocab_size"] = vocabulary
    rope = Rope()
    if family.output == "none":
        values["attention.causal"] = False
    else:
        rope = rope_to_metadata(config, _rotated(family, config))
        values.update(rope.metadata)
    if family.model_type == "gpt_neox":
        values["use_parallel_residual"] = bool(config.get("use_parallel_residual", True))
    if family.model_type == "phi3":
        values.setdefault("attention.sliding_window", 0)  # llama.cpp tells Phi-4 by it
    if family.sliding:
        values.update(_sliding(config))
    return {f"{family.architecture}.{key}": value for key, value in values.items()}, rope


def _attention_scalar(config: Mapping[str, Any]) -> int:
    """What llama.cpp divides the squared attention scores of Gemma 2 and 3 by."""
    if config["num_hidden_layers"] == _LARGEST[config["model_type"]]:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return head_size(config)


def _sliding(config: Mapping[str, Any]) -> dict[str, MetadataValue]:
    """Which layers see a window only, where that is not what llama.cpp assumes for the architecture."""
    types = config.get("layer_types") or []
    local = [kind == "sliding_attention" for kind in types]
    period = _WINDOW_PERIOD[config["model_type"]]
    if local == [(index + 1) % period != 0 for index in range(len(local))]:
        return {}
    return {"attention.sliding_window_pattern": local}


def config_from_metadata(
    family: Family,
    metadata: Mapping[str, Value],
    rope_tensors: Mapping[str, torch.Tensor],
    *,
    vocabulary: int,
    where: str,
) -> dict[str, Any]:
    """A ``config.json`` for the model that ``metadata`` describes; ``vocabulary`` is the embedding's number of rows.

    Raises :class:`CheckpointError` naming ``where`` for a key that is missing or no number.
    """
    prefix = f"{family.architecture}."
    own = {key[len(prefix) :]: value for key, value in metadata.items() if key.startswith(prefix)}
    config: dict[str, Any] = {"architectures": [family.model_class], "model_type": family.model_type}
    for field in family.fields:
        value = own.get(field.gguf)
        if value is None and field.hf[0] in ("head_dim", "num_key_value_heads"):
            continue
        if value is None and not field.required:
            config[field.hf[0]] = None
            continue
        kinds = (int,) if field.kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 <= value < 2**31:
            raise CheckpointError(f"{where}: metadata {prefix}{field.gguf} must be a number, not {value!r:.80}")
        config[field.hf[0]] = value if field.kind is int else shortest(value)
    for name in ("num_attention_heads", "hidden_size", "num_hidden_layers"):
        if config[name] < 1:
            raise CheckpointError(f"{where}: {name} must be positive")
    config["vocab_size"] = vocabulary
    config |= dict(family.constants)
    config["hidden_act"] = family.activations[0]
    if family.architecture in ("gptneox", "bert"):
        config["hidden_act"] = "gelu"
    _special_tokens(config, metadata)
    if family.output == "none":
        config["max_position_embeddings"] += _first_position(config)
        return config
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    if family.square and head_size(config) * config["num_attention_heads"] != config["hidden_size"]:
        raise UnsupportedError(f"{where}: heads of {head_size(config)} features, which {family.model_type} cannot have")
    _rope_config(family, config, own, rope_tensors)
    if family.model_type == "gpt_neox":
        config["use_parallel_residual"] = own.get("use_parallel_residual", True) is True
        config["rotary_pct"] = config["partial_rotary_factor"]
        del config["num_key_value_heads"]
    if family.square:
        config.pop("head_dim", None)
    if family.sliding:
        _layer_types(config, own, where)
    if family.model_type == "phi3" and not config.get("sliding_window"):
        config["sliding_window"] = None
    return config


def _rope_config(
    family: Family, config: dict[str, Any], own: Mapping[str, Value], tensors: Mapping[str, torch.Tensor]
) -> None:
    size = head_size(config)
    rotated = own.get("rope.dimension_count", size)
    if isinstance(rotated, bool) or not isinstance(rotated, int) or not 0 < rotated <= size:
        raise CheckpointError(f"metadata rope.dimension_count must be 1 to {size}, not {rotated!r:.80}")
    full, local = rope_from_metadata(own, tensors, config[_POSITIONS], rotated)
    if family.partial_rotary:
        full["partial_rotary_factor"] = rotated / size
        config["partial_rotary_factor"] = rotated / size
    elif rotated != size:
        raise UnsupportedError(f"{rotated} of a head's {size} features are rotated, which {family.model_type} cannot")
    if family.model_type == "phi3" and "original_max_position_embeddings" in full:
        config["original_max_position_embeddings"] = full["original_max_position_embeddings"]
    if family.model_type == "gemma3_text":
        config["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
        return
    config["rope_parameters"] = full
    config["rope_theta"] = full["rope_theta"]  # where readers of older releases look


def _layer_types(config: dict[str, Any], own: Mapping[str, Value], where: str) -> None:
    layers = config["num_hidden_layers"]
    period: Value = own.get("attention.sliding_window_pattern", _WINDOW_PERIOD[config["model_type"]])
    if isinstance(period, int) and period > 0:
        local = [(index + 1) % period != 0 for index in range(layers)]
    elif isinstance(period, list) and len(period) >= layers:
        local = [bool(value) for value in period[:layers]]
    else:
        raise CheckpointError(f"{where}: sliding_window_pattern must be a number or one value per layer")
    if not config.get("sliding_window"):
        local = [False] * layers
    config["layer_types"] = ["sliding_attention" if here else "full_attention" for here in local]
    config |= {"query_pre_attn_scalar": _attention_scalar(config), "hidden_activation": config.pop("hidden_act")}


def _special_tokens(config: dict[str, Any], metadata: Mapping[str, Value]) -> None:
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        usable = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < config["vocab_size"]
        config[f"{name}_token_id"] = value if usable else None
