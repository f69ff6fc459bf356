"""Dense checkpoints: a quantized weight written out as the floats it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.codecs.codec import StoredGrid, TensorHeader, required, weights_only
from lowbit.errors import UnsupportedError
from lowbit.formats.activations import ActivationSpec
from lowbit.formats.dense import DenseSpec, DenseTensor
from lowbit.formats.weights import WeightSpec, WeightTensor

__all__ = ["DenseCodec"]


@dataclass(frozen=True, slots=True)
class DenseCodec:
    """``weight`` in ``spec.scale_dtype``, which is the model's dtype: runs everywhere, saves no memory."""

    @property
    def name(self) -> str:
        """``dense``."""
        return "dense"

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The model's own dtype."""
        return model_dtype

    def supports(self, spec: WeightSpec, shape: tuple[int, int]) -> list[str]:
        """Anything can be written out as floats."""
        return []

    def supports_inputs(self, spec: WeightSpec, inputs: ActivationSpec) -> list[str]:
        """Reasons against; see :meth:`Codec.supports_inputs`."""
        return weights_only(inputs, self.name)

    def local_names(self, spec: WeightSpec) -> frozenset[str]:
        """``weight`` alone."""
        return frozenset(("weight",))

    def encode(
        self, q: WeightTensor, input_scale: torch.Tensor | None = None, *, inputs: ActivationSpec | None = None
    ) -> dict[str, torch.Tensor]:
        """The weight, computed in float32 and rounded to the dtype of the scales."""
        return {"weight": q.dequantize(q.spec.scale_dtype)}

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, shape: tuple[int, int]) -> WeightTensor:
        """The floats of a weight that is not quantized; raises for others: floats don't say which grid they are on."""
        if isinstance(spec, DenseSpec):
            return DenseTensor(spec, required(tensors, "weight", shape))
        raise UnsupportedError("a dense weight has no quantization grid to read", ["quantize it with lowbit quantize"])

    def zero_points(
        self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, shape: tuple[int, int]
    ) -> torch.Tensor | None:
        """None: floats have none."""
        return None

    def config(
        self,
        plan: Mapping[str, WeightSpec],
        left_dense: Sequence[str],
        *,
        inputs: Mapping[str, ActivationSpec] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Empty: a dense checkpoint has no ``quantization_config``."""
        return {}

    def read_plan(self, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, StoredGrid]:
        """Empty: nothing is quantized."""
        return {}
