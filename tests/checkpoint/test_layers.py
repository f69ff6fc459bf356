"""What blocks keep per request, against the caches that transformers fills."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lowbit.checkpoint import ModelDescription
from lowbit.checkpoint.families import known_families
from lowbit.checkpoint.layers import LayerState, layer_states
from lowbit.errors import CheckpointError, UnsupportedError

PLAIN: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = PLAIN | {"num_key_value_heads": 2, "head_dim": 16}
WINDOW = {"sliding_window": 16}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
STATE = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
SMALL = {k: v for k, v in PLAIN.items() if k not in ("intermediate_size", "num_attention_heads")}

CASES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "gpt_neox": PLAIN,
    "falcon": PLAIN | {"multi_query": True, "new_decoder_architecture": False},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, "vocab_size": 128, "multi_query": True},
    "mistral": GROUPED | WINDOW,
    "mixtral": GROUPED | EXPERTS,
    "phi3": GROUPED | WINDOW,
    "qwen2": PLAIN | WINDOW | {"num_key_value_heads": 1, "use_sliding_window": True, "max_window_layers": 2},
    "gemma2": GROUPED | WINDOW,
    "gemma3_text": GROUPED | WINDOW | {"num_hidden_layers": 7},
    "gemma4_text": GROUPED
    | WINDOW
    | {"num_hidden_layers": 6, "global_head_dim": 32, "hidden_size_per_layer_input": 8}
    | {"vocab_size_per_layer_input": 128},
    "cohere2": GROUPED | WINDOW,
    "exaone4": GROUPED | WINDOW,
    "gpt_oss": GROUPED | WINDOW | EXPERTS,
    "deepseek_v2": PLAIN
    | {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    | {"first_k_dense_replace": 4, "n_routed_experts": 2},
    "qwen3_next": GROUPED
    | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 8},
    "mamba": SMALL | {"state_size": 8, "time_step_rank": 4},
    "mamba2": SMALL | {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
    "jamba": PLAIN
    | {"num_key_value_heads": 2, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1}
    | {"num_experts": 2, "num_experts_per_tok": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4},
    "bamba": PLAIN | STATE | {"num_key_value_heads": 2, "attn_layer_indices": [1], "mamba_n_groups": 2},
    "falcon_h1": GROUPED | STATE | {"mamba_d_ssm": 128, "mamba_n_groups": 1},
    "granitemoehybrid": PLAIN
    | STATE
    | EXPERTS
    | {"num_key_value_heads": 2, "layer_types": ["mamba", "attention", "mamba", "mamba"]}
    | {"mamba_n_groups": 1, "shared_intermediate_size": 32},
    "lfm2": PLAIN | {"num_key_value_heads": 2, "full_attn_idxs": [1], "block_multiple_of": 8, "conv_L_cache": 4},
    "nemotron_h": PLAIN
    | {"num_key_value_heads": 2, "head_dim": 16, "hybrid_override_pattern": "M*-M", "mamba_num_heads": 8}
    | {"mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8},
    "zamba2": PLAIN
    | {"n_mamba_heads": 8, "mamba_d_state": 8, "mamba_ngroups": 1, "num_mem_blocks": 1, "chunk_size": 8}
    | {"num_key_value_heads": 4, "use_mamba_kernels": False, "layers_block_type": ["mamba", "hybrid"] * 2},
}


def cached_elements(model: Any, tokens: int) -> int:
    """Numbers in transformers' cache after a prompt of ``tokens``."""
    with torch.no_grad():
        output = model(torch.randint(3, 120, (1, tokens)), use_cache=True)
    cache = getattr(output, "past_key_values", None) or output.cache_params
    found = 0
    for layer in cache.layers:
        for name in ("keys", "values", "conv_states", "recurrent_states"):
            states = getattr(layer, name, None)
            for state in states.values() if isinstance(states, dict) else [states]:
                found += state.numel() if isinstance(state, torch.Tensor) else 0
    return found


def elements(state: LayerState, tokens: int) -> int:
    """The same of one block: transformers keeps one column more of a convolution, one token less of a window."""
    kept = min(tokens, state.window - 1) if state.window else tokens
    return kept * state.kv_heads * (state.key_dim + state.value_dim) + state.conv * 4 // 3 + state.recurrent


@pytest.mark.parametrize("model_type", CASES)
def test_states_are_those_that_transformers_keeps(model_type: str) -> None:
    values = CASES[model_type]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values)).eval()
    config = values | {"model_type": model_type}
    states = layer_states(config, ModelDescription.from_config(config))
    for tokens in (9, 40):
        assert sum(elements(state, tokens) for state in states) == cached_elements(model, tokens)


@pytest.mark.parametrize(
    "model_type",
    [
        *("gemma2", "gemma3_text", "gemma3n_text", "cohere2", "gpt_oss", "llama4_text", "qwen3_next", "exaone4"),
        *("olmo3", "minimax", "vaultgemma", "afmoe", "qwen3_5_text"),
    ],
)
def test_kinds_without_a_list_are_those_of_transformers(model_type: str) -> None:
    """The rule of each family, at its full number of blocks, against ``layer_types`` as transformers derives them."""
    config = AutoConfig.for_model(model_type).to_dict()
    listed = config.pop("layer_types")
    states = layer_states(config, ModelDescription.from_config(config))
    kinds = {"full_attention": (True, False), "linear_attention": (False, False)}
    shared = config.get("num_kv_shared_layers", 0)
    for state, kind in zip(states[: len(states) - shared], listed, strict=False):
        assert (state.attends, bool(state.window)) == kinds.get(kind, (True, True))
    assert all(state == LayerState() for state in states[len(states) - shared :])


def test_latent_attention_with_an_index() -> None:
    config = {"model_type": "deepseek_v32", "kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128}
    config |= {"hidden_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 100}
    (first, _) = layer_states(config, ModelDescription.from_config(config))
    assert (first.kv_heads, first.key_dim, first.value_dim, first.index_bytes) == (1, 576, 0, 132)
    assert first.latent


def test_an_unknown_family_is_refused_and_can_be_named() -> None:
    config = GROUPED | {"model_type": "lama"}
    description = ModelDescription.from_config(config)
    with pytest.raises(UnsupportedError, match=r"unknown architecture 'lama'.*--like llama"):
        layer_states(config, description)
    known = config | {"model_type": "llama"}
    assert layer_states(config, description, family="llama") == layer_states(known, ModelDescription.from_config(known))


def test_kinds_that_nobody_knows_are_refused() -> None:
    config = GROUPED | {"model_type": "llama", "layer_types": ["spiral_attention"] * 4}
    with pytest.raises(UnsupportedError, match="spiral_attention"):
        layer_states(config, ModelDescription.from_config(config))
    with pytest.raises(CheckpointError, match="lists 3 blocks, num_hidden_layers says 4"):
        layer_states(config | {"layer_types": ["full_attention"] * 3}, ModelDescription.from_config(config))
    with pytest.raises(UnsupportedError, match="constant state"):
        layer_states(config | {"layer_types": ["mamba"] * 4}, ModelDescription.from_config(config))


def test_known_families_are_names() -> None:
    assert "llama" in known_families()
    assert all(name == name.strip().lower() for name in known_families())
