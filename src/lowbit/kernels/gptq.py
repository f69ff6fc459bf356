"""The inner loop of GPTQ: quantize the columns of a block one after the other, each correcting those to its right.

One reference in torch, a compiled loop for the CPU (numba) and one for CUDA (Triton). All three do the same float32
operations in the same order and fuse no multiplication into an addition, so that their codes agree. The one for CUDA
knows integers without zeros only; the others round to small floats and tables as well, and leave zeros where a mask
says so.
"""

from __future__ import annotations

import torch

from lowbit.formats.floating import round_elements
from lowbit.kernels.block import Block

__all__ = ["Block", "quantize_columns", "quantize_columns_reference"]


def quantize_columns(block: Block, scales: torch.Tensor, zeros: torch.Tensor, first: int, last: int) -> None:
    """Quantize columns ``first .. last`` of ``block`` on the grid ``scales``, ``zeros`` (float32 ``[out, groups]``).

    Each row is independent of the others, so the result does not depend on the number of threads.
    """
    if block.current.device.type == "cpu":
        from lowbit.kernels.gptq_numba import quantize_columns_numba

        quantize_columns_numba(block, scales, zeros, first, last)
    elif block.current.device.type == "cuda" and block.grid is None and block.keep is None:
        from lowbit.kernels.gptq_triton import quantize_columns_triton

        quantize_columns_triton(block, scales, zeros, first, last)
    else:
        quantize_columns_reference(block, scales, zeros, first, last)


def quantize_columns_reference(block: Block, scales: torch.Tensor, zeros: torch.Tensor, first: int, last: int) -> None:
    """:func:`quantize_columns` in torch, one column at a time; small floats leave ``codes`` as they are."""
    current, inverse, grid = block.current, block.inverse, block.grid
    bounds = (grid[1:] + grid[:-1]) / 2 if isinstance(grid, torch.Tensor) else None
    for column in range(first, last):
        group = int(block.groups[column])
        step, zero = scales[:, group], zeros[:, group]
        keep = 1.0 if block.keep is None else block.keep[:, column]
        if bounds is not None and isinstance(grid, torch.Tensor):
            nearest = torch.bucketize(current[:, column] / step * keep, bounds)
            value = grid[nearest] * step
            block.codes[:, block.start + column] = nearest.to(torch.uint8)
        elif isinstance(grid, str):
            value = round_elements(current[:, column] / step * keep, grid) * step
        else:
            code = (((current[:, column] / step).round() + zero).clamp(0, block.levels - 1) - zero) * keep
            value = code * step
            block.codes[:, block.start + column] = (code + zero).to(torch.uint8)
        block.residual[:, block.start + column] -= value
        error = (current[:, column] - value) / inverse[column, column]
        current[:, column + 1 :] -= error[:, None] * inverse[column, column + 1 :]
