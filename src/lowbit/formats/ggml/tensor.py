"""A matrix in the blocks of a ggml type."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lowbit.errors import NumericsError
from lowbit.formats.ggml.decode import decode
from lowbit.formats.ggml.types import GgmlType

__all__ = ["BlockTensor", "finite_scales", "scale_rows"]

_FLOAT_SCALES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ1_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "NVFP4": (),
    "F16": (0,),
}
"""Where in a block its float16 scales (and minima) stand, in bytes. The other types are checked by their values."""

_FINITE_E8M0 = 252
"""The greatest scale of MXFP4 that all its codes can be multiplied by."""


def finite_scales(blocks: npt.NDArray[np.uint8], kind: GgmlType) -> bool:
    """Whether all scales and minima in ``blocks`` uint8 ``[rows, row_bytes]`` are finite."""
    offsets = _FLOAT_SCALES.get(kind.name)
    split = blocks.reshape(-1, kind.block_bytes)
    if kind.name == "MXFP4" and bool((split[:, 0] <= _FINITE_E8M0).all()):
        return True
    if offsets is None:
        return bool(np.isfinite(decode(blocks, kind)).all())
    # by the upper bytes of their bits: there is no fast arithmetic on float16
    return all(int((split[:, at + 1] & np.uint8(0x7F)).max(initial=0)) < 0x7C for at in offsets)


def scale_rows(blocks: npt.NDArray[np.uint8], kind: GgmlType, factors: npt.NDArray[np.float32]) -> None:
    """Multiply what the rows of ``blocks`` uint8 ``[rows, row_bytes]`` stand for by ``factors`` ``[rows]``, in place.

    Only their float16 scales (and minima) change, and are rounded. Raises :class:`KeyError` for a type without.
    """
    if kind.name != "IQ1_M" and not _FLOAT_SCALES[kind.name]:
        raise KeyError(kind.name)
    split = blocks.reshape(len(blocks), -1, kind.block_bytes)
    if kind.name == "IQ1_M":
        # four bits of the scale on top of each of four words
        words = split[..., 48:56].view("<u2")
        bits = (words >> 12 << np.array([0, 4, 8, 12], np.uint16)).sum(axis=-1, keepdims=True, dtype=np.uint16)
        scaled = _times(bits.view(np.float16), factors).view(np.uint16)
        words[...] = words & 0xFFF | scaled >> np.array([0, 4, 8, 12], np.uint16) << 12
        return
    for at in _FLOAT_SCALES[kind.name]:
        scales = split[..., at : at + 2].view("<f2")
        scales[...] = _times(scales, factors)


def _times(scales: npt.NDArray[np.float16], factors: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    with np.errstate(over="ignore"):
        return (scales.astype(np.float32) * factors[:, None, None]).astype(np.float16)


@dataclass(frozen=True, slots=True)
class BlockTensor:
    """A matrix ``[out_features, in_features]`` in a type of ggml.

    ``type``    the ggml type
    ``blocks``  uint8 ``[out_features, type.row_bytes(in_features)]``, the bytes of a GGUF file
    """

    type: GgmlType
    blocks: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.blocks.shape[0], self.type.columns(self.blocks.shape[1])

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and minima counted."""
        return self.type.bits

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight ``[out_features, in_features]``, computed in float32 and rounded to ``dtype``."""
        values = torch.from_numpy(decode(self.blocks.cpu().numpy(), self.type))
        return values.to(device=self.blocks.device, dtype=dtype)

    def validate(self, name: str) -> None:
        """Raise :class:`NumericsError` naming ``name`` for rows of broken blocks or scales that are not finite."""
        shape = tuple(self.blocks.shape)
        if self.blocks.dtype != torch.uint8 or len(shape) != 2:
            raise NumericsError(f"{name}: {self.type} blocks are bytes [rows, bytes], not {self.blocks.dtype} {shape}")
        if shape[1] % self.type.block_bytes:
            expected = f"{self.type} blocks of {self.type.block_bytes}"
            raise NumericsError(f"{name}: rows of {shape[1]} bytes are no whole {expected}")
        if not finite_scales(self.blocks.cpu().numpy(), self.type):
            raise NumericsError(f"{name}: a scale of its {self.type} blocks is not finite: quantize the tensor again")
