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

_NAME = re.compile(r"int(?P<bits>\d+)-(?:g(?P<group>\d+)|(?P<whole>channel|tensor))(?:-(?P<sym>sym|asym))?")
_SCHEME = re.compile(r"W(?P<bits>\d+)A16(?P<asym>_ASYM)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class IntSpec:
    """Integer weights of 2 to 8 bits with a scale (and zero point) per group of columns, per row or per matrix.

    ``scale_dtype`` is the dtype that scales are stored in; solvers round scales to it before they choose codes.
    Raises :class:`UsageError` for values outside the format.
    """

    bits: int
    group_size: int = 128
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"bits must be 2 to 8, not {self.bits}: use --bits 4 or --bits 8")
        if self.group_size < -1:
            raise UsageError(f"group_size must be positive, -1 (per channel) or 0 (per tensor), not {self.group_size}")

    def __str__(self) -> str:
        grain = {PER_CHANNEL: "channel", PER_TENSOR: "tensor"}.get(self.group_size, f"g{self.group_size}")
        return f"int{self.bits}-{grain}-{'sym' if self.symmetric else 'asym'}"

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
        per_scale = self.scale_dtype.itemsize * 8 + (0 if self.symmetric else self.bits)
        return self.bits + scales * per_scale / (out_features * in_features)

    def with_scale_dtype(self, dtype: torch.dtype) -> IntSpec:
        """The same format with scales stored in ``dtype``."""
        return replace(self, scale_dtype=dtype)


def parse_spec(text: str) -> IntSpec:
    """Parse ``int4-g128-sym``, ``int3-channel-asym``, ``int8-tensor-sym`` or a preset (``W4A16``, ``W4A16_ASYM`` …).

    Raises :class:`UsageError` naming the nearest valid spelling.
    """
    if match := _NAME.fullmatch(text.strip().lower()):
        whole = match["whole"]
        group = {"channel": PER_CHANNEL, "tensor": PER_TENSOR}[whole] if whole else int(match["group"])
        if not whole and group == 0:
            raise UsageError(f"number format {text!r}: a group needs at least one column, e.g. int4-g128-sym")
        return IntSpec(int(match["bits"]), group, match["sym"] != "asym")
    if match := _SCHEME.fullmatch(text.strip()):
        return IntSpec(int(match["bits"]), 128, match["asym"] is None)
    raise UsageError(f"unknown number format or scheme {text!r}: use W4A16, W4A16_ASYM, W8A16 or e.g. int4-g128-sym")
