"""The compiled GPTQ loops against the torch reference, bit for bit."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowbit.formats import IntSpec
from lowbit.formats.codebook import CODEBOOKS, sorted_table
from lowbit.formats.floating import Element, decode_elements, round_elements
from lowbit.formats.integer import choose_range
from lowbit.kernels.gptq import Block, quantize_columns, quantize_columns_reference
from lowbit.quant.ranges import float_grid

Kernel = Callable[[Block, torch.Tensor, torch.Tensor, int, int], None]


def _problem(
    rows: int, width: int, columns: int, start: int, spec: IntSpec
) -> tuple[Block, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    inputs = torch.randn(3 * width, width, generator=generator, dtype=torch.float64)
    inputs[:, 1:] += inputs[:, :-1]
    inverse = torch.linalg.cholesky(torch.linalg.inv(inputs.T @ inputs), upper=True).float().contiguous()
    weight = torch.randn(rows, columns, generator=generator)
    grid = float_grid(*choose_range(weight, spec), spec, rows)
    groups = (torch.arange(width, dtype=torch.int32) + start) // spec.group_size
    current = weight[:, start : start + width].contiguous()
    codes = torch.full((rows, columns), 99, dtype=torch.uint8)
    return Block(start, spec.levels, current, inverse, groups, codes, weight), *grid


def _copy(block: Block, device: str = "cpu") -> Block:
    tensors = (block.current, block.inverse, block.groups, block.codes, block.residual)
    copies = (tensor.clone().to(device) for tensor in tensors)
    return Block(block.start, block.levels, *copies, grid=block.grid, keep=block.keep)


def _check(
    kernel: Kernel,
    rows: int,
    width: int,
    spec: IntSpec,
    device: str = "cpu",
    grid: Element | torch.Tensor | None = None,
    masked: bool = False,
) -> None:
    block, scales, zeros = _problem(rows, width, columns=width + 24, start=16, spec=spec)
    weight = block.residual.clone()
    if grid is not None:
        # some weights beyond the largest value, some next to zero
        largest = float(grid.abs().max()) if isinstance(grid, torch.Tensor) else {"e4m3": 448.0, "e2m1": 6.0}[grid]
        scales = scales * spec.levels / largest * torch.logspace(-5, 0, scales.numel(), base=2).view(scales.shape)
        zeros = scales
    kept = torch.rand(rows, width, generator=torch.Generator().manual_seed(5)) > 0.4
    block = dataclasses.replace(block, grid=grid, keep=kept.float() if masked else None)
    expected, found = _copy(block), _copy(block, device)
    for first, last in ((0, width // 3), (width // 3, width)):
        quantize_columns_reference(expected, scales, zeros, first, last)
        kernel(found, scales.to(device), zeros.to(device), first, last)
        assert torch.equal(expected.current[:, last:], found.current[:, last:].cpu())
        assert torch.equal(expected.codes, found.codes.cpu())
        assert torch.equal(expected.residual, found.residual.cpu())
    assert (expected.codes[:, :16] == 99).all()
    values = weight[:, 16 : 16 + width] - expected.residual[:, 16 : 16 + width]
    if masked:
        assert not bool(values[~kept].any())
    if isinstance(grid, str):
        steps = scales[:, block.groups.long()]
        # the values are known from a difference of larger numbers
        inexact = 1e-6 * (weight[:, 16 : 16 + width].abs() + values.abs()) / steps
        assert bool(((round_elements(values / steps, grid) - values / steps).abs() <= inexact).all())
    else:
        assert expected.codes[:, 16 : 16 + width].unique().numel() > 2


@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grid", ["e4m3", "e2m1", "nf4", "fp4", None])
def test_numba_gives_the_bits_of_the_reference_on_every_grid(rows: int, masked: bool, grid: Any) -> None:
    table = sorted_table(grid)[0] if grid in CODEBOOKS else grid
    _check(quantize_columns, rows, 48, IntSpec(3, 20, False), grid=table, masked=masked)


@pytest.mark.parametrize("element", ["e4m3", "e2m1"])
def test_numba_rounds_every_kind_of_number_as_torch_does(element: Element) -> None:
    """Half-way cases of every exponent, subnormal and saturated numbers, zeros of both signs."""
    codes = torch.arange(256 if element == "e4m3" else 16).to(torch.uint8)
    levels = decode_elements(codes[(codes & 0x7F) != 0x7F], element).unique()
    middle = (levels[1:] + levels[:-1]) / 2
    cases = [levels, middle, torch.nextafter(middle, torch.tensor(1e9)), torch.nextafter(middle, torch.tensor(-1e9))]
    values = torch.cat([*cases, torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e9, -1e9])])[:, None].contiguous()
    residual, ones = values.clone(), torch.ones(len(values), 1)
    codes = torch.zeros(values.shape, dtype=torch.uint8)
    block = Block(0, 0, values.clone(), torch.ones(1, 1), torch.zeros(1, dtype=torch.int32), codes, residual, element)
    quantize_columns(block, ones, ones, 0, 1)
    assert torch.equal(values - round_elements(values, element), residual)


@pytest.mark.parametrize("rows", [1, 63, 64, 200])
@pytest.mark.parametrize("spec", [IntSpec(4, 32, True), IntSpec(3, 20, False), IntSpec(2, 16, True)], ids=str)
def test_numba_gives_the_bits_of_the_reference(rows: int, spec: IntSpec) -> None:
    _check(quantize_columns, rows, 48, spec)


def test_the_number_of_threads_changes_nothing() -> None:
    block, scales, zeros = _problem(300, 64, columns=96, start=0, spec=IntSpec(4, 32, False))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            run = _copy(block)
            quantize_columns(run, scales, zeros, 0, 64)
            results.append(run)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0].codes, results[1].codes)
    assert torch.equal(results[0].residual, results[1].residual)


@pytest.mark.parametrize("spec", [IntSpec(4, 32, True), IntSpec(3, 20, False)], ids=str)
def test_triton_gives_the_bits_of_the_reference(spec: IntSpec) -> None:
    pytest.importorskip("triton")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    from lowbit.kernels.gptq_triton import quantize_columns_triton

    _check(quantize_columns_triton, 37, 48, spec, device="cpu" if interpreted else "cuda")
