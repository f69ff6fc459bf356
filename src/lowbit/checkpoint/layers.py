"""What each block keeps of a request while it generates: keys and values, a latent vector, or a state of fixed size.

Read from ``config.json`` alone. Where a config does not list its ``layer_types``, the rule of its family applies; a
family that is not known is refused, since a guess would be wrong by factors.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowbit.checkpoint import families
from lowbit.checkpoint.description import Fields, ModelDescription, text_fields
from lowbit.errors import CheckpointError, UnsupportedError

__all__ = ["LayerState", "layer_states"]

_INDEX_SCALE_BYTES = 4
_LISTS = ("layer_types", "layers_block_type", "block_types", "_block_types")


@dataclass(frozen=True, slots=True)
class LayerState:
    """The state of one block for one request, in numbers of elements.

    ``kv_heads``  heads that keep a key of ``key_dim`` and a value of ``value_dim`` per token; 0 for none
    ``window``    tokens that are kept at most, 0 for all; ``chunked`` says that the window moves in whole steps
    ``latent``    one vector of ``key_dim`` serves all heads: it is the same on every tensor-parallel device
    ``index_bytes``  bytes per token beside it (the indexer of sparse attention)
    ``conv``, ``recurrent``  elements that do not depend on the number of tokens; ``float32`` if the family keeps the
    recurrent part in float32 whatever its dtype
    """

    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    window: int = 0
    chunked: bool = False
    latent: bool = False
    index_bytes: int = 0
    conv: int = 0
    recurrent: int = 0
    float32: bool = False

    @property
    def attends(self) -> bool:
        """Whether something is kept per token."""
        return self.kv_heads > 0

    @property
    def is_constant(self) -> bool:
        """Whether something is kept whose size does not depend on the number of tokens."""
        return self.conv + self.recurrent > 0

    def tokens(self, context: int) -> int:
        """Tokens that are kept after ``context`` of them."""
        return min(context, self.window) if self.window else context


def layer_states(
    config: Mapping[str, Any], description: ModelDescription, *, family: str | None = None, where: str = "config.json"
) -> tuple[LayerState, ...]:
    """The state of each block, in order. ``family`` replaces the config's ``model_type``, for one that is not known.

    Raises :class:`UnsupportedError` for an unknown family or kind of block, :class:`CheckpointError` for a config that
    contradicts itself.
    """
    fields = text_fields(config, where)
    name = _family(family or description.model_type, where)
    kinds = _kinds(name, fields, description.layers)
    attention = _attention(name, fields, description)
    constant = _RECURRENT.get(name)
    if constant is None and any(kind in ("linear", "both") for kind in kinds):
        raise UnsupportedError(f"{where}: {name} lists blocks with a constant state, whose size lowbit does not know")
    shared = fields.number("num_kv_shared_layers", default=0)
    states = []
    for index, kind in enumerate(kinds):
        state = constant(fields) if constant and kind in ("linear", "both") else LayerState()
        if kind in ("full", "both", "sliding", "chunked") and index < len(kinds) - shared:
            state = attention(state, kind)
        states.append(state)
    # LongCat's blocks hold two attentions each.
    return tuple(states) if name != "longcat_flash" else tuple(state for state in states for _ in range(2))


def _family(model_type: str, where: str) -> str:
    """The name under which the tables know ``model_type``."""
    known = families.known_families()
    for name in (model_type, model_type.removesuffix("_text"), model_type.removesuffix("_text_model")):
        if name in known:
            return name
    close = difflib.get_close_matches(model_type, known, n=1, cutoff=0.6)
    like = close[0] if close else "llama"
    raise UnsupportedError(
        f"{where}: unknown architecture {model_type!r}: what its blocks keep per token is not known; "
        f"if they work like those of another family, say so: --like {like}"
    )


def _kinds(name: str, fields: Fields, layers: int) -> list[str]:
    """full, sliding, chunked, linear, both or none, for each block."""
    if listed := _listed(fields, layers):
        return listed
    if name in families.ALTERNATING:
        period, other = families.ALTERNATING[name]
        period = next((fields.number(key) for key in families.PERIODS if type(fields.values.get(key)) is int), period)
        return ["full" if (index + 1) % period == 0 else other for index in range(layers)]
    if name == "jamba":
        period, offset = fields.number("attn_layer_period", default=8), fields.number("attn_layer_offset", default=4)
        return ["full" if index % period == offset else "linear" for index in range(layers)]
    if name in ("bamba", "lfm2", "lfm2_moe"):
        chosen = fields.values.get("attn_layer_indices") or fields.values.get("full_attn_idxs") or []
        return ["full" if index in chosen else "linear" for index in range(layers)]
    if name == "minimax":
        return ["linear" if index % 2 else "full" for index in range(layers)]
    if name == "recurrent_gemma":
        return [("linear", "linear", "sliding")[index % 3] for index in range(layers)]
    if name in families.MAMBA1 | families.MAMBA2 | {"rwkv"}:
        return ["both" if name == "falcon_h1" else "linear"] * layers
    if name in families.SLIDING_AFTER:
        first = fields.number("max_window_layers", default=layers)
        return ["sliding" if index >= first else "full" for index in range(layers)]
    return ["sliding" if name in families.SLIDING else "full"] * layers


def _listed(fields: Fields, layers: int) -> list[str]:
    """Kinds as the config itself lists them; empty if it does not."""
    values = fields.values
    for key in ("hybrid_override_pattern", "sliding_window_pattern"):
        if isinstance(text := values.get(key), str) and text and set(text) <= set(families.PATTERN_LETTERS):
            return [families.PATTERN_LETTERS[letter] for letter in _repeated(text, layers)]
    types = next((values[key] for key in _LISTS if isinstance(values.get(key), list) and values[key]), None)
    linear = values.get("linear_attn_config")
    if types is None and isinstance(linear, Mapping) and isinstance(linear.get("full_attn_layers"), list):
        return ["full" if index + 1 in linear["full_attn_layers"] else "linear" for index in range(layers)]
    if types is None and isinstance(values.get("attn_type_list"), list):
        return ["full" if kind else "linear" for kind in values["attn_type_list"]]
    if types is None:
        return []
    for kind in types:
        if kind not in families.SPELLINGS:
            raise UnsupportedError(f"{fields.where}: layer_types names {kind!r}, whose state lowbit does not know")
    listed = [families.SPELLINGS[kind] for kind in _repeated(types, layers)]
    if len(listed) < layers:
        raise CheckpointError(
            f"{fields.where}: layer_types lists {len(listed)} blocks, num_hidden_layers says {layers}"
        )
    return listed[:layers]


def _repeated(pattern: Sequence[str], layers: int) -> Sequence[str]:
    """A short pattern (``LLLG``, three block types) as often as there are blocks; a long one as it is."""
    return [pattern[index % len(pattern)] for index in range(layers)] if len(pattern) * 2 <= layers else pattern


def _attention(name: str, fields: Fields, shape: ModelDescription) -> Callable[[LayerState, str], LayerState]:
    """A function that adds the keys and values of an attention of a kind to a state."""
    if shape.kv_lora_rank:
        size = shape.kv_lora_rank + shape.rope_head_dim
        index = 0
        if name in families.INDEXED:
            index = fields.number("index_head_dim", default=128) + _INDEX_SCALE_BYTES
        return lambda state, kind: replace(state, kv_heads=1, key_dim=size, latent=True, index_bytes=index)
    head_dim = shape.head_dim
    if name == "zamba2":
        head_dim = fields.number("attention_head_dim", default=2 * shape.hidden // shape.heads)
    value_dim = fields.number("v_head_dim", default=head_dim)
    wide = fields.number("global_head_dim", default=head_dim)
    few = fields.number("num_global_key_value_heads", default=shape.kv_heads)
    window = shape.sliding_window or fields.number("attention_window_size", default=0)
    chunk = fields.number("attention_chunk_size", default=0)

    def attend(state: LayerState, kind: str) -> LayerState:
        if kind == "sliding" and window:
            return replace(
                state,
                kv_heads=fields.number("swa_num_key_value_heads", default=shape.kv_heads),
                key_dim=fields.number("swa_head_dim", default=head_dim),
                value_dim=fields.number("swa_v_head_dim", default=value_dim),
                window=window,
            )
        if kind == "chunked" and chunk:
            return replace(
                state, kv_heads=shape.kv_heads, key_dim=head_dim, value_dim=value_dim, window=chunk, chunked=True
            )
        if wide != head_dim:
            return replace(state, kv_heads=few, key_dim=wide, value_dim=wide)
        return replace(state, kv_heads=shape.kv_heads, key_dim=head_dim, value_dim=value_dim)

    return attend


def _mamba1(fields: Fields) -> LayerState:
    inner = fields.number("expand", "mamba_expand", default=2) * fields.number("hidden_size", "d_model")
    if fields.text("model_type") != "jamba":  # whose intermediate_size is that of its feed-forwards
        inner = fields.number("intermediate_size", default=inner)
    kernel = fields.number("conv_kernel", "mamba_d_conv", "d_conv", default=4)
    size = fields.number("state_size", "mamba_d_state", "d_state", default=16)
    return LayerState(conv=inner * (kernel - 1), recurrent=inner * size)


def _mamba2(fields: Fields) -> LayerState:
    heads = fields.number("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
    hidden = fields.number("hidden_size")
    expanded = fields.number("expand", "mamba_expand", default=2) * hidden
    inner = fields.number("mamba_d_ssm", default=0)
    names = ("mamba_d_head", "mamba_head_dim", "mamba_headdim", "head_dim")
    width = next((fields.values[key] for key in names if type(fields.values.get(key)) is int), 0)
    inner = inner or (heads * width if width else expanded)
    groups = fields.number("mamba_n_groups", "mamba_ngroups", "n_groups", default=1)
    size = fields.number("ssm_state_size", "mamba_d_state", "state_size", default=128)
    kernel = fields.number("conv_kernel", "mamba_d_conv", default=4)
    return LayerState(conv=(inner + 2 * groups * size) * (kernel - 1), recurrent=inner * size)


def _gated_delta(fields: Fields) -> LayerState:
    key = fields.number("linear_key_head_dim", default=128)
    value = fields.number("linear_value_head_dim", default=128)
    key_heads = fields.number("linear_num_key_heads", default=16)
    value_heads = fields.number("linear_num_value_heads", default=32)
    kernel = fields.number("linear_conv_kernel_dim", default=4)
    wide = str(fields.values.get("mamba_ssm_dtype", "")) == "float32"
    conv = (2 * key_heads * key + value_heads * value) * (kernel - 1)
    return LayerState(conv=conv, recurrent=value_heads * key * value, float32=wide)


def _delta_per_channel(fields: Fields) -> LayerState:
    nested = fields.values.get("linear_attn_config")
    inner = Fields(nested if isinstance(nested, Mapping) else fields.values, fields.where)
    heads = inner.number("num_heads", "linear_num_heads", default=32)
    width = inner.number("linear_head_dim" if nested is None else "head_dim", default=128)
    kernel = inner.number("short_conv_kernel_size", "linear_conv_kernel_dim", default=4)
    return LayerState(conv=3 * heads * width * (kernel - 1), recurrent=heads * width * width, float32=True)


def _lightning(fields: Fields) -> LayerState:
    heads = fields.number("num_attention_heads")
    width = fields.number("head_dim", default=fields.number("hidden_size") // heads)
    return LayerState(recurrent=heads * width * width, float32=True)


def _short_convolution(fields: Fields) -> LayerState:
    return LayerState(conv=fields.number("hidden_size") * (fields.number("conv_L_cache", default=3) - 1))


def _gated_recurrence(fields: Fields) -> LayerState:
    width = fields.number("lru_width", default=fields.number("hidden_size"))
    return LayerState(conv=width * (fields.number("conv1d_width", default=4) - 1), recurrent=width, float32=True)


def _rwkv(fields: Fields) -> LayerState:
    hidden = fields.number("hidden_size")
    return LayerState(recurrent=2 * hidden + 3 * fields.number("attention_hidden_size", default=hidden), float32=True)


_RECURRENT: dict[str, Callable[[Fields], LayerState]] = {
    **dict.fromkeys(families.MAMBA1, _mamba1),
    **dict.fromkeys(families.MAMBA2, _mamba2),
    **dict.fromkeys(families.GATED_DELTA, _gated_delta),
    **dict.fromkeys(families.CONVOLUTIONAL, _short_convolution),
    "kimi_linear": _delta_per_channel,
    "minimax": _lightning,
    "recurrent_gemma": _gated_recurrence,
    "rwkv": _rwkv,
}
"""The constant state of a block, by family."""
