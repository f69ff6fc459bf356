"""How a tensor travels between processes: as its bytes, whatever its dtype.

torch's own pickling copies through a file format that not every dtype has a place in (8-bit floats).
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Packed", "packed", "unpacked"]

Packed: TypeAlias = tuple[npt.NDArray[np.uint8], torch.dtype, tuple[int, ...]]
"""Bytes, dtype and shape of a tensor."""


def packed(tensor: torch.Tensor) -> Packed:
    """``tensor``, without its device, gradient and strides."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape)


def unpacked(content: Packed) -> torch.Tensor:
    """The tensor, in memory of its own."""
    data, dtype, shape = content
    tensor = torch.empty(shape, dtype=dtype)
    tensor.flatten().view(torch.uint8).numpy()[:] = data
    return tensor
