"""Weights that keep their floats: what a matrix is that is pruned, or transformed, and not quantized."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lowbit.errors import NumericsError
from lowbit.formats.spec import PER_TENSOR

__all__ = ["DenseSpec", "DenseTensor"]


@dataclass(frozen=True, slots=True)
class DenseSpec:
    """Floats of ``scale_dtype``, which is the model's dtype; ``dense`` to users."""

    scale_dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return "dense"

    @property
    def bits(self) -> int:
        """Bits of an element."""
        return self.scale_dtype.itemsize * 8

    @property
    def group_size(self) -> int:
        """That of no groups."""
        return PER_TENSOR

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits per weight."""
        return float(self.bits)

    def with_scale_dtype(self, dtype: torch.dtype) -> DenseSpec:
        """The same with elements of ``dtype``."""
        return replace(self, scale_dtype=dtype)


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """A weight matrix ``codes`` ``[out_features, in_features]`` of ``spec.scale_dtype``."""

    spec: DenseSpec
    codes: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight."""
        return self.spec.bits_per_weight(*self.shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight in ``dtype``."""
        return self.codes.to(dtype, copy=True)

    def validate(self, name: str) -> None:
        """Raise :class:`NumericsError` naming ``name`` for a weight that is not finite."""
        if not bool(torch.isfinite(self.codes).all()):
            raise NumericsError(f"{name}: a weight is not finite in {self.spec.scale_dtype}")
