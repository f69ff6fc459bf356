"""Any quantized weight and its spec: what pipeline and codecs hand on without caring which grid it is on."""

from __future__ import annotations

from typing import TypeAlias

from lowbit.formats.codebook import CodebookSpec, CodebookTensor
from lowbit.formats.dense import DenseSpec, DenseTensor
from lowbit.formats.floating import FloatSpec, FloatTensor
from lowbit.formats.spec import IntSpec
from lowbit.formats.tensor import QuantizedTensor

__all__ = ["GridSpec", "WeightSpec", "WeightTensor"]

GridSpec: TypeAlias = IntSpec | FloatSpec | CodebookSpec
"""The grids a solver can choose codes of."""

WeightSpec: TypeAlias = GridSpec | DenseSpec
"""Each has ``bits``, ``group_size``, ``scale_dtype``, ``bits_per_weight(out, in)`` and ``with_scale_dtype(dtype)``."""

WeightTensor: TypeAlias = QuantizedTensor | FloatTensor | CodebookTensor | DenseTensor
"""Each has ``spec``, ``codes``, ``shape``, ``bits_per_weight``, ``dequantize(dtype)`` and ``validate(name)``."""
