"""Where a scaling of a linear's input channels goes: into the norm or linear that produces that input.

A fold multiplies the columns of the group's weights by ``s`` and divides the producer by ``s``, so the function stays
the same. The scales are snapped so that the producer's values, rounded to their stored dtype, are divided exactly.
"""

from __future__ import annotations

import torch
from torch import nn

from lowbit.pipeline.architectures import Family


def fold_target(block: nn.Module, family: Family, linear: str) -> str | None:
    """Path in ``block`` of the module that can take up a scaling of the input of ``linear``, or None.

    A linear qualifies only when its output channels are the input's one to one (grouped-query attention repeats
    them, so its value projection does not).
    """
    parent, _, last = linear.rpartition(".")
    target = family.folds.get(last)
    if target is None:
        return None
    path = f"{parent}{target}" if target.startswith(".") else target
    module = dict(block.named_modules()).get(path)
    if module is None:
        return None
    width = block.get_submodule(linear).in_features
    produced = module.out_features if isinstance(module, nn.Linear) else module.weight.shape[0]
    return path if produced == width else None


@torch.no_grad()
def has_unit_offset(norm: nn.Module) -> bool:
    """Whether ``norm`` multiplies by ``1 + weight`` (Gemma) rather than by ``weight``, found by running it."""
    saved = dict(norm._parameters)
    try:
        for name, parameter in saved.items():
            if parameter is not None:
                norm._parameters[name] = nn.Parameter(torch.zeros_like(parameter), requires_grad=False)
        width = saved["weight"].shape[0]  # type: ignore[union-attr]
        probe = torch.linspace(-1, 1, width, device=saved["weight"].device)  # type: ignore[union-attr]
        return bool(norm(probe[None, None].to(saved["weight"].dtype)).abs().max() > 0)  # type: ignore[union-attr]
    finally:
        for name, parameter in saved.items():
            norm._parameters[name] = parameter


def fold_into_norm(
    weight: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor, *, unit_offset: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Divide a norm's gain by ``scales`` ``[channels]``; returns the stored weight, bias and the scales in effect.

    The effective scale of a channel is the old gain over the new, rounded one; channels whose gain is zero, or would
    round to it, keep scale 1.
    """
    offset = 1.0 if unit_offset else 0.0
    gain = weight.float() + offset
    stored = (gain / scales - offset).to(weight.dtype)
    effective = gain / (stored.float() + offset)
    bad = ~torch.isfinite(effective) | (effective <= 0)
    stored = torch.where(bad, weight, stored)
    effective = torch.where(bad, torch.ones_like(effective), effective)
    new_bias = None if bias is None else (bias.float() / effective).to(bias.dtype)
    return stored, new_bias, effective
