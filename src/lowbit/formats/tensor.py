"""The quantized tensor: what every solver produces and every codec reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.errors import NumericsError
from lowbit.formats.spec import PER_TENSOR, IntSpec


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A quantized weight matrix in canonical, unpacked form.

    ``codes``        uint8 ``[out_features, in_features]``, each in ``[0, 2**bits)``
    ``scales``       ``spec.scale_dtype``, ``[out_features, groups]`` (per tensor: ``[1, 1]``)
    ``zero_points``  ``spec.zero_dtype``, shape of ``scales``, or None when symmetric (zero is then ``2**(bits-1)``)
    ``group_index``  int32 ``[in_features]``, column to group, or None when column ``i`` is in group ``i // group_size``

    The weight is ``(codes - zero_point) * scale``.
    """

    spec: IntSpec
    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None = None
    group_index: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and zero points counted."""
        return self.spec.bits_per_weight(*self.shape)

    def columns_to_groups(self) -> torch.Tensor:
        """int64 ``[in_features]``: the group of each column."""
        if self.group_index is not None:
            return self.group_index.long()
        columns = torch.arange(self.shape[1], device=self.codes.device)
        return columns // self.spec.group_size if self.spec.group_size > 0 else torch.zeros_like(columns)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight ``[out_features, in_features]``, computed in float32 and rounded to ``dtype``."""
        zero: torch.Tensor | float = float(self.spec.midpoint)
        scales = self.scales.float()
        if self.spec.group_size > 0 and self.group_index is None and self.shape[1] % self.spec.group_size == 0:
            grouped = self.codes.float().view(self.shape[0], -1, self.spec.group_size)
            if self.zero_points is not None:
                zero = self.zero_points.float()[:, :, None]
            return ((grouped - zero) * scales[:, :, None]).flatten(1).to(dtype)
        groups = self.columns_to_groups()
        if self.zero_points is not None:
            zero = self.zero_points.float()[:, groups]
        return ((self.codes.float() - zero) * scales[:, groups]).to(dtype)

    def validate(self, name: str) -> None:
        """Raise :class:`NumericsError` naming ``name`` for shapes, codes or scales that cannot be."""
        rows, columns = self.shape
        groups = self.spec.groups(columns)
        expected = (1, 1) if self.spec.group_size == PER_TENSOR else (rows, groups)
        if tuple(self.scales.shape) != expected:
            raise NumericsError(f"{name}: scales have shape {tuple(self.scales.shape)}, {self.spec} needs {expected}")
        if (self.zero_points is None) != self.spec.symmetric:
            raise NumericsError(f"{name}: {self.spec} and zero points contradict each other")
        if self.zero_points is not None:
            if self.zero_points.shape != self.scales.shape:
                raise NumericsError(f"{name}: zero points have shape {tuple(self.zero_points.shape)}, needs {expected}")
            if not bool(torch.isfinite(self.zero_points.float()).all()):
                raise NumericsError(f"{name}: a zero point is not finite")
            if not self.spec.has_float_zeros and int(self.zero_points.max()) >= self.spec.levels:
                raise NumericsError(f"{name}: a zero point exceeds {self.spec.bits} bits")
        if int(self.codes.max()) >= self.spec.levels:
            raise NumericsError(f"{name}: a code exceeds {self.spec.bits} bits")
        if not bool(torch.isfinite(self.scales).all()):
            raise NumericsError(f"{name}: a scale is not finite")
        if self.group_index is not None and not (
            int(self.group_index.min()) >= 0 and int(self.group_index.max()) < groups
        ):
            raise NumericsError(f"{name}: g_idx names a group outside 0..{groups - 1}")
