"""Descriptions compared with what transformers' own config classes say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from lowbit.checkpoint import ModelDescription, open_checkpoint
from lowbit.errors import CheckpointError

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 10}


def test_agrees_with_transformers(model_type: str, checkpoint_of: Callable[[str], Path]) -> None:
    path = checkpoint_of(model_type)
    found, config = open_checkpoint(path).description, AutoConfig.from_pretrained(path)
    assert found.architecture == config.architectures[0]
    assert found.model_type == model_type
    assert found.hidden == config.hidden_size
    assert found.layers == config.num_hidden_layers
    assert found.heads == config.num_attention_heads
    assert found.kv_heads == (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    assert found.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    assert found.vocab == config.vocab_size
    assert found.ffn == (config.ffn_dim if model_type == "opt" else config.intermediate_size)
    assert found.tied == config.tie_word_embeddings
    assert found.max_positions == config.max_position_embeddings
    assert found.dtype == "float32"
    assert found.is_moe == ("mixtral" in model_type or "moe" in model_type)
    assert not found.multimodal


def test_experts(checkpoint_of: Callable[[str], Path]) -> None:
    found = open_checkpoint(checkpoint_of("qwen3_moe")).description
    assert (found.experts, found.experts_per_token, found.expert_ffn) == (4, 2, 128)
    found = open_checkpoint(checkpoint_of("mixtral")).description
    assert (found.experts, found.experts_per_token, found.expert_ffn) == (4, 2, 256)


def test_old_names_and_latent_attention() -> None:
    gpt2 = {"n_embd": 48, "n_head": 3, "n_layer": 2, "vocab_size": 9, "n_positions": 32, "n_inner": None}
    found = ModelDescription.from_config(gpt2)
    assert (found.hidden, found.heads, found.kv_heads, found.head_dim, found.ffn) == (48, 3, 3, 16, 192)
    assert (found.max_positions, found.tied) == (32, True)
    latent = ModelDescription.from_config(LLAMA | {"kv_lora_rank": 512, "qk_rope_head_dim": 64})
    assert latent.kv_features_per_token == 576
    assert ModelDescription.from_config(LLAMA | {"num_key_value_heads": 2}).kv_features_per_token == 64
    assert ModelDescription.from_config(LLAMA | {"multi_query": True}).kv_heads == 1


def test_nested_text_config() -> None:
    text = {key: value for key, value in LLAMA.items() if key != "model_type"} | {"model_type": "inner_text"}
    found = ModelDescription.from_config({"model_type": "outer", "architectures": ["Outer"], "text_config": text})
    assert (found.architecture, found.hidden, found.multimodal) == ("Outer", 64, True)


def test_tied_where_the_config_is_silent() -> None:
    assert not ModelDescription.from_config(LLAMA).tied
    assert ModelDescription.from_config(LLAMA, ["model.embed_tokens.weight"]).tied
    assert not ModelDescription.from_config(LLAMA, ["model.embed_tokens.weight", "lm_head.qweight"]).tied
    assert ModelDescription.from_config(LLAMA | {"tie_word_embeddings": True}, ["lm_head.weight"]).tied


def test_sliding_window() -> None:
    assert ModelDescription.from_config(LLAMA | {"sliding_window": 512}).sliding_window == 512
    assert (
        ModelDescription.from_config(LLAMA | {"sliding_window": 512, "use_sliding_window": False}).sliding_window == 0
    )
    assert ModelDescription.from_config(LLAMA | {"sliding_window": None}).sliding_window == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive whole number, not 0"),
        ({"vocab_size": "many"}, "vocab_size must be a positive whole number, not 'many'"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be"),
        ({"intermediate_size": [1, -2]}, "intermediate_size must be"),
    ],
)
def test_unusable(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^here: {message}"):
        ModelDescription.from_config(json.loads(json.dumps(LLAMA | change)), where="here")
