"""Scales of small floats: from the largest weight, or by a search for the least squared error.

A grid of floats is not even: which scale rounds a group best depends on where its weights fall between the steps, so
that both smaller scales (which saturate the largest weights) and larger ones can win. Candidates are multiples of the
scale that just holds the largest weight; powers of two can only be moved by powers of two.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lowbit.formats.floating import (
    FloatSpec,
    blocks,
    group_maxima,
    round_elements,
    spread,
    store_scales,
    stored_scale_values,
    whole_scale,
)

__all__ = ["choose_scales"]

_FACTORS: Mapping[str, tuple[float, ...]] = {
    "float": (1.0, 0.95, 0.9, 0.84, 0.78, 0.72, 0.66, 0.6, 0.55),
    # 1.5 puts the largest weight on the element 4 instead of 6, which halves the step below it.
    "e4m3": (1.0, 1.5, 1.35, 1.2, 1.1, 0.95, 0.9, 0.84, 0.78, 0.7),
    "e8m0": (1.0, 0.5, 2.0),
}
_ROWS = 512


def choose_scales(
    weight: torch.Tensor, spec: FloatSpec, *, search: bool, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stored scales and NVFP4's global scale (else None) of ``weight`` float32 ``[out, in]``.

    ``search`` takes the best of several scales for each group, by the squared error with columns weighed by
    ``importance`` (float32 ``[in]``; None: all alike). Raises :class:`lowbit.errors.NumericsError` when a weight is
    not finite.
    """
    largest = group_maxima(weight, spec)
    whole = whole_scale(largest, spec)
    best = store_scales(largest, spec, whole)
    if not search:
        return best, whole
    losses = _losses(weight, spec, best, whole, importance)
    for factor in _FACTORS[spec.scale][1:]:
        candidate = store_scales(largest * factor, spec, whole)
        found = _losses(weight, spec, candidate, whole, importance)
        better = found < losses
        # Not torch.where: it does not know 8-bit floats.
        best = best.clone()
        best.view(_bits(best))[better] = candidate.view(_bits(best))[better]
        losses = torch.minimum(found, losses)
    return best, whole


def _losses(
    weight: torch.Tensor,
    spec: FloatSpec,
    scales: torch.Tensor,
    whole: torch.Tensor | None,
    importance: torch.Tensor | None,
) -> torch.Tensor:
    """float64 ``spec.scale_shape``: the weighted squared error under each scale."""
    steps = stored_scale_values(scales, spec, whole)
    height = spec.rows if spec.rows > 1 else _ROWS
    parts = []
    for top in range(0, weight.shape[0], height * max(1, _ROWS // height)):
        here = weight[top : top + height * max(1, _ROWS // height)]
        mine = steps if steps.shape[0] == 1 else steps[top // spec.rows : -(-(top + here.shape[0]) // spec.rows)]
        step = spread(mine, spec, (here.shape[0], here.shape[1]))
        error = round_elements(here / step, spec.element).mul_(step).sub_(here).square_()
        if importance is not None:
            error.mul_(importance)
        parts.append(blocks(error, spec).sum((1, 3), dtype=torch.float64))
    losses = torch.cat(parts)
    return losses.sum(0, keepdim=True) if spec.scale_shape(weight.shape[0], weight.shape[1])[0] == 1 else losses


def _bits(scales: torch.Tensor) -> torch.dtype:
    """The integer dtype as wide as that of ``scales``."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[scales.itemsize]
