"""GPTQ checkpoints: ``qweight``, ``qzeros``, ``scales``, ``g_idx`` per module.

==========  ==============  ==========================  =====================================
``qweight``  int32          ``[in*bits/32, out]``       codes packed along the input features
``qzeros``   int32          ``[groups, out*bits/32]``   zero points packed along the outputs
``scales``   float16 (bf16)  ``[groups, out]``
``g_idx``    int32          ``[in]``                    column to group
==========  ==============  ==========================  =====================================

Version 1 (``checkpoint_format: gptq``, what every engine reads) stores ``zero_point - 1``, version 2 (``gptq_v2``) the
zero point itself. A zero point of 0 wraps to all ones in version 1 and readers disagree on it, so only symmetric
weights are written as version 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowbit import __version__
from lowbit.codecs.codec import (
    StoredGrid,
    TensorHeader,
    bits_reasons,
    group_reasons,
    half_dtype,
    integer,
    integer_spec,
    integer_weight,
    integers_only,
    required,
    stored,
    weights_only,
)
from lowbit.codecs.names import common_spec, fused_names, in_numbered_block, patterns
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats.activations import ActivationSpec
from lowbit.formats.bits import pack, unpack
from lowbit.formats.spec import PER_TENSOR, IntSpec
from lowbit.formats.tensor import QuantizedTensor
from lowbit.formats.weights import WeightSpec, WeightTensor

__all__ = ["GptqCodec"]

_BITS = (2, 3, 4, 8)
_NAMES = {1: "gptq", 2: "gptq_v2"}


@dataclass(frozen=True, slots=True)
class GptqCodec:
    """GPTQ, ``version`` 1 or 2."""

    version: int = 1

    @property
    def name(self) -> str:
        """``gptq`` or ``gptq_v2``, as ``checkpoint_format`` spells it."""
        return _NAMES[self.version]

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The model's own 16-bit dtype, so that engines round nothing; float16 for float32 models."""
        return half_dtype(model_dtype)

    def supports(self, spec: WeightSpec, shape: tuple[int, int]) -> list[str]:
        """Reasons against; see :meth:`Codec.supports`."""
        if not isinstance(spec, IntSpec) or spec.has_float_zeros:
            return integers_only(spec, "GPTQ")
        rows, columns = shape
        reasons = bits_reasons(spec, _BITS, "GPTQ") + group_reasons(spec, columns)
        if spec.group_size == PER_TENSOR:
            reasons.append("GPTQ has no scale per tensor: use one per channel (group size -1)")
        if not spec.symmetric and self.version == 1:
            reasons.append(
                "GPTQ v1 stores zero points minus one, on which readers disagree, and vLLM loads no asymmetric GPTQ: "
                "use --sym, or the format compressed-tensors"
            )
        if spec.scale_dtype not in (torch.float16, torch.bfloat16):
            reasons.append(f"GPTQ scales are float16 or bfloat16, not {spec.scale_dtype}")
        for count, side in ((columns, "input"), (rows, "output")):
            if count % 32:
                reasons.append(f"GPTQ packs {side} features by 32, {count} is no multiple: skip the module")
        return reasons

    def supports_inputs(self, spec: WeightSpec, inputs: ActivationSpec) -> list[str]:
        """Reasons against; see :meth:`Codec.supports_inputs`."""
        return weights_only(inputs, self.name)

    def local_names(self, spec: WeightSpec) -> frozenset[str]:
        """Names of the tensors of a module."""
        return frozenset(("qweight", "qzeros", "scales", "g_idx"))

    def encode(
        self, q: WeightTensor, input_scale: torch.Tensor | None = None, *, inputs: ActivationSpec | None = None
    ) -> dict[str, torch.Tensor]:
        """Tensors of one module. A ``group_index`` is kept in ``g_idx`` (then ``desc_act`` must be set)."""
        q = integer_weight(self, q)
        spec = q.spec
        zeros = q.zero_points if q.zero_points is not None else torch.full_like(q.scales, spec.midpoint).to(torch.uint8)
        if self.version == 1:
            zeros = zeros - 1
        return {
            "qweight": pack(q.codes, spec.bits).t().contiguous(),
            "qzeros": pack(zeros.t(), spec.bits),
            "scales": q.scales.t().contiguous(),
            "g_idx": q.columns_to_groups().to(torch.int32),
        }

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, shape: tuple[int, int]) -> QuantizedTensor:
        """Invert :meth:`encode`.

        Symmetric specs take the zero point as the midpoint, as engines do, whether it was stored minus one or not;
        any other stored value contradicts the spec. A ``g_idx`` in plain order is dropped.
        """
        spec = integer_spec(spec, self.name)
        rows, columns = shape
        qweight = required(tensors, "qweight", (columns * spec.bits // 32, rows))
        scales = required(tensors, "scales", (spec.groups(columns), rows)).t().contiguous()
        zeros = self.zero_points(tensors, spec, shape)
        codes = unpack(qweight.t(), spec.bits, columns)
        return QuantizedTensor(spec, codes, scales, zeros, _group_index(tensors, spec, columns))

    def zero_points(
        self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, shape: tuple[int, int]
    ) -> torch.Tensor | None:
        """Zero points, the minus one of version 1 undone; see :meth:`decode`."""
        spec = integer_spec(spec, self.name)
        if "qzeros" not in tensors and spec.symmetric:
            return None
        rows, columns = shape
        packed = required(tensors, "qzeros", (spec.groups(columns), rows * spec.bits // 32))
        zeros = unpack(packed, spec.bits, rows).t().contiguous()
        if not spec.symmetric:
            return (zeros + 1) & (spec.levels - 1) if self.version == 1 else zeros
        if not bool(((zeros == spec.midpoint) | (zeros == spec.midpoint - 1)).all()):
            raise CheckpointError("qzeros are not those of a symmetric weight, yet the config says sym: true")
        return None

    def config(
        self,
        plan: Mapping[str, WeightSpec],
        left_dense: Sequence[str],
        *,
        inputs: Mapping[str, ActivationSpec] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """``quantization_config``; other specs than the commonest and dense layers become ``dynamic`` rules.

        ``details`` may hold ``desc_act`` (for weights with a ``group_index``) and anything for ``meta``. Rules also
        name the merged layers (``qkv_proj``, ``gate_up_proj``, ``experts``), which vLLM 0.32 matches in place of their
        shards.
        """
        specs = {name: integer_spec(spec, self.name) for name, spec in plan.items()}
        if not specs:
            return {}
        meta = dict(details or {})
        desc_act = bool(meta.pop("desc_act", False))
        base = common_spec(specs.values())
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": base.bits,
            "group_size": base.group_size,
            "desc_act": desc_act,
            "sym": base.symmetric,
            "lm_head": "lm_head" in specs,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
        }
        if rules := _dynamic_rules(specs, left_dense, base):
            config["dynamic"] = rules
        config["meta"] = {"quantizer": [f"lowbit:{__version__}"], **meta}
        return config

    def read_plan(self, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, StoredGrid]:
        """Modules with a ``qweight``, with the config's base settings and ``dynamic`` rules."""
        layout = str(config.get("checkpoint_format") or config.get("format") or "gptq").lower()
        if config.get("is_marlin_format"):
            layout = "marlin"
        if layout not in _NAMES.values():
            raise UnsupportedError(
                f"GPTQ checkpoint_format {layout!r} cannot be read",
                ["lowbit reads gptq and gptq_v2: convert it with the tool that wrote it"],
            )
        codec = GptqCodec(2 if layout == "gptq_v2" else 1)
        rules = config.get("dynamic") or {}
        if not isinstance(rules, Mapping):
            raise CheckpointError("quantization_config: dynamic must map regular expressions to settings")
        plan: dict[str, StoredGrid] = {}
        for name in tensors:
            if name.endswith(".qweight"):
                module = name.removesuffix(".qweight")
                plan[module] = _stored_module(codec, {**config, **_override(rules, module)}, tensors, module)
        return plan


def _group_index(tensors: Mapping[str, torch.Tensor], spec: IntSpec, columns: int) -> torch.Tensor | None:
    if spec.group_size <= 0 or "g_idx" not in tensors:
        return None
    found = required(tensors, "g_idx", (columns,)).to(torch.int32)
    if torch.equal(found, torch.arange(columns, dtype=torch.int32, device=found.device) // spec.group_size):
        return None
    if int(found.min()) < 0 or int(found.max()) >= spec.groups(columns):
        raise CheckpointError(f"tensor g_idx names a group outside 0..{spec.groups(columns) - 1}")
    return found


def _dynamic_rules(plan: Mapping[str, IntSpec], left_dense: Sequence[str], base: IntSpec) -> dict[str, dict[str, Any]]:
    # Readers look for quantized layers inside the numbered blocks only, so nothing need be said of the head.
    dense = {name for name in left_dense if in_numbered_block(name)}
    by_settings: dict[tuple[int, int, bool] | None, set[str]] = {}
    for name in sorted(dense):
        by_settings.setdefault(None, set()).add(name)
    for name, spec in plan.items():
        by_settings.setdefault((spec.bits, spec.group_size, spec.symmetric), set()).add(name)
    modules = set().union(*by_settings.values())
    for names in by_settings.values():
        names |= fused_names(names, modules - names)
    rules: dict[str, dict[str, Any]] = {}
    everything = set().union(*by_settings.values())
    for settings, names in by_settings.items():
        others = everything - names
        if settings is None:
            rules |= {f"-:{pattern}": {} for pattern in patterns(sorted(names), others)}
        elif settings != (base.bits, base.group_size, base.symmetric):
            values = {"bits": settings[0], "group_size": settings[1], "sym": settings[2]}
            rules |= {f"+:{pattern}": dict(values) for pattern in patterns(sorted(names), others)}
    return rules


def _override(rules: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    for pattern, values in rules.items():
        try:
            matches = re.match(pattern[2:] if pattern[:2] in ("+:", "-:") else pattern, module)
        except re.error as error:
            raise CheckpointError(
                f"quantization_config: dynamic rule {pattern!r} is no regular expression: {error}"
            ) from error
        # A tensor that is there was quantized, whatever a skip rule says.
        if matches and not pattern.startswith("-:"):
            return values if isinstance(values, Mapping) else {}
    return {}


def _stored_module(
    codec: GptqCodec, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader], module: str
) -> StoredGrid:
    bits = integer(config, ("bits",))
    if bits not in _BITS:
        raise UnsupportedError(f"{module}: GPTQ with {bits} bits cannot be read", ["2, 3, 4 and 8 bits can"])
    qweight = stored(tensors, f"{module}.qweight", 2)
    scales = stored(tensors, f"{module}.scales", 2)
    if qweight.dtype != torch.int32:
        raise UnsupportedError(f"{module}.qweight is {qweight.dtype}", ["only int32 words can be read"])
    words, rows = qweight.shape
    columns, rest = divmod(words * 32, bits)
    spec = IntSpec(
        bits, integer(config, ("group_size",), 128) or -1, bool(config.get("sym", True)), scale_dtype=scales.dtype
    )
    expected = (spec.groups(columns), rows)
    if rest or tuple(scales.shape) != expected:
        raise CheckpointError(
            f"{module}: qweight {tuple(qweight.shape)} and scales {tuple(scales.shape)} do not fit {spec}: "
            "config and weights disagree"
        )
    return StoredGrid(codec, spec, (rows, columns))
