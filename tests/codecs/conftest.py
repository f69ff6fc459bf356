"""Random quantized tensors and ways to look at packed words without lowbit's own unpacking."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lowbit.formats import IntSpec, QuantizedTensor

MakeQuantized = Callable[..., QuantizedTensor]


def build(spec: IntSpec, rows: int, columns: int, *, seed: int = 0, least_zero: int = 0) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 1) if spec.group_size == 0 else (rows, spec.groups(columns))
    codes = torch.randint(0, spec.levels, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(shape, generator=generator) * 0.1 + 0.01).to(spec.scale_dtype)
    zeros = None
    if not spec.symmetric:
        zeros = torch.randint(least_zero, spec.levels, shape, dtype=torch.uint8, generator=generator)
    return QuantizedTensor(spec, codes, scales, zeros)


@pytest.fixture(scope="session")
def make_quantized() -> MakeQuantized:
    """``make_quantized(spec, rows, columns, seed=0, least_zero=0)``: random codes, scales and zero points."""
    return build
