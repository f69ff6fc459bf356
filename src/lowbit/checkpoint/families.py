"""Families of language models by ``model_type``, as far as the state that their blocks keep goes: data only.

A family is in one table, or in none and then not known. ``layer_types`` in a config always comes first.
"""

from __future__ import annotations

from collections.abc import Mapping


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


FULL = _names(
    """
    apertus arcee aquila baichuan bailing_moe biogpt bloom chatglm codegen codeshell cohere command_r cpmant cwm
    dbrx diffllama dots1 ernie4_5 ernie4_5_moe exaone falcon flex_olmo gemma glm glm4 glm4_moe glm4v glm4v_moe
    gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gptj granite granitemoe granitemoeshared granite_docling helium
    hunyuan_v1_dense hunyuan_v1_moe idefics3 internlm internlm2 internlm3 internvl_chat jais jais2 llama llava
    llava_next llava_onevision minicpm minicpm_o minicpmv minimax_m2 mistral3 mistral4 molmo mpt nanochat nemotron
    olmo olmo2 olmoe opt orion ovis paligemma persimmon phi pixtral qwen qwen2 qwen2_5_omni qwen2_5_vl
    qwen2_audio qwen2_moe qwen2_vl qwen3 qwen3_moe qwen3_omni_moe qwen3_vl qwen3_vl_moe rw refinedweb refinedwebmodel
    seed_oss smollm3 smolvlm solar solar_open stablelm stablelm_epoch xglm xverse yi
    """
)
"""Every block attends to all tokens, or, where the config gives a ``sliding_window``, see :data:`SLIDING`."""

SLIDING = _names("mistral mixtral ministral ministral3 phi3 phimoe starcoder2 phi4_multimodal")
"""A ``sliding_window`` in the config holds in every block."""

SLIDING_AFTER = _names("qwen2 qwen3 qwen2_moe qwen3_moe qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe dots1")
"""A ``sliding_window`` holds from block ``max_window_layers`` on."""

ALTERNATING: Mapping[str, tuple[int, str]] = {
    "gemma2": (2, "sliding"),
    "vaultgemma": (2, "sliding"),
    "gpt_oss": (2, "sliding"),
    "gemma3n": (5, "sliding"),
    "gemma3": (6, "sliding"),
    "gemma4": (6, "sliding"),
    "cohere2": (4, "sliding"),
    "exaone4": (4, "sliding"),
    "olmo3": (4, "sliding"),
    "afmoe": (4, "sliding"),
    "llama4": (4, "chunked"),
    "qwen3_next": (4, "linear"),
    "qwen3_5": (4, "linear"),
    "qwen3_5_moe": (4, "linear"),
    "olmo_hybrid": (4, "linear"),
    "kimi_linear": (4, "linear"),
}
"""Every n-th block attends to all tokens; the kind of the others."""

PERIODS = ("sliding_window_pattern", "full_attention_interval", "no_rope_layer_interval", "global_attn_every_n_layers")
"""Keys of a config that give the n of :data:`ALTERNATING`."""

LATENT = _names("deepseek_v2 deepseek_v3 kimi_k2 minicpm3 longcat_flash glm4_moe_lite youtu")
"""Multi-head latent attention: one vector of ``kv_lora_rank + qk_rope_head_dim`` numbers a token."""

INDEXED = frozenset({"deepseek_v32", "glm_moe_dsa"})
"""Latent attention with an index of ``index_head_dim`` 8-bit numbers and one scale a token beside it."""

MAMBA1 = frozenset({"mamba", "falcon_mamba", "jamba"})
MAMBA2 = frozenset({"mamba2", "bamba", "falcon_h1", "granitemoehybrid", "nemotron_h", "zamba2"})
GATED_DELTA = frozenset({"qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid"})
CONVOLUTIONAL = frozenset({"lfm2", "lfm2_moe"})
OTHER_RECURRENT = frozenset({"kimi_linear", "minimax", "recurrent_gemma", "rwkv"})
"""Families with blocks whose state does not grow, by what it is made of."""

SPELLINGS: Mapping[str, str] = {
    "full_attention": "full",
    "attention": "full",
    "global": "full",
    "global_attention": "full",
    "sliding_attention": "sliding",
    "local": "sliding",
    "local_attention": "sliding",
    "local_sliding": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "linear",
    "mamba": "linear",
    "mamba2": "linear",
    "recurrent": "linear",
    "conv": "linear",
    "hybrid": "both",
    "hybrid_mamba": "both",
    "mlp": "none",
    "moe": "none",
}
"""Kinds of blocks as configs spell them: full, sliding, chunked, linear, both (attention and a state), none."""

PATTERN_LETTERS: Mapping[str, str] = {"M": "linear", "*": "full", "-": "none", "E": "none", "L": "sliding", "G": "full"}
"""Letters of ``hybrid_override_pattern`` and of a ``sliding_window_pattern`` written as text."""


def known_families() -> frozenset[str]:
    """Every ``model_type`` in the tables."""
    recurrent = MAMBA1 | MAMBA2 | GATED_DELTA | CONVOLUTIONAL | OTHER_RECURRENT
    return FULL | SLIDING | SLIDING_AFTER | frozenset(ALTERNATING) | LATENT | INDEXED | recurrent
