"""Named mixes of llama.cpp: which type each tensor of a GGUF file gets under ``Q4_K_M``, ``IQ3_XS`` and the like.

The choices are those of llama.cpp's quantizer (``llama_tensor_get_type`` in ``src/llama-quant.cpp``, October 2026),
so that a file made here has the size and the types that people know the names for. ``tests/engines/mixes_check.py``
compares them with llama.cpp itself.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from lowbit.codecs.gguf.mix_table import MIXES, Mix, Place, Role
from lowbit.errors import UnsupportedError, UsageError
from lowbit.formats.ggml.types import GGML_TYPES, GgmlType

__all__ = [
    "MIXES",
    "Mix",
    "Override",
    "TensorShape",
    "choose_types",
    "find_mix",
    "is_mix",
    "may_quantize",
    "needs_importance",
    "parse_overrides",
]

Override: TypeAlias = tuple[re.Pattern[str], GgmlType]
"""Tensors whose name the pattern is found in get the type, whatever the mix says."""


class TensorShape(Protocol):
    """Name and shape of a tensor of the file, outermost extent first; ``keep_float`` tensors stay F32."""

    @property
    def name(self) -> str:
        """Name in the GGUF file."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents, outermost first: ``[out, in]`` or ``[experts, out, in]``."""
        ...

    @property
    def keep_float(self) -> bool:
        """Whether the tensor is never quantized (norms, routers, position tables)."""
        ...


_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "FP16": "F16", "FP32": "F32", "MXFP4": "MXFP4_MOE"}

_SMALLER_BLOCKS = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "NVFP4"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""What a type gives way to where its blocks do not divide a row."""

_GUIDED = frozenset(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"))

_ROLES: tuple[tuple[str, Role], ...] = (
    ("attn_qkv.weight", "value"),
    ("attn_kv_b.weight", "value"),
    ("attn_v.weight", "value"),
    ("attn_k.weight", "key"),
    ("attn_q.weight", "query"),
    ("attn_output.weight", "attention_output"),
    ("ffn_up", "up"),
    ("ffn_gate", "gate"),
    ("ffn_down", "down"),
)
_NEVER = re.compile(r"_norm\.weight|ffn_gate_inp\.weight|position_embd|token_types|attn_rel_b\.weight|rope_freqs")
_LAYER = re.compile(r"blk\.(\d+)\.")
_EMBEDDING = "token_embd.weight"
_HEAD = "output.weight"


def is_mix(name: str) -> bool:
    """Whether ``name`` is a scheme of GGUF files, however its letters are written."""
    return _canonical(name) in MIXES


def find_mix(name: str) -> Mix:
    """The mix called ``name`` (case does not matter, ``Q4_K`` is ``Q4_K_M``); :class:`UsageError` if there is none."""
    canonical = _canonical(name)
    if canonical not in MIXES:
        raise UsageError(f"unknown GGUF scheme {name!r}{_nearest(canonical, MIXES)}")
    return MIXES[canonical]


def parse_overrides(texts: Sequence[str]) -> tuple[Override, ...]:
    """``REGEX=TYPE`` texts as overrides.

    Raises :class:`UsageError` for a text without a type, a pattern that is no regular expression and an unknown type.
    """
    overrides = []
    for text in texts:
        pattern, separator, kind = text.rpartition("=")
        if not separator or not pattern or not kind:
            raise UsageError(f"--type {text!r}: write REGEX=TYPE, e.g. --type 'ffn_down=Q6_K'")
        if kind.upper() not in GGML_TYPES:
            raise UsageError(f"--type {text!r}: unknown type {kind!r}{_nearest(kind.upper(), GGML_TYPES)}")
        try:
            overrides.append((re.compile(pattern), GGML_TYPES[kind.upper()]))
        except re.error as error:
            raise UsageError(f"--type {text!r}: {pattern!r} is no regular expression: {error}") from error
    return tuple(overrides)


def may_quantize(tensor: TensorShape) -> bool:
    """Whether llama.cpp quantizes a tensor of that name and shape: matrices, but no norms, routers, position tables."""
    if tensor.keep_float or len(tensor.shape) < 2 or not tensor.name.endswith("weight"):
        return False
    return _NEVER.search(tensor.name) is None


def needs_importance(mix: Mix, name: str, kind: GgmlType) -> bool:
    """Whether tensor ``name`` of type ``kind`` is worthless without an importance matrix."""
    if name in (_EMBEDDING, _HEAD):
        return False
    return kind.name in _GUIDED or (kind.name == "Q2_K" and mix.name == "Q2_K_S")


def choose_types(
    mix: Mix,
    tensors: Sequence[TensorShape],
    metadata: Mapping[str, Any],
    *,
    has_imatrix: bool = False,
    overrides: Sequence[Override] = (),
    pure: bool = False,
) -> dict[str, GgmlType]:
    """The type of each tensor, by name.

    ``metadata`` are the keys of the file (``general.architecture``, ``llama.block_count`` …). ``pure`` gives all
    matrices the mix's base type; ``overrides`` win over both, the first that is found in a name. A type whose blocks do
    not divide a tensor's rows gives way to one with smaller blocks, in the end F16. Raises :class:`UsageError` for an
    override that speaks of no tensor that can be quantized.
    """
    quantizable = [tensor for tensor in tensors if may_quantize(tensor)]
    for pattern, kind in overrides:
        if not any(pattern.search(tensor.name) for tensor in quantizable):
            raise UsageError(_without_effect(pattern, kind, tensors, [tensor.name for tensor in quantizable]))
    chooser = _Chooser(mix, tensors, metadata, has_imatrix)
    chosen = {tensor.name: GGML_TYPES["F32"] for tensor in tensors}
    for tensor in sorted(quantizable, key=lambda tensor: (_layer(tensor.name), tensor.name)):
        manual = next((kind for pattern, kind in overrides if pattern.search(tensor.name)), None)
        if manual is not None:
            kind = manual
        elif pure or mix.is_float:
            kind = mix.base_type
        else:
            kind = GGML_TYPES[chooser.choose(tensor)]
        chosen[tensor.name] = _fitting(kind, tensor.shape[-1])
    return chosen


class _Chooser:
    """The choices of one mix for one model, asked tensor by tensor in the order of layer and name."""

    def __init__(
        self, mix: Mix, tensors: Sequence[TensorShape], metadata: Mapping[str, Any], has_imatrix: bool
    ) -> None:
        architecture = str(metadata["general.architecture"])
        heads = _number(metadata, f"{architecture}.attention.head_count")
        kv_heads = _number(metadata, f"{architecture}.attention.head_count_kv", heads)
        self._mix = mix
        self._has_imatrix = has_imatrix
        self._gqa = heads // kv_heads if kv_heads else 0
        self._experts = _number(metadata, f"{architecture}.expert_count")
        self._layers = _number(metadata, f"{architecture}.block_count")
        shared = heads != kv_heads if architecture == "llama" else architecture == "qwen2"
        self._is_70b = self._layers == 80 and shared
        self._tied = not any(tensor.name == _HEAD for tensor in tensors)
        self._values = sum(_role(tensor.name) == "value" for tensor in tensors)
        self._seen: Counter[Role] = Counter()

    def choose(self, tensor: TensorShape) -> str:
        """Name of the type for ``tensor``, before it is known to fit."""
        mix, role = self._mix, _role(tensor.name)
        if role == "output" or (role == "embedding" and self._tied):
            return self._output(tensor.shape[-1])
        if mix.name == "MXFP4_MOE":
            return "MXFP4" if len(tensor.shape) == 3 and tensor.shape[0] > 1 else "Q8_0"
        if role == "embedding":
            return mix.embedding or mix.base
        place = self._place(tensor.name, role)
        self._seen[role] += 1
        kind = next((kind for kind, where in mix.rules.get(role, ()) if where(place)), mix.base)
        return kind if mix.small else self._exceptions(role, kind)

    def _output(self, columns: int) -> str:
        if self._mix.name == "MXFP4_MOE" or not self._mix.base_type.fits(columns):
            return "Q8_0"
        if self._mix.output is not None:
            return self._mix.output
        return "Q8_0" if self._mix.base == "Q8_0" else "Q6_K"

    def _place(self, name: str, role: Role) -> Place:
        count = self._values if role == "value" else self._layers
        index = self._seen[role]
        if self._experts > 1 and role in ("down", "gate", "up") and not self._mix.small:
            index = _layer(name)
            if not 0 <= index < count:
                raise UnsupportedError(f"tensor {name} names no layer of the {count} that the model has")
        return Place(index, count, self._gqa, self._experts, self._has_imatrix)

    def _exceptions(self, role: Role, kind: str) -> str:
        """Small matrices that many heads or all experts depend on get more bits."""
        if role == "value" and self._is_70b and kind in ("Q3_K", "Q4_K"):
            kind = "Q5_K"
        return "Q8_0" if role in ("value", "key") and self._experts == 8 else kind


def _role(name: str) -> Role:
    if name == _HEAD:
        return "output"
    if name in (_EMBEDDING, "per_layer_token_embd.weight"):
        return "embedding"
    return next((role for part, role in _ROLES if part in name), "")


def _layer(name: str) -> int:
    match = _LAYER.match(name)
    return int(match[1]) if match else -1


def _number(metadata: Mapping[str, Any], key: str, default: int = 0) -> int:
    value = metadata.get(key, default)
    value = getattr(value, "value", value)
    return int(value[0]) if isinstance(value, list | tuple) else int(value)


def _fitting(kind: GgmlType, columns: int) -> GgmlType:
    if not kind.fits(columns):
        kind = GGML_TYPES[_SMALLER_BLOCKS.get(kind.name, "F16")]
    return kind if kind.fits(columns) else GGML_TYPES["F16"]


def _canonical(name: str) -> str:
    upper = name.strip().upper()
    return _ALIASES.get(upper, upper)


def _nearest(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f": did you mean {close[0]!r}?" if close else f": use one of {', '.join(known)}"


def _without_effect(
    pattern: re.Pattern[str], kind: GgmlType, tensors: Sequence[TensorShape], names: Sequence[str]
) -> str:
    text = f"--type '{pattern.pattern}={kind}'"
    if fixed := next((tensor.name for tensor in tensors if pattern.search(tensor.name)), None):
        return f"{text} speaks only of tensors that are never quantized ({fixed}): leave it out"
    close = difflib.get_close_matches(pattern.pattern, names, n=1, cutoff=0.0) or names[:1]
    return f"{text} matches no tensor: names look like {close[0]!r}"
