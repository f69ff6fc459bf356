"""How a linear's input is quantized while a model runs: the spec, and its effect simulated in floats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from lowbit.errors import UsageError
from lowbit.formats.floating import E4M3_MAX, microscale_exponents, round_elements

__all__ = ["ActivationSpec", "fake_quantize", "static_scale"]

ActivationElement: TypeAlias = Literal["int8", "int4", "e4m3", "e2m1"]

_MAXIMA: Mapping[str, float] = {"int8": 127.0, "int4": 7.0, "e4m3": E4M3_MAX, "e2m1": 6.0}


@dataclass(frozen=True, slots=True)
class ActivationSpec:
    """Quantized inputs: symmetric, one scale per row (``token``), per ``group_size`` columns of a row, or for all.

    ``dynamic`` scales come from the input itself, static ones (``tensor`` only) from calibration. ``scale`` is a
    float, or for groups E4M3 over a static global scale (NVFP4) or E8M0 (microscaling). Columns in which a sequence
    has an input of at least ``outliers`` stay in floats (0: none do): the decomposition of LLM.int8() (Dettmers et
    al., arXiv:2208.07339).
    """

    element: ActivationElement
    granularity: Literal["token", "tensor", "group"] = "token"
    dynamic: bool = True
    group_size: int = 0
    scale: Literal["float", "e4m3", "e8m0"] = "float"
    outliers: float = 0.0

    def __post_init__(self) -> None:
        if self.element not in _MAXIMA:
            raise UsageError(f"unknown activation format {self.element!r}: use {', '.join(_MAXIMA)}")
        if not self.dynamic and self.granularity != "tensor":
            raise UsageError("static activation scales are per tensor: use dynamic ones per token or group")
        if (self.granularity == "group") != (self.group_size > 0):
            raise UsageError("activation groups need a number of columns, e.g. 128")
        if self.outliers and (self.granularity != "token" or self.outliers < 0):
            raise UsageError("outliers stay in floats where inputs have one scale per token, from a positive bound on")

    def __str__(self) -> str:
        grain = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        outliers = f"-outliers{self.outliers:g}" if self.outliers else ""
        return f"{self.element}-{grain}" + ("" if self.dynamic else "-static") + outliers

    @property
    def maximum(self) -> float:
        """The largest element."""
        return _MAXIMA[self.element]

    @property
    def needs_calibration(self) -> bool:
        """Whether a static scale (of the tensor, or NVFP4's global one) has to be measured."""
        return not self.dynamic or self.scale == "e4m3"


def static_scale(largest: float, spec: ActivationSpec) -> torch.Tensor:
    """float32 ``[1]``: what :func:`fake_quantize` wants for calibrated inputs of at most ``largest`` in magnitude.

    Rounded to bfloat16, so that no engine's choice of a dtype changes it; 1 when all inputs were zero.
    """
    scale = 1.0
    if largest > 0:
        scale = E4M3_MAX * spec.maximum / largest if spec.scale == "e4m3" else largest / spec.maximum
    return torch.tensor([scale]).to(torch.bfloat16).float()


@torch.no_grad()
def fake_quantize(x: torch.Tensor, spec: ActivationSpec, static_scale: torch.Tensor | None = None) -> torch.Tensor:
    """``x`` ``[..., in]`` rounded to what an engine computes with, in the dtype of ``x``.

    ``static_scale`` float32 ``[1]``: the step of static inputs; for NVFP4 the global scale that group scales are
    multiplied by before they are rounded to E4M3. Raises :class:`UsageError` when it is needed and missing.
    """
    if spec.needs_calibration and static_scale is None:
        raise UsageError(f"inputs quantized as {spec} need a calibrated scale and have none: give calibration text")
    rows = x.float()
    outliers = rows.abs() >= spec.outliers if spec.outliers else None
    if outliers is not None:
        rows = rows.masked_fill(outliers, 0.0)
    if spec.granularity == "group":
        rows = rows.reshape(*x.shape[:-1], x.shape[-1] // spec.group_size, spec.group_size)
    steps = _steps(rows, spec, static_scale)
    scaled = rows / steps
    if spec.element in ("int8", "int4"):
        top = spec.maximum
        rounded = scaled.round().clamp_(-top - 1, top)
    else:
        element: Literal["e4m3", "e2m1"] = "e4m3" if spec.element == "e4m3" else "e2m1"
        rounded = round_elements(scaled, element)
    result = rounded.mul_(steps).reshape(x.shape).to(x.dtype)
    return result if outliers is None else torch.where(outliers.any(-2, keepdim=True), x, result)


def _steps(rows: torch.Tensor, spec: ActivationSpec, static_scale: torch.Tensor | None) -> torch.Tensor:
    if not spec.dynamic and static_scale is not None:
        return static_scale.float()
    largest = rows.abs().amax() if spec.granularity == "tensor" else rows.abs().amax(-1, keepdim=True)
    steps = largest / spec.maximum
    if spec.scale == "e8m0":
        steps = torch.exp2(microscale_exponents(largest, "e4m3" if spec.element == "e4m3" else "e2m1").float())
    elif spec.scale == "e4m3" and static_scale is not None:
        stored = (steps * static_scale.float()).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
        steps = stored / static_scale.float()
    return torch.where(steps > 0, steps, torch.ones_like(steps))
