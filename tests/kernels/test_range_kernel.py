"""The compiled range search against the torch reference."""

from __future__ import annotations

import pytest
import torch

from lowbit.formats import IntSpec
from lowbit.formats.integer import choose_range, grid, group_extrema, quantize_dequantize
from lowbit.kernels import best_candidate, best_candidate_reference
from lowbit.quant.ranges import choose_grid


@pytest.mark.parametrize("rows", [1, 15, 16, 70])
@pytest.mark.parametrize("columns", [96, 100])
@pytest.mark.parametrize("spec", [IntSpec(4, 32, True), IntSpec(3, 48, False)], ids=str)
def test_numba_loses_nothing_to_the_reference(rows: int, columns: int, spec: IntSpec) -> None:
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator).pow(3)
    importance = torch.rand(columns, generator=generator)
    low, high = group_extrema(weight, spec)
    grids = [grid(low * factor, high * factor, spec) for factor in (1.1, 1.0, 0.9, 0.8, 0.6, 0.4)]
    scales = torch.stack([s.float() for s, _ in grids])
    zeros = torch.stack([torch.full_like(s.float(), spec.midpoint) if z is None else z.float() for s, z in grids])
    found = best_candidate(weight, scales, zeros, importance, spec.levels, spec.group_size)
    expected = best_candidate_reference(weight, scales, zeros, importance, spec.levels, spec.group_size)
    assert found.unique().numel() > 1 or rows == 1

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        zero = None if spec.symmetric else zeros.gather(0, chosen[None])[0]
        rounded = quantize_dequantize(weight, spec, scales.gather(0, chosen[None])[0], zero)
        return ((rounded - weight).square() * importance).sum(1)

    assert torch.allclose(loss(found), loss(expected), rtol=1e-5)


@pytest.mark.parametrize("size", [16, -1, 0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_choose_grid_agrees_with_the_plain_search(size: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(20, 48, generator=generator).pow(3)
    importance = torch.rand(48, generator=generator)
    spec = IntSpec(3, size, symmetric)
    found = choose_grid(weight, spec, "mse", importance=importance)
    expected = choose_range(weight, spec, method="mse", importance=importance)
    losses = [((quantize_dequantize(weight, spec, *g) - weight).square() * importance).sum() for g in (found, expected)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-4)
    assert found[0].shape == expected[0].shape
    assert found[0].dtype == spec.scale_dtype
