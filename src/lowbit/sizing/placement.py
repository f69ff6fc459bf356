"""Where tensors go: the share of one tensor-parallel device, and the image encoder beside the language model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from lowbit.planning.serving import Encoder
from lowbit.sizing.headers import HeaderModel, tensor_kind
from lowbit.sizing.variant import KINDS, Variant

_WHOLE = re.compile(r"(q_a_proj|kv_a_proj\w*|q_a_layernorm|A_log|dt_bias)\b|\.(g_idx|weight_shape)$")
"""Modules that engines keep whole on every device: down-projections of latent attention."""
_KEYS_AND_VALUES = re.compile(r"\.(k_proj|v_proj)\.")
_REPLICATED = ("norm", "router")
_LARGEST_IMAGE_PIXELS = 12_845_056
"""Pixels of the largest image that models of free resolution take unless told otherwise (Qwen2-VL's default)."""


def device_kinds(variant: Variant, model: HeaderModel, devices: int) -> dict[str, int]:
    """Bytes of weights on one of ``devices`` by kind of module, in the order of a picture.

    Norms, routers and latent down-projections are on each; key and value projections are divided no further than there
    are heads.
    """
    found: defaultdict[str, int] = defaultdict(int)
    heads = max(1, model.description.kv_heads)
    for name, size in variant.tensors.items():
        kind = tensor_kind(name)
        if devices == 1 or kind in _REPLICATED or _WHOLE.search(name):
            found[kind] += size
        elif _KEYS_AND_VALUES.search(name) and heads < devices:
            found[kind] += -(-size // heads)
        else:
            found[kind] += -(-size // devices)
    return {kind: found[kind] for kind in KINDS if found[kind]}


def image_encoder(config: Mapping[str, Any]) -> Encoder | None:
    """The image encoder that ``config.json`` describes, or None where it does not or leaves its sizes out."""
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        return None

    def number(*names: str) -> int:
        return next((vision[name] for name in names if type(vision.get(name)) is int and vision[name] > 0), 0)

    hidden = number("embed_dim", "hidden_size", "width", "d_model")
    patch = number("patch_size", "spatial_patch_size")
    if not hidden or not patch:
        return None
    ffn = number("intermediate_size", "mlp_dim") or 4 * hidden
    merge = number("spatial_merge_size") or 1
    side = number("image_size")
    patches = (side // patch) ** 2 if side else _LARGEST_IMAGE_PIXELS // patch**2
    tokens = config.get("mm_tokens_per_image")
    if isinstance(tokens, int) and tokens > 0:
        return Encoder(hidden, ffn, tokens, -(-patches // tokens))
    return Encoder(hidden, ffn, patches // merge**2, merge**2)
