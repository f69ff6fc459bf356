"""4-bit floats: ``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized``.

=======================  =============  ===================  =====================================================
``weight_packed``        uint8          ``[out, in/2]``      two E2M1 codes a byte, the even column in the low four bits
``weight_scale``         float8_e4m3fn  ``[out, in/16]``     NVFP4; MXFP4: uint8 exponents ``[out, in/32]``
``weight_global_scale``  float32        ``[1]``              NVFP4: what the scales are divided by
=======================  =============  ===================  =====================================================
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lowbit.codecs.codec import required
from lowbit.codecs.compressed_tensors.storage import Storage, read_scales
from lowbit.errors import CheckpointError
from lowbit.formats.floating import FloatSpec, FloatTensor

__all__ = ["MXFP4", "NVFP4"]


def _names(spec: FloatSpec) -> tuple[str, ...]:
    return ("weight_packed", "weight_scale", *(("weight_global_scale",) if spec.scale == "e4m3" else ()))


def _encode(q: FloatTensor) -> dict[str, torch.Tensor]:
    packed = q.codes[:, 0::2] | q.codes[:, 1::2] << 4
    tensors = {"weight_packed": packed.contiguous(), "weight_scale": q.scales.contiguous()}
    if q.global_scale is not None:
        tensors["weight_global_scale"] = q.global_scale
    return tensors


def _decode(tensors: Mapping[str, torch.Tensor], spec: FloatSpec, shape: tuple[int, int]) -> FloatTensor:
    packed = required(tensors, "weight_packed", (shape[0], shape[1] // 2))
    if packed.dtype != torch.uint8:
        raise CheckpointError(f"tensor weight_packed is {packed.dtype}, expected uint8: config and weights disagree")
    codes = torch.stack([packed & 15, packed >> 4], dim=2).reshape(shape)
    scales = read_scales(tensors, spec.scale_shape(*shape))
    if spec.scale != "e4m3":
        return FloatTensor(spec, codes, scales)
    whole = required(tensors, "weight_global_scale", (1,)).float()
    if not bool(torch.isfinite(whole).all() & (whole > 0).all()):
        raise CheckpointError(f"tensor weight_global_scale is {float(whole):g}: it must be positive and finite")
    return FloatTensor(spec, codes, scales, whole)


NVFP4 = Storage("nvfp4-pack-quantized", _names, _encode, _decode)
"""E2M1 under E4M3 scales of 16 columns and one float of the matrix."""
MXFP4 = Storage("mxfp4-pack-quantized", _names, _encode, _decode)
"""E2M1 under a power of two for every 32 columns."""
