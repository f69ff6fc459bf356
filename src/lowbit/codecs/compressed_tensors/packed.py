"""``pack-quantized``: integers of 2 to 8 bits packed into 32-bit words.

=======================  ======  ============================  ===============================================
``weight_packed``        int32   ``[out, ceil(in*b/32)]``      codes packed along a row
``weight_scale``         float   ``[out, groups]``             per tensor: ``[1]``
``weight_shape``         int64   ``[2]``                       ``(out, in)``
``weight_zero_point``    int32   ``[ceil(out*b/32), groups]``  asymmetric only, packed along the outputs
=======================  ======  ============================  ===============================================

A code is the signed value plus ``2**(bits-1)``, for weights and zero points alike. Packing is dense since
compressed-tensors 0.17; before, 3, 5, 6 and 7 bits left the top bits of a word unused. Files don't say which: the
number of words does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lowbit.codecs.codec import required
from lowbit.codecs.compressed_tensors.storage import Storage, file_scales, read_scales
from lowbit.errors import CheckpointError
from lowbit.formats.bits import dense_words, pack, sparse_words, unpack, unpack_sparse
from lowbit.formats.spec import PER_TENSOR, IntSpec
from lowbit.formats.tensor import QuantizedTensor

__all__ = ["PACKED", "group_index", "integer_zero_points", "scale_shape"]


def scale_shape(spec: IntSpec, shape: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scales of an integer matrix."""
    return (1, 1) if spec.group_size == PER_TENSOR else (shape[0], spec.groups(shape[1]))


def integer_zero_points(
    tensors: Mapping[str, torch.Tensor], spec: IntSpec, shape: tuple[int, int]
) -> torch.Tensor | None:
    """Zero points, packed along the outputs (densely or not, as their number of words says) or as int8."""
    if spec.symmetric:
        return None
    expected = scale_shape(spec, shape)
    found = tensors.get("weight_zero_point")
    if found is None:
        raise CheckpointError("tensor weight_zero_point is missing: the checkpoint is incomplete, fetch it again")
    rows, groups = expected
    if found.dtype == torch.int8 and found.numel() == rows * groups:
        # uint8 addition wraps, which is what turns two's complement into an offset.
        return (found.contiguous().view(torch.uint8) + spec.midpoint).reshape(expected)
    if tuple(found.shape) == (sparse_words(rows, spec.bits), groups) != (dense_words(rows, spec.bits), groups):
        return unpack_sparse(found, spec.bits, rows, 0)
    return unpack(required(tensors, "weight_zero_point", (dense_words(rows, spec.bits), groups)), spec.bits, rows, 0)


def group_index(tensors: Mapping[str, torch.Tensor], group_size: int, columns: int) -> torch.Tensor | None:
    """The order of columns in ``weight_g_idx``; None when it says what holds without it."""
    if group_size <= 0 or "weight_g_idx" not in tensors:
        return None
    found = required(tensors, "weight_g_idx", (columns,)).to(torch.int32)
    if torch.equal(found, torch.arange(columns, dtype=torch.int32, device=found.device) // group_size):
        return None
    if int(found.min()) < 0 or int(found.max()) >= columns // group_size:
        raise CheckpointError("tensor weight_g_idx names a group that has no scale")
    return found


def _names(spec: IntSpec) -> tuple[str, ...]:
    return ("weight_packed", "weight_shape", "weight_scale", *(() if spec.symmetric else ("weight_zero_point",)))


def _encode(q: QuantizedTensor) -> dict[str, torch.Tensor]:
    tensors = {
        "weight_packed": pack(q.codes, q.spec.bits),
        "weight_scale": file_scales(q.scales, q.spec),
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if q.zero_points is not None:
        tensors["weight_zero_point"] = pack(q.zero_points, q.spec.bits, dim=0)
    return tensors


def _decode(tensors: Mapping[str, torch.Tensor], spec: IntSpec, shape: tuple[int, int]) -> QuantizedTensor:
    if "weight_shape" in tensors and tuple(tensors["weight_shape"].tolist()) != shape:
        raise CheckpointError(f"tensor weight_shape says {tensors['weight_shape'].tolist()}, expected {list(shape)}")
    scales = read_scales(tensors, scale_shape(spec, shape))
    rows, columns = shape
    words = tensors["weight_packed"].shape[-1] if "weight_packed" in tensors else 0
    if words == sparse_words(columns, spec.bits) != dense_words(columns, spec.bits):
        codes = unpack_sparse(tensors["weight_packed"], spec.bits, columns)
    else:
        codes = unpack(required(tensors, "weight_packed", (rows, dense_words(columns, spec.bits))), spec.bits, columns)
    zeros = integer_zero_points(tensors, spec, shape)
    return QuantizedTensor(spec, codes, scales, zeros, group_index(tensors, spec.group_size, columns))


PACKED = Storage("pack-quantized", _names, _encode, _decode)
"""Integers packed into words."""
