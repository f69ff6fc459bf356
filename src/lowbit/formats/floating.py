"""Floating-point grids: FP8 and FP4 elements with a scale per matrix, row, block or group, and the microscaling forms.

=========  =======  ======================  ==========================================================
name       element  one scale for           the scale is
=========  =======  ======================  ==========================================================
fp8-*      E4M3     tensor, channel, gN,    a float (``scale_dtype``)
                    block (128 x 128)
mxfp8      E4M3     32 columns              a power of two, E8M0
nvfp4      E2M1     16 columns              E4M3, over one float32 ``global_scale`` of the matrix
mxfp4      E2M1     32 columns              a power of two, E8M0
=========  =======  ======================  ==========================================================

E4M3 is the finite form (``float8_e4m3fn``: largest 448, no infinity); E2M1 and E8M0 are those of the OCP microscaling
formats specification 1.0; the two-level scale of NVFP4 is laid out as compressed-tensors stores it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeAlias

import torch

from lowbit.errors import NumericsError, UsageError
from lowbit.formats.spec import PER_CHANNEL, PER_TENSOR

__all__ = [
    "E2M1_VALUES",
    "E4M3_MAX",
    "Element",
    "FloatSpec",
    "FloatTensor",
    "decode_elements",
    "encode_elements",
    "microscale_exponents",
    "round_elements",
]

Element: TypeAlias = Literal["e4m3", "e2m1"]
ScaleKind: TypeAlias = Literal["float", "e4m3", "e8m0"]

E4M3_MAX = 448.0
"""The largest E4M3 number."""
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the E2M1 codes 0 to 7; bit 3 is the sign."""

MINIFLOATS: Mapping[Element, tuple[int, int]] = {"e4m3": (3, -6), "e2m1": (1, 0)}
"""Bits of the mantissa, and the exponent of the smallest normal number."""
MAXIMA: Mapping[Element, float] = {"e4m3": E4M3_MAX, "e2m1": E2M1_VALUES[-1]}
"""The largest element."""
_BLOCK = 128
_FP8 = re.compile(r"fp8-(?:g(?P<group>[1-9]\d*)|(?P<whole>channel|tensor|block))")


@dataclass(frozen=True, slots=True)
class FloatSpec:
    """Floating-point weights with one scale for ``rows`` x ``group_size`` of them (-1: a row, 0: the matrix).

    ``scale`` is how scales are stored: floats of ``scale_dtype``, E4M3 over a float32 global scale (NVFP4), or E8M0
    powers of two. Raises :class:`UsageError` for values outside the format.
    """

    element: Element = "e4m3"
    group_size: int = PER_CHANNEL
    rows: int = 1
    scale: ScaleKind = "float"
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.element not in MAXIMA:
            raise UsageError(f"unknown floating-point element {self.element!r}: use e4m3 or e2m1")
        if self.group_size < PER_CHANNEL:
            raise UsageError(f"group_size must be positive, -1 (per channel) or 0 (per tensor), not {self.group_size}")
        if self.rows > 1 and self.group_size <= 0:
            raise UsageError("a block of several rows needs a number of columns, e.g. fp8-block (128 x 128)")

    def __str__(self) -> str:
        if self.scale != "float":
            return {"e4m3": "nvfp4", "e8m0": "mxfp8" if self.element == "e4m3" else "mxfp4"}[self.scale]
        if self.rows > 1:
            return "fp8-block"
        return "fp8-" + {PER_CHANNEL: "channel", PER_TENSOR: "tensor"}.get(self.group_size, f"g{self.group_size}")

    @property
    def bits(self) -> int:
        """Bits of an element."""
        return 8 if self.element == "e4m3" else 4

    @property
    def maximum(self) -> float:
        """The largest element."""
        return MAXIMA[self.element]

    def groups(self, in_features: int) -> int:
        """Number of scales along ``in_features`` columns (ragged last group counted)."""
        return 1 if self.group_size <= 0 else -(-in_features // self.group_size)

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of the scales of a matrix."""
        if self.group_size == PER_TENSOR:
            return 1, 1
        return -(-out_features // self.rows), self.groups(in_features)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits per weight, scales counted."""
        rows, columns = self.scale_shape(out_features, in_features)
        per_scale = self.scale_dtype.itemsize * 8 if self.scale == "float" else 8
        whole = 32 if self.scale == "e4m3" else 0
        return self.bits + (rows * columns * per_scale + whole) / (out_features * in_features)

    def with_scale_dtype(self, dtype: torch.dtype) -> FloatSpec:
        """The same format with float scales stored in ``dtype``; the formats that fix theirs keep it."""
        return replace(self, scale_dtype=dtype) if self.scale == "float" else self

    @classmethod
    def parse(cls, text: str) -> FloatSpec | None:
        """The format called ``text`` (see the table of this module), or None if there is none."""
        name = text.strip().lower()
        if name in _NAMED:
            return _NAMED[name]
        match = _FP8.fullmatch(name)
        if match is None:
            return None
        if match["group"]:
            return cls(group_size=int(match["group"]))
        return _WHOLE[match["whole"]]


_NAMED: Mapping[str, FloatSpec] = {
    "mxfp8": FloatSpec("e4m3", 32, scale="e8m0"),
    "nvfp4": FloatSpec("e2m1", 16, scale="e4m3"),
    "mxfp4": FloatSpec("e2m1", 32, scale="e8m0"),
}
_WHOLE: Mapping[str, FloatSpec] = {
    "channel": FloatSpec(group_size=PER_CHANNEL),
    "tensor": FloatSpec(group_size=PER_TENSOR),
    "block": FloatSpec(group_size=_BLOCK, rows=_BLOCK),
}


@dataclass(frozen=True, slots=True)
class FloatTensor:
    """A matrix of small floats in canonical form.

    ``codes``         uint8 ``[out_features, in_features]``: the bits of each element (E2M1 in the low four)
    ``scales``        ``spec.scale_shape``: ``spec.scale_dtype``, ``float8_e4m3fn`` (NVFP4) or uint8 exponents (E8M0)
    ``global_scale``  float32 ``[1]``, NVFP4 only: what the scales are divided by

    The weight is ``element(code) * scale`` (``/ global_scale``).
    """

    spec: FloatSpec
    codes: torch.Tensor
    scales: torch.Tensor
    global_scale: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales counted."""
        return self.spec.bits_per_weight(*self.shape)

    def float_scales(self) -> torch.Tensor:
        """float32, of the shape of ``scales``: what elements are multiplied by."""
        return stored_scale_values(self.scales, self.spec, self.global_scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight ``[out_features, in_features]``, computed in float32 and rounded to ``dtype``."""
        return (
            decode_elements(self.codes, self.spec.element)
            .mul_(spread(self.float_scales(), self.spec, self.shape))
            .to(dtype)
        )

    def validate(self, name: str) -> None:
        """Raise :class:`NumericsError` naming ``name`` for shapes, codes or scales that cannot be."""
        expected = self.spec.scale_shape(*self.shape)
        if tuple(self.scales.shape) != expected:
            raise NumericsError(f"{name}: scales have shape {tuple(self.scales.shape)}, {self.spec} needs {expected}")
        if (self.global_scale is None) != (self.spec.scale != "e4m3"):
            raise NumericsError(f"{name}: {self.spec} and a global scale contradict each other")
        if self.spec.element == "e2m1" and int(self.codes.max()) > 15:
            raise NumericsError(f"{name}: a code exceeds 4 bits")
        if self.spec.element == "e4m3" and bool(((self.codes & 0x7F) == 0x7F).any()):
            raise NumericsError(f"{name}: a weight is NaN")
        if not bool(torch.isfinite(self.float_scales()).all()):
            raise NumericsError(f"{name}: a scale is not finite")


def stored_scale_values(
    scales: torch.Tensor, spec: FloatSpec, global_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """float32: what elements are multiplied by under stored ``scales``."""
    if spec.scale == "e8m0":
        return torch.exp2(scales.float() - 127.0)
    return scales.float() if global_scale is None else scales.float() / global_scale.float()


def spread(scales: torch.Tensor, spec: FloatSpec, shape: tuple[int, int]) -> torch.Tensor:
    """``scales`` of ``spec.scale_shape`` repeated so that they broadcast to a matrix of ``shape``."""
    rows, columns = shape
    if spec.rows > 1:
        scales = scales.repeat_interleave(spec.rows, 0)[:rows]
    if spec.group_size > 0:
        scales = scales.repeat_interleave(spec.group_size, 1)[:, :columns]
    return scales


def decode_elements(codes: torch.Tensor, element: Element) -> torch.Tensor:
    """float32 values of uint8 ``codes`` (a new tensor)."""
    if element == "e4m3":
        return codes.contiguous().view(torch.float8_e4m3fn).float()
    table = torch.tensor((*E2M1_VALUES, *(-v for v in E2M1_VALUES)), device=codes.device)
    return table[codes.long()]


def encode_elements(values: torch.Tensor, element: Element) -> torch.Tensor:
    """uint8 codes of the elements nearest to ``values`` (float32, saturated; half-way ones go to the even code)."""
    if element == "e4m3":
        return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    magnitude = values.abs()
    # The bounds lie half-way between neighbours; a tie goes to the even code, so it counts as above every other bound.
    bounds = torch.tensor([(a + b) / 2 for a, b in pairwise(E2M1_VALUES)], device=values.device)
    above = torch.bucketize(magnitude, bounds)
    tie = (magnitude == bounds[above.clamp(max=len(bounds) - 1)]) & (above % 2 == 1)
    return (above + tie).clamp_(max=7).to(torch.uint8) | (values < 0).to(torch.uint8) << 3


def round_elements(values: torch.Tensor, element: Element) -> torch.Tensor:
    """float32: the elements nearest to ``values``, as :func:`encode_elements` chooses them, without their codes."""
    if element == "e4m3":
        return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
    magnitude = values.abs()
    # Steps of a half, of one and of two; rounding half to even meets the even codes at every bound between them.
    fine, middle = (magnitude * 2).round_().mul_(0.5), magnitude.round()
    coarse = (magnitude * 0.5).round_().mul_(2).clamp_(max=6.0)
    rounded = torch.where(magnitude < 2, fine, torch.where(magnitude < 4, middle, coarse))
    return torch.copysign(rounded, values)


def microscale_exponents(largest: torch.Tensor, element: Element) -> torch.Tensor:
    """int32: exponents of the powers of two that scale groups with the maxima ``largest`` (0 for one of zeros).

    The power of two at or below the largest magnitude, less that of the largest element, as the microscaling
    specification has it; one more from 1.75 times that power on, where rounding would carry into the next one. So do
    compressed-tensors and the reference that vLLM tests against.
    """
    mantissa, exponent = torch.frexp(largest.float())
    exponent = exponent - 1 + (mantissa >= 0.875).to(torch.int32)
    return torch.where(largest > 0, exponent - (8 if element == "e4m3" else 2), 0).clamp(-127, 127)


def quantize(weight: torch.Tensor, spec: FloatSpec) -> FloatTensor:
    """Round ``weight`` float32 ``[out, in]`` to nearest, each scale the smallest that saturates nothing.

    E8M0 scales may saturate the top of their range a little, see :func:`microscale_exponents`. Raises
    :class:`NumericsError` when a weight is not finite.
    """
    largest = group_maxima(weight, spec)
    global_scale = whole_scale(largest, spec)
    return encode(weight, spec, store_scales(largest, spec, global_scale), global_scale)


def whole_scale(largest: torch.Tensor, spec: FloatSpec) -> torch.Tensor | None:
    """float32 ``[1]``: NVFP4's global scale for groups with the maxima ``largest``; None for other formats."""
    if spec.scale != "e4m3":
        return None
    return (E4M3_MAX * spec.maximum / largest.max().clamp_min(1e-30)).reshape(1)


def group_maxima(weight: torch.Tensor, spec: FloatSpec) -> torch.Tensor:
    """float32 ``spec.scale_shape``: the largest magnitude under each scale."""
    largest = blocks(weight, spec).abs().amax((1, 3)).float()
    if not bool(torch.isfinite(largest).all()):
        raise NumericsError("a weight is NaN or infinite: the source checkpoint is damaged")
    return largest


def blocks(values: torch.Tensor, spec: FloatSpec) -> torch.Tensor:
    """``values`` ``[out, in]`` as ``[scale rows, rows of a block, scale columns, columns of a block]``, zeros added."""
    rows, columns = spec.scale_shape(values.shape[0], values.shape[1])
    height = spec.rows if spec.group_size > 0 else values.shape[0] // rows
    width = spec.group_size if spec.group_size > 0 else values.shape[1]
    padding = (0, columns * width - values.shape[1], 0, rows * height - values.shape[0])
    padded = torch.nn.functional.pad(values, padding) if any(padding) else values
    return padded.reshape(rows, height, columns, width)


def store_scales(largest: torch.Tensor, spec: FloatSpec, global_scale: torch.Tensor | None = None) -> torch.Tensor:
    """The scales, as stored, under which magnitudes up to ``largest`` (``spec.scale_shape``) fit the elements."""
    if spec.scale == "e8m0":
        return (microscale_exponents(largest, spec.element) + 127).to(torch.uint8)
    wanted = largest / spec.maximum
    if global_scale is not None:
        stored = (wanted * global_scale).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
        smallest = torch.full_like(largest, 2.0**-9).to(torch.float8_e4m3fn)
        return torch.where(stored.float() > 0, stored.float(), smallest.float()).to(torch.float8_e4m3fn)
    stored = wanted.to(spec.scale_dtype)
    if not bool(torch.isfinite(stored).all()):
        raise NumericsError(f"a scale of {float(wanted.max()):.3g} does not fit {spec.scale_dtype}")
    return torch.where(stored == 0, torch.ones_like(stored), stored)


def encode(
    weight: torch.Tensor, spec: FloatSpec, scales: torch.Tensor, global_scale: torch.Tensor | None = None
) -> FloatTensor:
    """The nearest codes of ``weight`` float32 ``[out, in]`` under the stored ``scales``."""
    values = weight / spread(stored_scale_values(scales, spec, global_scale), spec, (weight.shape[0], weight.shape[1]))
    return FloatTensor(spec, encode_elements(values, spec.element), scales, global_scale)
