"""8-bit floats: ``float-quantized`` (FP8) and ``mxfp8-quantized``.

``weight`` float8_e4m3fn ``[out, in]``; ``weight_scale`` floats ``[1]``, ``[out, 1]`` or ``[ceil(out/128), in/128]``,
or for MXFP8 the uint8 exponents (E8M0) of powers of two ``[out, in/32]``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lowbit.codecs.codec import required
from lowbit.codecs.compressed_tensors.storage import Storage, file_scales, read_scales
from lowbit.errors import CheckpointError
from lowbit.formats.floating import FloatSpec, FloatTensor

__all__ = ["FLOAT8", "MXFP8", "decode_float8"]


def decode_float8(
    tensors: Mapping[str, torch.Tensor], spec: FloatSpec, shape: tuple[int, int], scale: str = "weight_scale"
) -> FloatTensor:
    """The weight of a module whose scales are in the tensor ``scale``."""
    weight = required(tensors, "weight", shape)
    if weight.dtype != torch.float8_e4m3fn:
        raise CheckpointError(f"tensor weight is {weight.dtype}, expected float8_e4m3fn: config and weights disagree")
    scales = read_scales(tensors, spec.scale_shape(*shape), scale)
    return FloatTensor(spec, weight.contiguous().view(torch.uint8), scales)


def _names(spec: FloatSpec) -> tuple[str, ...]:
    return ("weight", "weight_scale")


def _encode(q: FloatTensor) -> dict[str, torch.Tensor]:
    return {"weight": q.codes.contiguous().view(torch.float8_e4m3fn), "weight_scale": file_scales(q.scales, q.spec)}


FLOAT8 = Storage("float-quantized", _names, _encode, decode_float8)
"""FP8 with float scales."""
MXFP8 = Storage("mxfp8-quantized", _names, _encode, decode_float8)
"""FP8 with a power of two for every 32 columns."""
