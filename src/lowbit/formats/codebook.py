"""Codebook grids of bitsandbytes: NF4 and FP4 weights in flat blocks of one absolute maximum each.

NF4 is the 4-bit NormalFloat of QLoRA (Dettmers et al., arXiv:2305.14314), FP4 bitsandbytes' own 4-bit float. Blocks run
over the flattened matrix, row by row, so that one may begin in the middle of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from lowbit.errors import NumericsError, UsageError

__all__ = ["CODEBOOKS", "CodebookSpec", "CodebookTensor", "NestedScales", "nest", "quantize", "sorted_table"]

NESTED_BLOCK = 256
"""Block maxima that share one maximum of their own under double quantization."""
_SMALLEST = 1e-38
"""A maximum below this counts as this: its inverse is still finite."""


# fmt: off
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

CODEBOOKS: Mapping[str, tuple[float, ...]] = {
    "nf4": _NF4,
    "fp4": tuple(sign * value / 12.0 for sign in (1.0, -1.0) for value in _FP4_MAGNITUDES),
}
"""Value of each code. NF4's are its paper's: quantiles of a normal distribution, as float32."""


@dataclass(frozen=True, slots=True)
class CodebookSpec:
    """4-bit codes into a table of 16 values, scaled by the absolute maximum of each block of ``group_size`` weights.

    ``double_quant`` stores the maxima themselves as 8-bit codes. Raises :class:`UsageError` for other tables or sizes.
    """

    codebook: Literal["nf4", "fp4"] = "nf4"
    group_size: int = 64
    double_quant: bool = False
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.codebook not in CODEBOOKS:
            raise UsageError(f"unknown codebook {self.codebook!r}: use nf4 or fp4")
        if self.group_size not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise UsageError(f"{self.codebook} blocks hold 32 to 4096 weights, a power of two, not {self.group_size}")

    def __str__(self) -> str:
        return f"{self.codebook}-b{self.group_size}" + ("-dq" if self.double_quant else "")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 4

    def blocks(self, out_features: int, in_features: int) -> int:
        """Number of blocks of a matrix."""
        return -(-out_features * in_features // self.group_size)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits per weight: codes, maxima, and under double quantization their table, maxima and offset."""
        blocks = self.blocks(out_features, in_features)
        scales = 32.0 * blocks
        if self.double_quant:
            scales = 8.0 * blocks + 32.0 * -(-blocks // NESTED_BLOCK)
        return self.bits + scales / (out_features * in_features)

    def with_scale_dtype(self, dtype: torch.dtype) -> CodebookSpec:
        """The same format, its values in ``dtype`` where they are written out; its maxima are float32 all the same."""
        return replace(self, scale_dtype=dtype)


@dataclass(frozen=True, slots=True)
class NestedScales:
    """Maxima under double quantization: ``table[codes] * absmax + offset``.

    ``codes``   uint8 ``[blocks]``
    ``absmax``  float32 ``[ceil(blocks / 256)]``
    ``offset``  float32 ``[]``, the mean that was taken off before
    ``table``   float32 ``[256]``
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor
    table: torch.Tensor

    def values(self) -> torch.Tensor:
        """The maxima, float32 ``[blocks]``."""
        outer = self.absmax.repeat_interleave(NESTED_BLOCK)[: self.codes.shape[0]]
        return self.table[self.codes.long()] * outer + self.offset


@dataclass(frozen=True, slots=True)
class CodebookTensor:
    """A matrix of codes: uint8 ``codes`` ``[out_features, in_features]``, below 16.

    ``absmax``  float32 ``[blocks]``, or how they are stored under double quantization
    """

    spec: CodebookSpec
    codes: torch.Tensor
    absmax: torch.Tensor | NestedScales

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales counted."""
        return self.spec.bits_per_weight(*self.shape)

    def maxima(self) -> torch.Tensor:
        """float32 ``[blocks]``."""
        return self.absmax.values() if isinstance(self.absmax, NestedScales) else self.absmax

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight ``[out_features, in_features]``, computed in float32 and rounded to ``dtype``."""
        table = torch.tensor(CODEBOOKS[self.spec.codebook], device=self.codes.device)
        values = table[self.codes.flatten().long()]
        scales = self.maxima().repeat_interleave(self.spec.group_size)[: values.shape[0]]
        return (values * scales).reshape(self.shape).to(dtype)

    def validate(self, name: str) -> None:
        """Raise :class:`NumericsError` naming ``name`` for shapes, codes or scales that cannot be."""
        maxima = self.maxima()
        if maxima.shape != (self.spec.blocks(*self.shape),):
            raise NumericsError(
                f"{name}: {maxima.shape[0]} block maxima, {self.spec} needs {self.spec.blocks(*self.shape)}"
            )
        if int(self.codes.max()) > 15:
            raise NumericsError(f"{name}: a code exceeds 4 bits")
        if not bool(torch.isfinite(maxima).all()):
            raise NumericsError(f"{name}: a block maximum is not finite")


def quantize(weight: torch.Tensor, spec: CodebookSpec) -> CodebookTensor:
    """Round ``weight`` float32 ``[out, in]`` to the nearest value of the table, each block under its own maximum.

    Raises :class:`NumericsError` when a weight is not finite.
    """
    flat = weight.float().flatten()
    blocks = spec.blocks(weight.shape[0], weight.shape[1])
    padded = torch.nn.functional.pad(flat, (0, blocks * spec.group_size - flat.shape[0])).view(blocks, -1)
    maxima = padded.abs().amax(1)
    if not bool(torch.isfinite(maxima).all()):
        raise NumericsError("a weight is NaN or infinite: the source checkpoint is damaged")
    # times the inverse, as bitsandbytes does: a quotient would round otherwise at the edges between two codes
    scaled = (padded * (1.0 / maxima.clamp_min(_SMALLEST))[:, None]).clamp_(-1, 1).flatten()[: flat.shape[0]]
    _, codes, bounds = (part.to(weight.device) for part in sorted_table(spec.codebook))
    nearest = torch.bucketize(scaled, bounds)
    absmax = nest(maxima) if spec.double_quant else maxima
    return CodebookTensor(spec, codes[nearest].to(torch.uint8).view(weight.shape), absmax)


def sorted_table(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The values of a codebook rising, float32 ``[16]``, their codes, int64, and the bounds between them, ``[15]``."""
    ordered, codes = torch.sort(torch.tensor(CODEBOOKS[name]), stable=True)
    return ordered, codes, (ordered[1:] + ordered[:-1]) / 2


def dynamic_table() -> torch.Tensor:
    """float32 ``[256]``, rising: the signed dynamic tree of 8-bit optimizers (Dettmers et al., arXiv:2110.02861).

    Decade ``10**-e`` for ``e`` 0 to 6 holds ``2**(6-e)`` evenly spaced values of either sign; 0 and 1 complete it.
    """
    positive = []
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1.0, 2 ** (6 - exponent) + 1)
        positive.append(10.0**-exponent * (bounds[1:] + bounds[:-1]) / 2)
    values = torch.cat(positive)
    return torch.cat([values, -values, torch.tensor([0.0, 1.0])]).sort().values


def nest(maxima: torch.Tensor) -> NestedScales:
    """Block maxima float32 ``[blocks]`` as 8-bit codes, their mean taken off first (QLoRA's double quantization)."""
    offset = maxima.mean()
    table = dynamic_table().to(maxima.device)
    count = -(-maxima.shape[0] // NESTED_BLOCK)
    centred = torch.nn.functional.pad(maxima - offset, (0, count * NESTED_BLOCK - maxima.shape[0])).view(count, -1)
    absmax = centred.abs().amax(1)
    scaled = (centred / torch.where(absmax > 0, absmax, torch.ones_like(absmax))[:, None]).flatten()
    codes = torch.bucketize(scaled[: maxima.shape[0]], (table[1:] + table[:-1]) / 2)
    return NestedScales(codes.to(torch.uint8), absmax, offset, table)
