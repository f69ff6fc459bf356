"""Dense output in the model's dtype, of every number format whose scales have it."""

from __future__ import annotations

import pytest
import torch

from lowbit.codecs import CODECS
from lowbit.formats import parse_spec
from lowbit.formats.rounding import round_weight

SPECS = ["int4-g32-sym", "int3-g32-asym", "int4-g64-affine", "fp8-channel", "nf4-b64", "fp4-b64-dq"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("text", SPECS)
def test_the_weight_has_the_models_dtype(text: str, dtype: torch.dtype) -> None:
    codec = CODECS["dense"]
    spec = parse_spec(text).with_scale_dtype(codec.scale_dtype(dtype))
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    rounded = round_weight(weight, spec)
    stored = codec.encode(rounded)["weight"]
    assert stored.dtype is dtype
    assert torch.equal(stored, rounded.dequantize().to(dtype))


@pytest.mark.parametrize("text", ["nf4-b64", "fp4-b64-dq"])
def test_block_maxima_stay_float32(text: str) -> None:
    """Whatever dtype values are written out in; and bitsandbytes' files know no other."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    half = round_weight(weight, parse_spec(text).with_scale_dtype(torch.bfloat16))
    full = round_weight(weight, parse_spec(text))
    assert torch.equal(half.dequantize(), full.dequantize())
    assert CODECS["bitsandbytes"].scale_dtype(torch.bfloat16) is torch.float32
