from __future__ import annotations

import pytest
import torch

from lowbit.errors import NumericsError, UsageError
from lowbit.formats import PER_CHANNEL, PER_TENSOR, IntSpec
from lowbit.formats.integer import choose_range, encode, group_extrema, quantize, quantize_dequantize

SPECS = [
    IntSpec(bits, size, sym) for bits in (2, 3, 4, 8) for size in (16, PER_CHANNEL, PER_TENSOR) for sym in (True, False)
]


def _weight(rows: int = 12, columns: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, columns, generator=generator) * torch.rand(columns, generator=generator)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_minmax_is_off_by_half_a_step_at_most(spec: IntSpec) -> None:
    weight = _weight()
    quantized = quantize(weight, spec)
    quantized.validate("weight")
    step = quantized.scales.float()[:, quantized.columns_to_groups()]
    # rounding the scale to float16 and the zero point to an integer moves the ends by as much again
    slack = 0.5 + (0.5 if not spec.symmetric else 0.0) + spec.levels * 2**-11
    assert ((quantized.dequantize() - weight).abs() <= slack * step).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_code_is_the_nearest_of_all(spec: IntSpec) -> None:
    weight = _weight()
    quantized = quantize(weight, spec)
    groups = quantized.columns_to_groups()
    zero = spec.midpoint if quantized.zero_points is None else quantized.zero_points.float()[:, groups]
    step = quantized.scales.float()[:, groups]
    every = torch.stack([(code - zero) * step for code in range(spec.levels)])
    nearest = (every - weight).abs().amin(0)
    assert torch.allclose((quantized.dequantize() - weight).abs(), nearest, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_mse_never_loses_to_minmax_and_obeys_importance(spec: IntSpec) -> None:
    weight = _weight()
    weight[:, 3] *= 20
    importance = torch.rand(64, generator=torch.Generator().manual_seed(2)) + 0.1
    importance[3] = 1e-4

    def loss(scales: torch.Tensor, zeros: torch.Tensor | None) -> float:
        return float(((quantize_dequantize(weight, spec, scales, zeros) - weight).square() * importance).sum())

    plain = loss(*choose_range(weight, spec))
    searched = loss(*choose_range(weight, spec, method="mse", importance=importance))
    assert searched <= plain * 1.001
    if spec.bits in (3, 4):
        assert searched < 0.9 * plain


def test_quantize_dequantize_is_encode_then_dequantize() -> None:
    weight = _weight()
    for spec in SPECS:
        quantized = quantize(weight, spec)
        direct = quantize_dequantize(weight, spec, quantized.scales, quantized.zero_points)
        assert torch.equal(direct, quantized.dequantize())


def test_ragged_last_group() -> None:
    weight = _weight(columns=40)
    quantized = quantize(weight, IntSpec(4, 16))
    assert quantized.scales.shape == (12, 3)
    low, high = group_extrema(weight, IntSpec(4, 16))
    assert torch.equal(high[:, 2], weight[:, 32:].amax(1).clamp_min(0))
    assert torch.equal(low[:, 2], weight[:, 32:].amin(1).clamp_max(0))
    assert (quantized.dequantize() - weight).abs().max() < 0.3


def test_group_index_picks_the_scale() -> None:
    weight = _weight(columns=32)
    spec = IntSpec(4, 16, symmetric=False)
    scales, zeros = choose_range(weight, spec)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    index = (torch.arange(32, dtype=torch.int32) // 16)[order]
    assert torch.equal(
        encode(weight[:, order], spec, scales, zeros, index), encode(weight, spec, scales, zeros)[:, order]
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [0.0, 1e-9])
def test_empty_and_tiny_groups_have_scale_one(symmetric: bool, value: float) -> None:
    quantized = quantize(torch.full((2, 32), value), IntSpec(4, 16, symmetric))
    assert (quantized.scales == 1).all()
    assert (quantized.dequantize() == 0).all()


def test_constant_groups_survive_asymmetrically() -> None:
    for value in (0.7, -0.7):
        quantized = quantize(torch.full((2, 32), value), IntSpec(4, 16, symmetric=False))
        assert torch.allclose(quantized.dequantize(), torch.full((2, 32), value), rtol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = _weight()
    weight[3, 5] = bad
    for spec in SPECS:
        with pytest.raises(NumericsError, match="NaN or infinite"):
            quantize(weight, spec)


def test_a_scale_beyond_float16_is_refused() -> None:
    with pytest.raises(NumericsError, match="bfloat16"):
        quantize(torch.full((1, 16), 1e6), IntSpec(4, 16))
    assert torch.isfinite(quantize(torch.full((1, 16), 1e6), IntSpec(4, 16, scale_dtype=torch.bfloat16)).scales).all()


def test_unknown_method() -> None:
    with pytest.raises(UsageError, match="minmax"):
        choose_range(_weight(), IntSpec(4, 16), method="best")  # type: ignore[arg-type]
