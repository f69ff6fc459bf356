"""AWQ checkpoints in the GEMM layout: 4 bits, ``qweight``, ``qzeros``, ``scales`` per module.

===========  ==============  ===================  ==========================================
``qweight``  int32           ``[in, out/8]``      codes in AWQ's nibble order
``qzeros``   int32           ``[groups, out/8]``  zero points in the same order, stored as is
``scales``   float16 (bf16)  ``[groups, out]``
===========  ==============  ===================  ==========================================

Symmetric weights go out with ``zero_point: true`` and the constant zero point 8: the same numbers, and the one form
that every reader takes (AutoAWQ writes no other, and engines give ``zero_point: false`` different meanings).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

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
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats.activations import ActivationSpec
from lowbit.formats.bits import pack_awq, unpack_awq
from lowbit.formats.spec import PER_TENSOR, IntSpec
from lowbit.formats.tensor import QuantizedTensor
from lowbit.formats.weights import WeightSpec, WeightTensor

__all__ = ["AwqCodec"]


@dataclass(frozen=True, slots=True)
class AwqCodec:
    """AWQ GEMM."""

    @property
    def name(self) -> str:
        """``awq``."""
        return "awq"

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The model's own 16-bit dtype, so that engines round nothing; float16 for float32 models."""
        return half_dtype(model_dtype)

    def supports(self, spec: WeightSpec, shape: tuple[int, int]) -> list[str]:
        """Reasons against; see :meth:`Codec.supports`."""
        if not isinstance(spec, IntSpec) or spec.has_float_zeros:
            return integers_only(spec, "AWQ")
        rows, columns = shape
        reasons = bits_reasons(spec, (4,), "AWQ") + group_reasons(spec, columns)
        if spec.group_size == PER_TENSOR:
            reasons.append("AWQ has no scale per tensor: use one per channel (group size -1)")
        if spec.scale_dtype not in (torch.float16, torch.bfloat16):
            reasons.append(f"AWQ scales are float16 or bfloat16, not {spec.scale_dtype}")
        if rows % 8:
            reasons.append(f"AWQ packs output features by 8, {rows} is no multiple: skip the module")
        return reasons

    def supports_inputs(self, spec: WeightSpec, inputs: ActivationSpec) -> list[str]:
        """Reasons against; see :meth:`Codec.supports_inputs`."""
        return weights_only(inputs, self.name)

    def local_names(self, spec: WeightSpec) -> frozenset[str]:
        """Names of the tensors of a module."""
        return frozenset(("qweight", "qzeros", "scales"))

    def encode(
        self, q: WeightTensor, input_scale: torch.Tensor | None = None, *, inputs: ActivationSpec | None = None
    ) -> dict[str, torch.Tensor]:
        """Tensors of one module."""
        q = integer_weight(self, q)
        if q.group_index is not None:
            raise UnsupportedError("AWQ has no g_idx", ["columns must be grouped in order: convert to dense instead"])
        zeros = q.zero_points
        if zeros is None:
            zeros = torch.full(q.scales.shape, q.spec.midpoint, dtype=torch.uint8, device=q.scales.device)
        return {
            "qweight": pack_awq(q.codes),
            "qzeros": pack_awq(zeros),
            "scales": q.scales.t().contiguous(),
        }

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, shape: tuple[int, int]) -> QuantizedTensor:
        """Invert :meth:`encode`; a symmetric ``spec`` needs stored zero points of 8 or none."""
        spec = integer_spec(spec, self.name)
        rows, columns = shape
        qweight = required(tensors, "qweight", (columns, rows // 8))
        scales = required(tensors, "scales", (spec.groups(columns), rows)).t().contiguous()
        return QuantizedTensor(spec, unpack_awq(qweight), scales, self.zero_points(tensors, spec, shape))

    def zero_points(
        self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, shape: tuple[int, int]
    ) -> torch.Tensor | None:
        """Zero points, stored as they are."""
        spec = integer_spec(spec, self.name)
        if "qzeros" not in tensors and spec.symmetric:
            return None
        rows, columns = shape
        zeros = unpack_awq(required(tensors, "qzeros", (spec.groups(columns), rows // 8)))
        if not spec.symmetric:
            return zeros
        if not bool((zeros == spec.midpoint).all()):
            raise CheckpointError("qzeros are not all 8, yet the weight is said to be symmetric")
        return None

    def config(
        self,
        plan: Mapping[str, WeightSpec],
        left_dense: Sequence[str],
        *,
        inputs: Mapping[str, ActivationSpec] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """``quantization_config``; :class:`UnsupportedError` unless all modules share one group size.

        Engines leave a module dense if an entry of ``modules_to_not_convert`` is a substring of its name, so a dense
        layer whose name is part of a quantized one's is refused.
        """
        if not plan:
            return {}
        sizes = sorted({integer_spec(spec, self.name).group_size for spec in plan.values()})
        if len(sizes) > 1:
            raise UnsupportedError(
                f"AWQ has one group size for the whole model, the plan has {', '.join(map(str, sizes))}",
                ["use the format compressed-tensors or gptq for mixed settings"],
            )
        for dense in left_dense:
            if clash := next((name for name in plan if dense in name), None):
                raise UnsupportedError(
                    f"AWQ readers would take {clash} for dense, since it contains the name of {dense}, which is",
                    ["quantize both or neither, or use the format compressed-tensors"],
                )
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": sizes[0],
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(left_dense),
        }

    def read_plan(self, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, StoredGrid]:
        """Modules with a ``qweight``. Accepts the spellings of AutoAWQ's own file (``w_bit``, ``q_group_size``)."""
        layout = str(config.get("version") or config.get("format") or config.get("checkpoint_format") or "gemm").lower()
        if layout != "gemm":
            raise UnsupportedError(
                f"AWQ layout {layout!r} cannot be read", ["lowbit reads gemm: repack it with AutoAWQ"]
            )
        bits = integer(config, ("w_bit", "bits"))
        group_size = integer(config, ("q_group_size", "group_size"), 128)
        if bits != 4:
            raise UnsupportedError(f"AWQ with {bits} bits cannot be read", ["4 bits can"])
        plan: dict[str, StoredGrid] = {}
        for name in tensors:
            if not name.endswith(".qweight"):
                continue
            module = name.removesuffix(".qweight")
            qweight, scales = stored(tensors, name, 2), stored(tensors, f"{module}.scales", 2)
            columns, rows = qweight.shape[0], qweight.shape[1] * 8
            spec = IntSpec(4, group_size or -1, config.get("zero_point") is False, scale_dtype=scales.dtype)
            if qweight.dtype != torch.int32 or tuple(scales.shape) != (spec.groups(columns), rows):
                raise CheckpointError(
                    f"{module}: qweight {tuple(qweight.shape)} and scales {tuple(scales.shape)} do not fit {spec}: "
                    "config and weights disagree"
                )
            plan[module] = StoredGrid(self, spec, (rows, columns))
        return plan
