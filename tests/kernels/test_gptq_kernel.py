"""The compiled GPTQ loops against the torch reference, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

from lowbit.formats import IntSpec
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
    return Block(block.start, block.levels, *(tensor.clone().to(device) for tensor in tensors))


def _check(kernel: Kernel, rows: int, width: int, spec: IntSpec, device: str = "cpu") -> None:
    block, scales, zeros = _problem(rows, width, columns=width + 24, start=16, spec=spec)
    expected, found = _copy(block), _copy(block, device)
    for first, last in ((0, width // 3), (width // 3, width)):
        quantize_columns_reference(expected, scales, zeros, first, last)
        kernel(found, scales.to(device), zeros.to(device), first, last)
        assert torch.equal(expected.current[:, last:], found.current[:, last:].cpu())
        assert torch.equal(expected.codes, found.codes.cpu())
        assert torch.equal(expected.residual, found.residual.cpu())
    assert (expected.codes[:, :16] == 99).all()
    assert expected.codes[:, 16 : 16 + width].unique().numel() > 2


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
