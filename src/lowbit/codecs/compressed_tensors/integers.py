"""``int-quantized`` (and ``naive-quantized``): one int8 per weight, for engines that multiply in int8.

``weight`` int8 ``[out, in]`` holds signed values, ``weight_scale`` floats ``[out, 1]`` (per tensor ``[1]``, groups
``[out, groups]``), ``weight_zero_point`` int8 zero points where there are any. Widths below 8 bits take a byte, too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lowbit.codecs.codec import required
from lowbit.codecs.compressed_tensors.packed import group_index, integer_zero_points, scale_shape
from lowbit.codecs.compressed_tensors.storage import Storage, file_scales, read_scales
from lowbit.formats.spec import IntSpec
from lowbit.formats.tensor import QuantizedTensor

__all__ = ["INT8"]


def _names(spec: IntSpec) -> tuple[str, ...]:
    return ("weight", "weight_scale", *(() if spec.symmetric else ("weight_zero_point",)))


def _encode(q: QuantizedTensor) -> dict[str, torch.Tensor]:
    tensors = {"weight": _signed(q.codes, q.spec), "weight_scale": file_scales(q.scales, q.spec)}
    if q.zero_points is not None:
        tensors["weight_zero_point"] = _signed(q.zero_points, q.spec)
    return tensors


def _decode(tensors: Mapping[str, torch.Tensor], spec: IntSpec, shape: tuple[int, int]) -> QuantizedTensor:
    scales = read_scales(tensors, scale_shape(spec, shape))
    codes = required(tensors, "weight", shape).contiguous().view(torch.uint8) + spec.midpoint
    zeros = integer_zero_points(tensors, spec, shape)
    return QuantizedTensor(spec, codes, scales, zeros, group_index(tensors, spec.group_size, shape[1]))


def _signed(codes: torch.Tensor, spec: IntSpec) -> torch.Tensor:
    # uint8 subtraction wraps: what is below zero has the bits of its two's complement.
    return (codes - spec.midpoint).contiguous().view(torch.int8)


INT8 = Storage("int-quantized", _names, _encode, _decode)
"""Integers as int8."""
