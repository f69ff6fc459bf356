"""The inner loop of GPTQ on CUDA: a program keeps a tile of rows in registers and walks through the columns."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lowbit.kernels.block import Block

__all__ = ["quantize_columns_triton"]

_ROWS = 16


def quantize_columns_triton(block: Block, scales: torch.Tensor, zeros: torch.Tensor, first: int, last: int) -> None:
    """:func:`lowbit.kernels.gptq.quantize_columns_reference` in one launch, with the same bits as a result."""
    rows, width = block.current.shape
    _quantize[(triton.cdiv(rows, _ROWS),)](
        block.current,
        block.inverse,
        scales,
        zeros,
        block.groups,
        block.codes,
        block.residual,
        rows,
        width,
        block.codes.shape[1],
        scales.shape[1],
        float(block.levels - 1),
        block.start,
        first,
        last,
        ROWS=_ROWS,
        WIDTH=triton.next_power_of_2(width),
        enable_fp_fusion=False,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _quantize(
    current: Any,
    inverse: Any,
    scales: Any,
    zeros: Any,
    groups: Any,
    codes: Any,
    residual: Any,
    rows: Any,
    width: Any,
    columns: Any,
    group_count: Any,
    top: Any,
    start: Any,
    first: Any,
    last: Any,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, WIDTH)
    live = row < rows
    inside = live[:, None] & (column < width)[None, :]
    cells = row[:, None] * width + column[None, :]
    tile = tl.load(current + cells, mask=inside, other=0.0)
    for this in range(first, last):
        group = tl.load(groups + this)
        step = tl.load(scales + row * group_count + group, mask=live, other=1.0)
        zero = tl.load(zeros + row * group_count + group, mask=live, other=0.0)
        weight = tl.sum(tl.where(column[None, :] == this, tile, 0.0), axis=1)
        # adding and taking away 1.5 * 2**23 rounds half to even; the clamp beforehand keeps the sum in range
        code = tl.minimum(tl.maximum(tl.div_rn(weight, step), -zero), top - zero)
        code = (code + 12582912.0) - 12582912.0
        value = code * step
        target = row * columns + start + this
        tl.store(codes + target, (code + zero).to(tl.uint8), mask=live)
        original = tl.load(residual + target, mask=live, other=0.0)
        tl.store(residual + target, original - value, mask=live)
        pivot = tl.load(inverse + this * width + this)
        factor = tl.load(inverse + this * width + column, mask=column < width, other=0.0)
        error = tl.div_rn(weight - value, tl.zeros_like(weight) + pivot)
        tile = tl.where(column[None, :] > this, tile - error[:, None] * factor[None, :], tile)
    tl.store(current + cells, tile, mask=inside & (column >= last)[None, :])
