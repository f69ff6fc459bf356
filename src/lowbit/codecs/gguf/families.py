"""The model families that GGUF and Hugging Face checkpoints share, as data: names, row orders, hyperparameters.

Each family is read in both directions. Names and keys are those of llama.cpp (``src/llama-arch.cpp`` and the loaders in
``src/models``) and of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

__all__ = ["ENCODERS", "FAMILIES", "Family", "Field", "Link", "families_of"]


@dataclass(frozen=True, slots=True)
class Link:
    """A module under both names, without the ``.weight`` or ``.bias`` at their ends.

    ``{block}`` stands for a block's number, ``{expert}`` for an expert's: those of a block are one tensor in GGUF.
    ``{base}`` is the prefix of the base model.

    ``order``       how rows are ordered in GGUF: a key of :data:`lowbit.codecs.gguf.orders.ORDERS`, or empty
    ``offset``      what GGUF adds to each value
    ``keep_float``  never quantized
    ``bias``        a bias may be there
    ``vector``      ``[1, n]`` in Hugging Face's files and ``[n]`` in GGUF
    ``required``    whether the weight must be there
    """

    gguf: str
    hf: str
    order: str = ""
    offset: float = 0.0
    keep_float: bool = False
    bias: bool = False
    vector: bool = False
    required: bool = True


@dataclass(frozen=True, slots=True)
class Field:
    """A hyperparameter: its key in GGUF (after the architecture's name) and its names in ``config.json``.

    Of several names the first that is set is read, and the first is written.
    """

    gguf: str
    hf: tuple[str, ...]
    kind: type[int] | type[float] = int
    required: bool = True


@dataclass(frozen=True, slots=True)
class Family:
    """What is particular to the models of one ``model_type``.

    ``architecture``  llama.cpp's name
    ``model_class``   the class that ``config.json`` names
    ``bases``         prefixes that the base model's names may carry, the usual one first
    ``output``        ``optional``: absent from GGUF where tied; ``required``: a copy of the embedding where tied;
                      ``never``: always tied; ``none``: an encoder
    ``constants``     fields of ``config.json`` that llama.cpp takes for granted; a checkpoint must agree
    ``activations``   the values of ``hidden_act`` that llama.cpp computes
    ``square``        whether heads times head_dim must be the hidden size
    """

    model_type: str
    architecture: str
    model_class: str
    links: tuple[Link, ...]
    fields: tuple[Field, ...]
    bases: tuple[str, ...] = ("model.", "", "language_model.model.", "model.language_model.")
    output: str = "optional"
    head: str = "lm_head"
    constants: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    activations: tuple[str, ...] = ("silu", "swish")
    square: bool = False
    sliding: bool = False
    partial_rotary: bool = False

    @property
    def embedding(self) -> Link:
        """The link of the token embedding."""
        return next(link for link in self.links if link.gguf == "token_embd")


_LAYER = "{base}layers.{block}."


def _block(gguf: str, hf: str, **options: Any) -> Link:
    return Link("blk.{block}." + gguf, _LAYER + hf, **options)


def _shell(norm_offset: float = 0.0) -> tuple[Link, ...]:
    return (Link("token_embd", "{base}embed_tokens"), Link("output_norm", "{base}norm", offset=norm_offset))


def _attention(*, rope: bool = False, bias: bool = True, output_bias: bool = False) -> tuple[Link, ...]:
    return (
        _block("attn_q", "self_attn.q_proj", order="rope_q" if rope else "", bias=bias),
        _block("attn_k", "self_attn.k_proj", order="rope_k" if rope else "", bias=bias),
        _block("attn_v", "self_attn.v_proj", bias=bias),
        _block("attn_output", "self_attn.o_proj", bias=output_bias),
    )


def _norms() -> tuple[Link, ...]:
    return (_block("attn_norm", "input_layernorm"), _block("ffn_norm", "post_attention_layernorm"))


def _query_key_norms(offset: float = 0.0) -> tuple[Link, ...]:
    return (
        _block("attn_q_norm", "self_attn.q_norm", offset=offset),
        _block("attn_k_norm", "self_attn.k_norm", offset=offset),
    )


def _mlp(bias: bool = False) -> tuple[Link, ...]:
    return tuple(_block(f"ffn_{kind}", f"mlp.{kind}_proj", bias=bias) for kind in ("gate", "up", "down"))


def _experts(parent: str, names: tuple[str, str, str]) -> tuple[Link, ...]:
    router = _block("ffn_gate_inp", f"{parent}.gate", keep_float=True)
    kinds = zip(("gate", "up", "down"), names, strict=True)
    return (router, *(_block(f"ffn_{kind}_exps", f"{parent}.experts.{{expert}}.{name}") for kind, name in kinds))


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_SHARED_EXPERT = (
    _block("ffn_gate_inp_shexp", "mlp.shared_expert_gate", keep_float=True, vector=True),
    *(_block(f"ffn_{kind}_shexp", f"mlp.shared_expert.{kind}_proj") for kind in ("gate", "up", "down")),
)
_GEMMA2_NORMS = (
    _block("attn_norm", "input_layernorm", offset=1.0),
    _block("post_attention_norm", "post_attention_layernorm", offset=1.0),
    _block("ffn_norm", "pre_feedforward_layernorm", offset=1.0),
    _block("post_ffw_norm", "post_feedforward_layernorm", offset=1.0),
)
_GEMMA_NORMS = (
    _block("attn_norm", "input_layernorm", offset=1.0),
    _block("ffn_norm", "post_attention_layernorm", offset=1.0),
)

_SIZES = (
    Field("context_length", ("max_position_embeddings",)),
    Field("embedding_length", ("hidden_size",)),
    Field("block_count", ("num_hidden_layers",)),
    Field("feed_forward_length", ("intermediate_size",)),
    Field("attention.head_count", ("num_attention_heads",)),
)
_DECODER = (
    *_SIZES,
    Field("attention.head_count_kv", ("num_key_value_heads",)),
    Field("attention.key_length", ("head_dim",)),
    Field("attention.value_length", ("head_dim",)),
    Field("attention.layer_norm_rms_epsilon", ("rms_norm_eps",), float),
)
_ROUTED = (
    Field("expert_count", ("num_experts", "num_local_experts")),
    Field("expert_used_count", ("num_experts_per_tok",)),
)
_EXPERT_FFN = Field("expert_feed_forward_length", ("moe_intermediate_size",))
_SLIDING = Field("attention.sliding_window", ("sliding_window",), required=False)
_FINAL_CAP = Field("final_logit_softcapping", ("final_logit_softcapping",), float, required=False)
_TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")

_LLAMA_LINKS = (*_shell(), *_norms(), *_attention(rope=True, output_bias=True), *_mlp(bias=True))
_LLAMA = Family("llama", "llama", "LlamaForCausalLM", _LLAMA_LINKS, _DECODER)
_MISTRAL = Family("mistral", "llama", "MistralForCausalLM", _LLAMA_LINKS, _DECODER)
_MIXTRAL = Family(
    "mixtral",
    "llama",
    "MixtralForCausalLM",
    (*_shell(), *_norms(), *_attention(rope=True), *_experts("block_sparse_moe", ("w1", "w3", "w2"))),
    (*_DECODER, Field("expert_count", ("num_local_experts",)), _ROUTED[1]),
)
_QWEN2 = Family(
    "qwen2", "qwen2", "Qwen2ForCausalLM", (*_shell(), *_norms(), *_attention(), *_mlp()), _DECODER, square=True
)
_QWEN2_MOE = Family(
    "qwen2_moe",
    "qwen2moe",
    "Qwen2MoeForCausalLM",
    (*_shell(), *_norms(), *_attention(), *_experts("mlp", _PROJECTIONS), *_SHARED_EXPERT),
    (
        *_DECODER,
        *_ROUTED,
        _EXPERT_FFN,
        Field("expert_shared_feed_forward_length", ("shared_expert_intermediate_size",)),
    ),
    output="required",
    constants=MappingProxyType({"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []}),
    square=True,
)
_QWEN3 = Family(
    "qwen3",
    "qwen3",
    "Qwen3ForCausalLM",
    (*_shell(), *_norms(), *_attention(), *_query_key_norms(), *_mlp()),
    _DECODER,
)
_QWEN3_MOE = Family(
    "qwen3_moe",
    "qwen3moe",
    "Qwen3MoeForCausalLM",
    (*_shell(), *_norms(), *_attention(), *_query_key_norms(), *_experts("mlp", _PROJECTIONS)),
    (*_DECODER, *_ROUTED, _EXPERT_FFN),
    constants=MappingProxyType({"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}),
)
_GEMMA = Family(
    "gemma",
    "gemma",
    "GemmaForCausalLM",
    (*_shell(1.0), *_GEMMA_NORMS, *_attention(bias=False), *_mlp()),
    _DECODER,
    output="never",
    activations=(*_TANH_GELU, "gelu"),
)
_GEMMA2 = Family(
    "gemma2",
    "gemma2",
    "Gemma2ForCausalLM",
    (*_shell(1.0), *_GEMMA2_NORMS, *_attention(bias=False), *_mlp()),
    (
        *_DECODER,
        _SLIDING,
        _FINAL_CAP,
        Field("attn_logit_softcapping", ("attn_logit_softcapping",), float),
    ),
    output="never",
    activations=_TANH_GELU,
    sliding=True,
)
_GEMMA3 = Family(
    "gemma3_text",
    "gemma3",
    "Gemma3ForCausalLM",
    (*_shell(1.0), *_GEMMA2_NORMS, *_attention(bias=False), *_query_key_norms(1.0), *_mlp()),
    (*_DECODER, _SLIDING, _FINAL_CAP),
    constants=MappingProxyType({"attn_logit_softcapping": None}),
    activations=_TANH_GELU,
    sliding=True,
)
_PHI3 = Family(
    "phi3",
    "phi3",
    "Phi3ForCausalLM",
    (
        *_shell(),
        *_norms(),
        _block("attn_qkv", "self_attn.qkv_proj"),
        _block("attn_output", "self_attn.o_proj"),
        _block("ffn_up", "mlp.gate_up_proj"),
        _block("ffn_down", "mlp.down_proj"),
    ),
    (*_DECODER, _SLIDING),
    square=True,
    partial_rotary=True,
)
_GPT_NEOX = Family(
    "gpt_neox",
    "gptneox",
    "GPTNeoXForCausalLM",
    (
        Link("token_embd", "{base}embed_in"),
        Link("output_norm", "{base}final_layer_norm", bias=True),
        _block("attn_norm", "input_layernorm", bias=True),
        _block("ffn_norm", "post_attention_layernorm", bias=True),
        _block("attn_qkv", "attention.query_key_value", order="interleaved_qkv", bias=True),
        _block("attn_output", "attention.dense", bias=True),
        _block("ffn_up", "mlp.dense_h_to_4h", bias=True),
        _block("ffn_down", "mlp.dense_4h_to_h", bias=True),
    ),
    (*_SIZES, Field("attention.layer_norm_epsilon", ("layer_norm_eps",), float)),
    bases=("gpt_neox.", ""),
    output="required",
    head="embed_out",
    constants=MappingProxyType({"attention_bias": True}),
    activations=(*_TANH_GELU, "gelu"),
    square=True,
    partial_rotary=True,
)

_ENCODER_FIELDS = (*_SIZES, Field("attention.layer_norm_epsilon", ("layer_norm_eps",), float))


def _encoder_links(positions: str) -> tuple[Link, ...]:
    layer = "{base}encoder.layer.{block}."
    parts = {
        "attn_q": "attention.self.query",
        "attn_k": "attention.self.key",
        "attn_v": "attention.self.value",
        "attn_output": "attention.output.dense",
        "attn_output_norm": "attention.output.LayerNorm",
        "ffn_up": "intermediate.dense",
        "ffn_down": "output.dense",
        "layer_output_norm": "output.LayerNorm",
    }
    embeddings = "{base}embeddings."
    return (
        Link("token_embd", f"{embeddings}word_embeddings"),
        Link("position_embd", f"{embeddings}position_embeddings", order=positions, keep_float=True),
        Link("token_types", f"{embeddings}token_type_embeddings", keep_float=True, required=False),
        Link("token_embd_norm", f"{embeddings}LayerNorm", bias=True),
        *(Link("blk.{block}." + gguf, layer + hf, bias=True) for gguf, hf in parts.items()),
    )


def _encoder(model_type: str, model_class: str, bases: tuple[str, ...], positions: str = "") -> Family:
    return Family(
        model_type,
        "bert",
        model_class,
        _encoder_links(positions),
        _ENCODER_FIELDS,
        bases=bases,
        output="none",
        constants=MappingProxyType({"is_decoder": False, "add_cross_attention": False}),
        activations=(*_TANH_GELU, "gelu"),
        square=True,
    )


_BERT = _encoder("bert", "BertModel", ("", "bert."))
_ROBERTA = _encoder("roberta", "RobertaModel", ("", "roberta."), "after_padding")
_XLM_ROBERTA = _encoder("xlm-roberta", "XLMRobertaModel", ("", "roberta."), "after_padding")

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.model_type: family
        for family in (
            _LLAMA, _MISTRAL, _MIXTRAL, _QWEN2, _QWEN2_MOE, _QWEN3, _QWEN3_MOE, _GEMMA, _GEMMA2, _GEMMA3, _PHI3,
            _GPT_NEOX, _BERT, _ROBERTA, _XLM_ROBERTA,
        )
    }
)  # fmt: skip
"""Families by the ``model_type`` of their (text) config."""

ENCODERS = frozenset(family.model_type for family in FAMILIES.values() if family.output == "none")
"""Model types that embed text and do not continue it."""


def families_of(architecture: str) -> list[Family]:
    """The families that llama.cpp calls ``architecture``."""
    return [family for family in FAMILIES.values() if family.architecture == architecture]
