"""The inner loop of GPTQ: quantize the columns of a block one after the other, each correcting those to its right.

One reference in torch, a compiled loop for the CPU (numba) and one for CUDA (Triton). All three do the same float32
operations in the same order and fuse no multiplication into an addition, so that their codes agree.
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
    if block.element is not None:
        # The even loop of the compiled kernels is for integers.
        quantize_columns_reference(block, scales, zeros, first, last)
    elif block.current.device.type == "cpu":
        from lowbit.kernels.gptq_numba import quantize_columns_numba

        quantize_columns_numba(block, scales, zeros, first, last)
    elif block.current.device.type == "cuda":
        from lowbit.kernels.gptq_triton import quantize_columns_triton

        quantize_columns_triton(block, scales, zeros, first, last)
    else:
        quantize_columns_reference(block, scales, zeros, first, last)


def quantize_columns_reference(block: Block, scales: torch.Tensor, zeros: torch.Tensor, first: int, last: int) -> None:
    """:func:`quantize_columns` in torch, one column at a time; small floats leave ``codes`` as they are."""
    current, inverse = block.current, block.inverse
    for column in range(first, last):
        group = int(block.groups[column])
        step, zero = scales[:, group], zeros[:, group]
        if block.element is not None:
            value = round_elements(current[:, column] / step, block.element) * step
        else:
            code = ((current[:, column] / step).round() + zero).clamp(0, block.levels - 1)
            value = (code - zero) * step
            block.codes[:, block.start + column] = code.to(torch.uint8)
        block.residual[:, block.start + column] -= value
        error = (current[:, column] - value) / inverse[column, column]
        current[:, column + 1 :] -= error[:, None] * inverse[column, column + 1 :]
