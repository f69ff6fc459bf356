"""Configs that are complete as they stand: GGUF gets from them what it gets from transformers' completed ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit.codecs.gguf import hyperparameters
from lowbit.codecs.gguf.explicit_config import explicit_config
from lowbit.codecs.gguf.families import FAMILIES

CONFIGS = sorted((Path(__file__).parents[2] / "data" / "configs").glob("*.json"))
DECODERS = ("llama", "mistral", "mixtral", "qwen2", "qwen3")


def decoder(model_type: str, /, **changes: Any) -> dict[str, Any]:
    """What a decoder's ``config.json`` usually says."""
    config: dict[str, Any] = {
        "model_type": model_type, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512,
        "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2, "vocab_size": 320,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": False, "head_dim": 16,
        "sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    return config | changes


def for_gguf(config: dict[str, Any], completed: dict[str, Any]) -> tuple[Any, ...]:
    """All that a file is made of."""
    family = FAMILIES[completed["model_type"]]
    metadata, rope = hyperparameters.metadata_of(family, completed, 320)
    tensors = {name: values.tolist() for name, values in rope.tensors.items()}
    ends = [completed.get(key) for key in ("tie_word_embeddings", "num_hidden_layers", "sliding_window")]
    return metadata, tensors, hyperparameters.heads_of(completed), hyperparameters.objections(family, completed), ends


def both(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with transformers' completion."""
    own = explicit_config(config)
    assert own is not None
    with monkeypatch.context() as patch:
        patch.setattr(hyperparameters, "explicit_config", lambda config: None)
        theirs = hyperparameters.full_config(config, "model")
    assert for_gguf(config, own) == for_gguf(config, theirs)
    assert hyperparameters.full_config(config, "model") == own


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "sliding_window": 128, "quantization_config": {}},
        {
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ],
    ids=["plain", "rope_parameters", "tied", "llama3"],
)  # fmt: skip
def test_the_same_as_with_transformers(
    model_type: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    both(decoder(model_type, **changes), monkeypatch)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "mixtral", "qwen2"])
def test_heads_whose_size_follows(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = decoder(model_type)
    del config["head_dim"]
    both(config, monkeypatch)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_published_configs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads(path.read_text())
    if explicit_config(config) is None:
        assert config["model_type"] not in DECODERS or "rope_theta" not in config
    else:
        both(config, monkeypatch)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gemma2"},
        {"hidden_size": "64"},
        {"num_attention_heads": 0},
        {"head_dim": None, "num_attention_heads": 5},
        {"hidden_act": None},
        {"tie_word_embeddings": None},
        {"partial_rotary_factor": 0.5},
        {"rope_theta": None},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        {"rope_parameters": []},
        {"rms_norm_eps": True},
        {"layer_types": ["full_attention"] * 3},
        {"use_sliding_window": True},
        {"text_config": {}},
    ],
    ids=str,
)
def test_anything_else_is_left_to_transformers(changes: dict[str, Any]) -> None:
    assert explicit_config(decoder("llama", **changes)) is None


@pytest.mark.parametrize("model_type", DECODERS)
def test_a_key_that_is_missing_is_left_to_transformers(model_type: str) -> None:
    whole = decoder(model_type)
    needed = set(whole) - {"head_dim", "sliding_window", "num_local_experts", "num_experts_per_tok"}
    for name in needed:
        assert explicit_config({key: value for key, value in whole.items() if key != name}) is None


def test_the_table_of_rope_is_a_tensor() -> None:
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }  # fmt: skip
    own = explicit_config(decoder("llama", rope_scaling=scaling))
    assert own is not None
    _, rope = hyperparameters.metadata_of(FAMILIES["llama"], own, 320)
    assert isinstance(rope.tensors["rope_freqs.weight"], torch.Tensor)
