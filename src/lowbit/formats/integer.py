"""Integer grids: choosing a scale and zero point per group, and rounding weights onto the grid.

Everything here is plain torch on whole matrices, for any device; the loops worth compiling are in
:mod:`lowbit.kernels`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F

from lowbit.errors import NumericsError, UsageError
from lowbit.formats.spec import PER_TENSOR, IntSpec
from lowbit.formats.tensor import QuantizedTensor

__all__ = [
    "RangeMethod",
    "choose_range",
    "encode",
    "grid",
    "group_extrema",
    "quantize",
    "quantize_dequantize",
    "search_grid",
]

RangeMethod: TypeAlias = Literal["minmax", "mse"]
"""``minmax``: no weight is off by more than half a step (symmetric) or clipped (asymmetric).
``mse``: a shrunk or grown range that minimises the weighted squared error, saturating the outliers."""

_COARSE = 12
_FINE = (-0.5, -0.25, 0.0, 0.25, 0.5)
SEARCH_STEPS = _COARSE + len(_FINE)
"""Grids that a range search tries for each group."""


def group_extrema(weight: torch.Tensor, spec: IntSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """``(low, high)`` of each group of ``weight`` ``[out, in]``, zero always inside.

    Both are ``[out, groups]``, per tensor ``[1, 1]``. Raises :class:`NumericsError` when a weight is not finite.
    """
    rows, columns = weight.shape
    groups = spec.groups(columns)
    if spec.group_size == PER_TENSOR:
        grouped = weight.reshape(1, 1, -1)
    elif groups == 1:
        grouped = weight[:, None]
    else:
        # zeros in the padding change nothing: the range includes zero in any case
        padding = groups * spec.group_size - columns
        grouped = (F.pad(weight, (0, padding)) if padding else weight).reshape(rows, groups, spec.group_size)
    # two passes: torch.aminmax takes three times as long
    low, high = grouped.amin(2), grouped.amax(2)
    if not bool(torch.isfinite(high - low).all()):
        raise NumericsError("a weight is NaN or infinite: the source checkpoint is damaged")
    return low.clamp(max=0.0), high.clamp(min=0.0)


def grid(low: torch.Tensor, high: torch.Tensor, spec: IntSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales (``spec.scale_dtype``) and uint8 zero points (None when symmetric) that cover ``[low, high]``.

    Symmetric: the smallest step that puts neither end more than half a step outside the codes
    ``-2**(b-1) .. 2**(b-1)-1``. Asymmetric: ``2**b - 1`` steps from ``low`` to ``high``. An empty range, and one too
    small for the scale's dtype, gets the scale 1. Raises :class:`NumericsError` when the dtype cannot hold a scale.
    """
    if spec.symmetric:
        wanted = torch.maximum(high / (spec.midpoint - 0.5), low / -(spec.midpoint + 0.5))
    else:
        wanted = (high - low) / (spec.levels - 1)
    scales = round_scales(wanted, spec.scale_dtype)
    if spec.symmetric:
        return scales, None
    if spec.has_float_zeros:
        return scales, (-low / scales.float()).to(spec.zero_dtype)
    return scales, (-low / scales.float()).round().clamp(0, spec.levels - 1).to(torch.uint8)


def round_scales(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``scales`` rounded to ``dtype``; zeros become 1 so that no scale is ever zero.

    Raises :class:`NumericsError` when one overflows ``dtype``.
    """
    rounded = scales.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise NumericsError(f"a scale of {float(scales.max()):.3g} does not fit {dtype}: use bfloat16 scales")
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def search_grid(
    low: torch.Tensor,
    high: torch.Tensor,
    spec: IntSpec,
    pick: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The best of 17 grids for each group: 12 over the whole search, then 5 around the best of those.

    The ranges tried are multiples of ``[low, high]`` from 1.1 down to ``bits / 10``, for fewer codes pay to saturate
    more weights. ``pick`` gets candidate scales and zero points ``[candidates, out, groups]`` and answers with the
    index of the best one, int64 ``[out, groups]``.
    """
    last = 0.1 * spec.bits
    step = (1.1 - last) / (_COARSE - 1)
    factors = torch.linspace(1.1, last, _COARSE, device=low.device)[:, None, None].expand(-1, *low.shape)
    scales, zeros, chosen = _pick(low, high, factors, spec, pick)
    fine = factors.gather(0, chosen) + step * torch.tensor(_FINE, device=low.device)[:, None, None]
    scales, zeros, chosen = _pick(low, high, fine, spec, pick)
    return scales.gather(0, chosen)[0], None if zeros is None else zeros.gather(0, chosen)[0]


def _pick(
    low: torch.Tensor,
    high: torch.Tensor,
    factors: torch.Tensor,
    spec: IntSpec,
    pick: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    scales, zeros = grid(low * factors, high * factors, spec)
    return scales, zeros, pick(scales, zeros)[None]


def choose_range(
    weight: torch.Tensor, spec: IntSpec, *, method: RangeMethod = "minmax", importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points for ``weight`` float32 ``[out, in]``.

    ``importance`` float32 ``[in]`` weighs the squared error of each column in the ``mse`` search. Raises
    :class:`NumericsError` for weights that are not finite.
    """
    low, high = group_extrema(weight, spec)
    if method == "minmax":
        return grid(low, high, spec)
    if method != "mse":
        raise UsageError(f"unknown range method {method!r}: use 'minmax' or 'mse'")

    def pick(scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        losses = []
        for candidate in range(scales.shape[0]):
            zero = None if zeros is None else zeros[candidate]
            error = (quantize_dequantize(weight, spec, scales[candidate], zero) - weight).square_()
            losses.append(_sum_groups(error if importance is None else error.mul_(importance), spec))
        return torch.stack(losses).argmin(0)

    return search_grid(low, high, spec, pick)


def _sum_groups(values: torch.Tensor, spec: IntSpec) -> torch.Tensor:
    """Sum of ``values`` ``[out, in]`` over each group, in the shape of the scales."""
    if spec.group_size == PER_TENSOR:
        return values.sum().reshape(1, 1)
    groups = spec.groups(values.shape[1])
    if groups == 1:
        return values.sum(1, keepdim=True)
    padded = F.pad(values, (0, groups * spec.group_size - values.shape[1]))
    return padded.reshape(values.shape[0], groups, spec.group_size).sum(2)


def _codes(
    weight: torch.Tensor,
    spec: IntSpec,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    group_index: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Float codes, and the scales and zero points that broadcast to them; ``[out, groups, size]`` if groups divide."""
    step = scales.float()
    zero: torch.Tensor | float = float(spec.midpoint) if zero_points is None else zero_points.float()
    if group_index is None and spec.group_size > 0 and weight.shape[1] % spec.group_size == 0:
        values = weight.reshape(weight.shape[0], -1, spec.group_size)
        step = step.unsqueeze(2)
        zero = zero.unsqueeze(2) if isinstance(zero, torch.Tensor) else zero
    else:
        values = weight
        if group_index is None and spec.group_size > 0:
            group_index = torch.arange(weight.shape[1], device=weight.device) // spec.group_size
        if group_index is not None:
            step = step[:, group_index.long()]
            zero = zero[:, group_index.long()] if isinstance(zero, torch.Tensor) else zero
    codes = torch.div(values, step)
    codes = codes.add_(zero).round_() if spec.has_float_zeros else codes.round_().add_(zero)
    return codes.clamp_(0, spec.levels - 1), step, zero


def encode(
    weight: torch.Tensor,
    spec: IntSpec,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None = None,
    group_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """The nearest codes, uint8 ``[out, in]``, of ``weight`` on a given grid (half-way values go to the even step)."""
    codes, _, _ = _codes(weight, spec, scales, zero_points, group_index)
    return codes.to(torch.uint8).reshape(weight.shape)


def quantize_dequantize(
    weight: torch.Tensor, spec: IntSpec, scales: torch.Tensor, zero_points: torch.Tensor | None = None
) -> torch.Tensor:
    """``weight`` ``[out, in]`` rounded onto a given grid, float32; the same numbers as encode then dequantize."""
    codes, step, zero = _codes(weight, spec, scales, zero_points, None)
    return codes.sub_(zero).mul_(step).reshape(weight.shape)


def quantize(
    weight: torch.Tensor, spec: IntSpec, *, method: RangeMethod = "minmax", importance: torch.Tensor | None = None
) -> QuantizedTensor:
    """Round to nearest: choose the range of each group of ``weight`` float32 ``[out, in]``, then the nearest codes."""
    scales, zero_points = choose_range(weight, spec, method=method, importance=importance)
    return QuantizedTensor(spec, encode(weight, spec, scales, zero_points), scales, zero_points)
