"""What ``config.json`` says about a model's shape, whatever the family calls it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.errors import CheckpointError

__all__ = ["ModelDescription"]

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")
ATTENTION_FREE = frozenset({"mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"})
"""Families without attention: their configs name no attention heads."""
_HEADS = ("lm_head.", "embed_out.", "output.")
_UNTIED_BY_DEFAULT = frozenset(
    {"gpt_neox", "phi", "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "phi3"}
)


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """The shape of a decoder. Sizes are numbers of features, heads, tokens; 0 where the family has none.

    ``ffn`` is the width of the dense feed-forward, ``expert_ffn`` that of one expert; ``experts`` counts routed experts
    per block and ``experts_per_token`` those a token visits. ``kv_lora_rank`` and ``rope_head_dim`` are set for
    multi-head latent attention. ``sliding_window`` and ``max_positions`` are in tokens, 0 for unlimited or unknown.
    """

    architecture: str
    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    ffn: int
    tied: bool
    max_positions: int
    dtype: str
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    shared_experts: int = 0
    sliding_window: int = 0
    kv_lora_rank: int = 0
    rope_head_dim: int = 0
    multimodal: bool = False

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward blocks are mixtures of experts."""
        return self.experts > 1

    @property
    def kv_features_per_token(self) -> int:
        """Numbers that one block's key-value cache holds for one token."""
        if self.kv_lora_rank:
            return self.kv_lora_rank + self.rope_head_dim
        return 2 * self.kv_heads * self.head_dim

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], tensor_names: Collection[str] = (), *, where: str = "config.json"
    ) -> ModelDescription:
        """Read a ``config.json``; ``tensor_names`` settles whether the head is tied where the config leaves it open.

        Raises :class:`CheckpointError` naming ``where`` and the field that is missing or no number.
        """
        fields = text_fields(config, where)
        model_type = fields.text("model_type")
        hidden = fields.number("hidden_size", "n_embd", "d_model", "dim")
        attention_free = model_type in ATTENTION_FREE
        heads = 0 if attention_free else fields.number("num_attention_heads", "n_head", "n_heads", "num_heads")
        head_dim = 0 if attention_free else fields.number("head_dim", "qk_head_dim", default=hidden // heads)
        return cls(
            architecture=fields.architecture(config),
            model_type=model_type,
            hidden=hidden,
            layers=fields.number("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
            heads=heads,
            kv_heads=fields.kv_heads(heads),
            head_dim=head_dim,
            vocab=fields.number("vocab_size", "padded_vocab_size"),
            ffn=fields.widest("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", default=4 * hidden),
            tied=fields.tied(model_type, tensor_names),
            max_positions=fields.number(
                "max_position_embeddings",
                "n_positions",
                "max_sequence_length",
                "max_seq_len",
                "seq_length",
                "n_ctx",
                default=0,
            ),
            dtype=fields.text("dtype", "torch_dtype").removeprefix("torch."),
            experts=fields.number("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", default=0),
            experts_per_token=fields.number(
                "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", default=0
            ),
            expert_ffn=fields.number(
                "moe_intermediate_size", "expert_intermediate_size", "intermediate_size", default=0
            )
            if fields.number("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", default=0)
            else 0,
            shared_experts=fields.number("n_shared_experts", "num_shared_experts", default=0),
            sliding_window=fields.sliding_window(),
            kv_lora_rank=fields.number("kv_lora_rank", default=0),
            rope_head_dim=fields.number("qk_rope_head_dim", default=0),
            multimodal=_nested(config) is not None,
        )


def _nested(config: Mapping[str, Any]) -> dict[str, Any] | None:
    return next((config[key] for key in _TEXT_CONFIGS if isinstance(config.get(key), dict)), None)


def text_fields(config: Mapping[str, Any], where: str = "config.json") -> Fields:
    """The fields of the language model: those of a nested text config laid over the outer ones."""
    return Fields({**config, **(_nested(config) or {})}, where)


@dataclass(frozen=True, slots=True)
class Fields:
    """Typed look-ups in a config whose keys have many spellings."""

    values: Mapping[str, Any]
    where: str

    def number(self, *names: str, default: int | None = None) -> int:
        """The first of ``names`` that is set; a missing or null one gives ``default`` or, without one, an error."""
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if type(value) is int and value < 0 and default is not None:
                return default
            if type(value) is not int or (value <= 0 and default is None):
                raise CheckpointError(f"{self.where}: {name} must be a positive whole number, not {value!r:.80}")
            return value
        if default is None:
            raise CheckpointError(f"{self.where}: {names[0]} is missing; is this the config of a language model?")
        return default

    def widest(self, *names: str, default: int) -> int:
        """:meth:`number`, or the largest where the config lists one per block."""
        for name in names:
            value = self.values.get(name)
            if isinstance(value, list) and value and all(type(item) is int and item > 0 for item in value):
                return int(max(value))
        return self.number(*names, default=default)

    def text(self, *names: str) -> str:
        for name in names:
            value = self.values.get(name)
            if isinstance(value, str):
                return value
        return ""

    def architecture(self, config: Mapping[str, Any]) -> str:
        for source in (config, self.values):
            names = source.get("architectures")
            if isinstance(names, list) and names and isinstance(names[0], str):
                return names[0]
        return ""

    def kv_heads(self, heads: int) -> int:
        grouped = "num_key_value_heads" in self.values or self.values.get("new_decoder_architecture") is True
        if self.values.get("multi_query") is True and not grouped:
            return 1
        return self.number("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num", default=heads)

    def sliding_window(self) -> int:
        if self.values.get("use_sliding_window") is False:
            return 0
        return self.number("sliding_window", default=0)

    def tied(self, model_type: str, tensor_names: Collection[str]) -> bool:
        stated = self.values.get("tie_word_embeddings")
        if isinstance(stated, bool):
            return stated
        if tensor_names:
            return not any(name.startswith(_HEADS) for name in tensor_names)
        return model_type not in _UNTIED_BY_DEFAULT
