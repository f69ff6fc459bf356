"""HQQ against the splitting written out in float64, one group at a time."""

from __future__ import annotations

import math

import pytest
import torch

from lowbit.errors import NumericsError, UsageError
from lowbit.formats import IntSpec
from lowbit.formats.integer import quantize
from lowbit.quant import METHODS, HqqOptions


def affine(bits: int, group_size: int = 64) -> IntSpec:
    return IntSpec(bits, group_size, False, zero_dtype=torch.float16)


def solve(weight: torch.Tensor, spec: IntSpec, options: HqqOptions | None = None) -> torch.Tensor:
    return METHODS["hqq"].solve(weight, None, spec, options).tensor.dequantize()


def naive_error(group: list[float], bits: int, options: HqqOptions, factors: tuple[float, ...]) -> float:
    """Least squared error of one group over all iterations and ranges."""
    top, best = 2**bits - 1, math.inf
    for factor in factors:
        low, high = min(0.0, *group) * factor, max(0.0, *group) * factor
        scale = float(torch.tensor((high - low) / top).half())
        zero, beta = -low / scale, options.beta
        for _ in range(options.iterations):
            zero = float(torch.tensor(zero).half())
            codes = [min(top, max(0, round(value / scale + zero))) for value in group]
            errors = [value - (code - zero) * scale for value, code in zip(group, codes, strict=True)]
            best = min(best, sum(error**2 for error in errors))
            terms = []
            for value, code, error in zip(group, codes, errors, strict=True):
                size = abs(error) / scale
                shrunk = max(0.0, size - max(size, 1e-12) ** (options.lp_norm - 1) / beta)
                target = value - math.copysign(shrunk * scale, error)
                terms.append(code - target / scale)
            zero = sum(terms) / len(terms)
            beta *= 1.01
    return best


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_groups_reach_the_error_of_the_splitting(bits: int) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(bits)) ** 3
    spec, options = affine(bits, 32), HqqOptions()
    found = ((solve(weight, spec) - weight).double() ** 2).view(4, 2, 32).sum(2)
    factors = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5) if bits == 2 else (1.0,)
    for row in range(4):
        for group in range(2):
            values = weight[row, 32 * group : 32 * group + 32].tolist()
            assert float(found[row, group]) == pytest.approx(naive_error(values, bits, options, factors), rel=0.02)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_better_than_the_range_alone(bits: int) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3)) ** 3
    plain = quantize(weight, affine(bits)).dequantize()
    assert float((solve(weight, affine(bits)) - weight).norm()) < 0.995 * float((plain - weight).norm())


def test_zero_points_that_are_codes() -> None:
    """For formats of engines that hold no others: compressed-tensors, AWQ."""
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(5)) + 0.3
    solution = METHODS["hqq"].solve(weight, None, IntSpec(4, 64, False))
    solution.tensor.validate("w")
    plain = quantize(weight, IntSpec(4, 64, False)).dequantize()
    assert float((solution.tensor.dequantize() - weight).norm()) <= float((plain - weight).norm())


@pytest.mark.parametrize(("columns", "group_size"), [(100, 64), (40, 64), (64, -1), (64, 0), (5, 1)])
def test_ragged_whole_and_single_groups(columns: int, group_size: int) -> None:
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(columns))
    solution = METHODS["hqq"].solve(weight, None, affine(8, group_size))
    solution.tensor.validate("w")
    assert float((solution.tensor.dequantize() - weight).norm() / weight.norm()) < 0.02


@pytest.mark.parametrize("value", [0.0, 0.7, -2.5])
def test_constant_rows_and_outliers(value: float) -> None:
    weight = torch.full((2, 64), value)
    weight[1, 7] = 1000 * (value or 1.0)
    restored = solve(weight, affine(4))
    assert bool(torch.isfinite(restored).all())
    assert float((restored[0] - value).abs().max()) <= 0.001 * abs(value)
    assert float((restored[1, 7] - weight[1, 7]).abs()) <= 0.05 * float(weight[1, 7].abs())


def test_refusals() -> None:
    assert "--asym" in METHODS["hqq"].supports(IntSpec(4))[0]
    with pytest.raises(NumericsError, match=r"proj: .*NaN"):
        METHODS["hqq"].solve(torch.full((2, 64), float("inf")), None, affine(4), name="proj")
    for wrong in ({"lp_norm": 0.0}, {"lp_norm": 1.5}, {"beta": 0.0}, {"iterations": 0}):
        with pytest.raises(UsageError, match="usual"):
            HqqOptions(**wrong)  # type: ignore[arg-type]
