"""What the pipeline has to know about model families, as data.

Most of a family is discovered by running it: which linears share an input, which masks and position embeddings a
block is given. What cannot be discovered stands here: names that differ between checkpoint and model, names of
experts, and where a scaling of a linear's inputs can be folded to.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FUSED_SHARDS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Sibling linears that engines load as one matrix, which must therefore share one number format."""

ROUTERS = ("router", "shared_expert_gate", "block_sparse_moe.gate", "mlp.gate")
"""Ends of the names of expert routers, which are left dense unless a rule says otherwise."""


@dataclass(frozen=True, slots=True)
class Family:
    """What is particular to the models of one ``model_type``.

    ``folds`` maps the last name of the first linear of a group to the module that can take up the inverse of a
    scaling of the group's input: a norm (relative to the block), or a linear whose output rows are the input's
    channels (``.name``: a sibling of the linear).
    ``experts`` are the checkpoint's names of the gate, up and down projections of an expert.
    ``renames`` turn a model's parameter name into the checkpoint's.
    """

    folds: dict[str, str] = field(default_factory=dict)
    experts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    renames: tuple[tuple[str, str], ...] = ()


_LLAMA_FOLDS = {
    "q_proj": "input_layernorm",
    "o_proj": ".v_proj",
    "gate_proj": "post_attention_layernorm",
    "down_proj": ".up_proj",
}
_GEMMA2_FOLDS = {**_LLAMA_FOLDS, "gate_proj": "pre_feedforward_layernorm"}

_LLAMA = Family(_LLAMA_FOLDS)
_MOE = Family({"q_proj": "input_layernorm", "o_proj": ".v_proj", "down_proj": ".up_proj"})

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": Family(_GEMMA2_FOLDS),
    "gemma3_text": Family(_GEMMA2_FOLDS),
    # The gate and up halves of phi3 share one matrix: its last rows are the up projection.
    "phi3": Family({"qkv_proj": "input_layernorm", "gate_up_proj": "post_attention_layernorm"}),
    "phi": Family({"q_proj": "input_layernorm"}),
    "gpt_neox": Family(
        {"query_key_value": "input_layernorm", "dense_h_to_4h": "post_attention_layernorm"},
        renames=(("lm_head.", "embed_out."),),
    ),
    "opt": Family({"q_proj": "self_attn_layer_norm", "out_proj": ".v_proj", "fc1": "final_layer_norm"}),
    "mixtral": Family({**_MOE.folds, "w2": ".w3"}, ("w1", "w3", "w2"), ((".mlp.", ".block_sparse_moe."),)),
    "qwen2_moe": _MOE,
    "qwen3_moe": _MOE,
}

UNKNOWN = Family()
"""A family without particulars: round-to-nearest and GPTQ work, scale folding does not."""


def family_of(model_type: str) -> Family:
    """The family of a ``model_type``; :data:`UNKNOWN` when nothing particular is known."""
    return FAMILIES.get(model_type, UNKNOWN)


def fused_groups(names: list[str]) -> list[tuple[str, ...]]:
    """The groups among ``names`` (full module names) that engines fuse, complete ones only."""
    present, groups = set(names), []
    for name in names:
        parent, _, last = name.rpartition(".")
        for shards in FUSED_SHARDS:
            siblings = tuple(f"{parent}.{shard}" for shard in shards)
            if last == shards[0] and present.issuperset(siblings):
                groups.append(siblings)
    return groups
