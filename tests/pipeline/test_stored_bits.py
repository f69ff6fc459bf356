"""Bits per weight are those in the file, as ``lowbit inspect`` counts them from its headers."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.evaluation.inspect import inspect_checkpoint
from lowbit.pipeline.quantize import quantize


@pytest.mark.parametrize(
    ("scheme", "fmt", "expected"),
    [
        # ten codes to an int32: 3.2 bits each, and a float16 scale and zero point for every 64
        ("int3-g64-affine", "hqq", 3.2 + 32 / 64),
        ("int3-g64-sym", "compressed-tensors", 3 + 16 / 64),
    ],
)
def test_they_are_those_in_the_file(scheme: str, fmt: str, expected: float, tiny_llama: Path, tmp_path: Path) -> None:
    method = "hqq" if fmt == "hqq" else "rtn"
    result = quantize(tiny_llama, tmp_path / "out", scheme=scheme, format=fmt, method=method)
    assert result.linear_bits_per_weight == pytest.approx(expected, rel=0.02)
    found = inspect_checkpoint(tmp_path / "out").linear_bits_per_weight
    # shapes and the like are a few hundred bytes of each of these tiny matrices
    assert result.linear_bits_per_weight <= found < 1.2 * result.linear_bits_per_weight
