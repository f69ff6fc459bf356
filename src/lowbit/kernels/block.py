"""What every implementation of GPTQ's inner loop works on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.formats.floating import Element

__all__ = ["Block"]


@dataclass(frozen=True, slots=True)
class Block:
    """Columns ``start .. start + width`` of a matrix ``[out, in]`` on their way to codes; every array is contiguous.

    ``current``   float32 ``[out, width]``: the weights with the corrections so far; changed in place
    ``inverse``   float32 ``[width, width]``: upper Cholesky factor of the inverse Hessian of these and later columns
    ``groups``    int32 ``[width]``: the column of ``scales`` that each column of the block belongs to
    ``codes``     uint8 ``[out, in]``: written
    ``residual``  float32 ``[out, in]``: the original weights, from which the quantized ones are subtracted
    ``grid``      what a weight over its scale is rounded to: an integer code (None), a small float, or one of a rising
                  table of values, float32 ``[n]``, whose index is the code
    ``keep``      float32 ``[out, width]``: 1, or 0 where a weight becomes zero; None: all stay
    """

    start: int
    levels: int
    current: torch.Tensor
    inverse: torch.Tensor
    groups: torch.Tensor
    codes: torch.Tensor
    residual: torch.Tensor
    grid: Element | torch.Tensor | None = None
    keep: torch.Tensor | None = None
