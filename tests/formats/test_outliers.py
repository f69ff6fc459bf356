"""Inputs under LLM.int8(): columns with outliers stay, the rest is int8, against a loop over tokens."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import UsageError
from lowbit.formats import ActivationSpec, fake_quantize, parse_scheme


def naive(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """One sequence ``[tokens, in]`` in float64."""
    tokens, columns = x.shape
    wide = {c for c in range(columns) if any(abs(float(x[t, c])) >= threshold for t in range(tokens))}
    out = torch.empty(tokens, columns, dtype=torch.float64)
    for t in range(tokens):
        small = [abs(float(v)) for v in x[t] if abs(float(v)) < threshold]
        step = max(small, default=0.0) / 127 or 1.0
        for c in range(columns):
            value = float(x[t, c])
            out[t, c] = value if c in wide else round(value / step) * step
    return out


def test_columns_with_outliers_stay() -> None:
    spec = parse_scheme("LLM_INT8").inputs
    assert spec == ActivationSpec("int8", outliers=6.0)
    assert str(spec) == "int8-token-outliers6"
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    x[0, 2, 3] = 40.0
    x[2, 0, 1] = -6.0
    found = fake_quantize(x, spec)
    for sequence in range(3):
        assert torch.allclose(found[sequence].double(), naive(x[sequence], 6.0), atol=1e-5)
    assert torch.equal(found[0, :, 3], x[0, :, 3])
    assert torch.equal(found[2, :, 1], x[2, :, 1])
    assert not torch.equal(found[1, :, 3], x[1, :, 3])


def test_an_outlier_does_not_coarsen_its_row() -> None:
    x = torch.full((4, 16), 0.5)
    x[1, 0] = 1000.0
    plain = fake_quantize(x, ActivationSpec("int8"))
    kept = fake_quantize(x, ActivationSpec("int8", outliers=6.0))
    assert float((plain - x)[1].abs().max()) > 0.4
    assert torch.allclose(kept, x, atol=1e-6)


def test_outliers_need_one_scale_per_token() -> None:
    with pytest.raises(UsageError, match="per token"):
        ActivationSpec("int8", "tensor", dynamic=False, outliers=6.0)
