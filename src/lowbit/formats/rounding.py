"""Making a matrix of any number format: rounded to nearest, or blank."""

from __future__ import annotations

import torch

from lowbit.formats import codebook, floating, integer
from lowbit.formats.codebook import CodebookSpec, CodebookTensor, nest
from lowbit.formats.dense import DenseSpec, DenseTensor
from lowbit.formats.floating import FloatSpec, FloatTensor
from lowbit.formats.spec import PER_TENSOR
from lowbit.formats.tensor import QuantizedTensor
from lowbit.formats.weights import WeightSpec, WeightTensor

__all__ = ["blank_weight", "round_weight"]


def round_weight(weight: torch.Tensor, spec: WeightSpec) -> WeightTensor:
    """``weight`` float32 ``[out, in]`` in the format ``spec``, each scale from its largest weight.

    Raises :class:`lowbit.errors.NumericsError` when a weight is not finite.
    """
    if isinstance(spec, FloatSpec):
        return floating.quantize(weight, spec)
    if isinstance(spec, CodebookSpec):
        return codebook.quantize(weight, spec)
    if isinstance(spec, DenseSpec):
        kept = DenseTensor(spec, weight.to(spec.scale_dtype))
        kept.validate("weight")
        return kept
    return integer.quantize(weight, spec)


def blank_weight(spec: WeightSpec, shape: tuple[int, int]) -> WeightTensor:
    """Codes and scales of zero for a ``shape`` (out, in) matrix, on the default device: for its dtypes and shapes."""
    if isinstance(spec, DenseSpec):
        return DenseTensor(spec, torch.zeros(shape, dtype=spec.scale_dtype))
    codes = torch.zeros(shape, dtype=torch.uint8)
    if isinstance(spec, FloatSpec):
        stored = {"float": spec.scale_dtype, "e4m3": torch.float8_e4m3fn, "e8m0": torch.uint8}[spec.scale]
        whole = torch.ones(1) if spec.scale == "e4m3" else None
        return FloatTensor(spec, codes, torch.zeros(spec.scale_shape(*shape), dtype=stored), whole)
    if isinstance(spec, CodebookSpec):
        maxima = torch.zeros(spec.blocks(*shape))
        return CodebookTensor(spec, codes, nest(maxima) if spec.double_quant else maxima)
    scales = (1, 1) if spec.group_size == PER_TENSOR else (shape[0], spec.groups(shape[1]))
    zeros = None if spec.symmetric else torch.zeros(scales, dtype=spec.zero_dtype)
    return QuantizedTensor(spec, codes, torch.zeros(scales, dtype=spec.scale_dtype), zeros)
