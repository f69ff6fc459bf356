"""Number-format specs: small frozen values that say how a weight matrix is stored, not how it got there."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from lowbit.errors import UsageError

PER_CHANNEL = -1
"""``group_size`` of one scale per output channel (row)."""
PER_TENSOR = 0
"""``group_size`` of one scale for the whole matrix."""

_NAME = re.compile(r"int(?P<bits>\d+)-(?:g(?P<group>\d+)|(?P<whole>channel|tensor))(?:-(?P<sym>sym|asym|affine))?")


@dataclass(frozen=True, slots=True)
class IntSpec:
    """Integer weights of 2 to 8 bits with a scale (and zero point) per group of columns, per row or per matrix.

    ``scale_dtype`` is the dtype that scales are stored in; solvers round scales to it before they choose codes.
    ``zero_dtype`` is uint8 for zero points that are codes, or a float dtype (HQQ's) for ones that may lie anywhere.
    Raises :class:`UsageError` for values outside the format.
    """

    bits: int
    group_size: int = 128
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float16
    zero_dtype: torch.dtype = torch.uint8

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"bits must be 2 to 8, not {self.bits}: use --bits 4 or --bits 8")
        if self.group_size < -1:
            raise UsageError(f"group_size must be positive, -1 (per channel) or 0 (per tensor), not {self.group_size}")

    def __str__(self) -> str:
        grain = {PER_CHANNEL: "channel", PER_TENSOR: "tensor"}.get(self.group_size, f"g{self.group_size}")
        kind = "sym" if self.symmetric else "affine" if self.has_float_zeros else "asym"
        return f"int{self.bits}-{grain}-{kind}"

    @property
    def has_float_zeros(self) -> bool:
        """Whether zero points are floats, which need not fall on a code."""
        return not self.symmetric and self.zero_dtype.is_floating_point

    @property
    def levels(self) -> int:
        """Number of codes, ``2**bits``."""
        return 1 << self.bits

    @property
    def midpoint(self) -> int:
        """The code that stands for zero in the symmetric form, ``2**(bits-1)``."""
        return 1 << (self.bits - 1)

    def groups(self, in_features: int) -> int:
        """Number of scales along a row of ``in_features`` columns (ragged last group counted)."""
        return 1 if self.group_size <= 0 else -(-in_features // self.group_size)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits per weight, scales and zero points counted."""
        scales = 1 if self.group_size == PER_TENSOR else out_features * self.groups(in_features)
        zero = self.zero_dtype.itemsize * 8 if self.has_float_zeros else self.bits
        per_scale = self.scale_dtype.itemsize * 8 + (0 if self.symmetric else zero)
        return self.bits + scales * per_scale / (out_features * in_features)

    def with_scale_dtype(self, dtype: torch.dtype) -> IntSpec:
        """The same format with scales stored in ``dtype``."""
        return replace(self, scale_dtype=dtype)


def parse_int_spec(text: str) -> IntSpec | None:
    """The format called ``int4-g128-sym``, ``int3-channel-asym``, ``int8-tensor-sym`` …, or None for another name.

    ``affine`` has zero points of the scales' dtype. Raises :class:`UsageError` for values outside the format.
    """
    match = _NAME.fullmatch(text.strip().lower())
    if match is None:
        return None
    whole = match["whole"]
    group = {"channel": PER_CHANNEL, "tensor": PER_TENSOR}[whole] if whole else int(match["group"])
    if not whole and group == 0:
        raise UsageError(f"number format {text!r}: a group needs at least one column, e.g. int4-g128-sym")
    zeros = torch.float16 if match["sym"] == "affine" else torch.uint8
    return IntSpec(int(match["bits"]), group, match["sym"] not in ("asym", "affine"), zero_dtype=zeros)
