"""Where a scaling of a linear's input channels goes: into the norm or linear that produces that input.

A fold multiplies the columns of the group's weights by ``s`` and divides the producer by ``s``, so the function stays
the same. The scales are snapped so that the producer's values, rounded to their stored dtype, are divided exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import nn

from lowbit.formats import PER_TENSOR, FloatTensor, QuantizedTensor, WeightTensor
from lowbit.pipeline.architectures import Family
from lowbit.quant import InputStatistics

_Q = TypeVar("_Q", bound=QuantizedTensor | FloatTensor)


@dataclass(frozen=True, slots=True)
class Fold:
    """A scaling of an input that ``target`` can take up: ``scales`` float32 ``[in]``, those in effect.

    ``norm`` are the parameters of a norm as they become.
    """

    target: str
    scales: torch.Tensor
    norm: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Producer:
    """What can take up a scaling of an input: the linear ``target``, or the norm with these stored parameters."""

    target: str
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    unit_offset: bool = False

    def fold(self, scales: torch.Tensor) -> Fold:
        """What dividing it by ``scales`` comes to."""
        if self.weight is None:
            return Fold(self.target, scales)
        weight, bias, effective = fold_into_norm(self.weight, self.bias, scales, unit_offset=self.unit_offset)
        norm = {f"{self.target}.weight": weight} | ({} if bias is None else {f"{self.target}.bias": bias})
        return Fold(self.target, effective, norm)


class Folds:
    """The scalings of a block's inputs.

    ``stored`` reads a parameter of the block in the precision that it is kept in, ``solved`` has the linears that are
    quantized already, which follow. ``overrides`` are parameters as they become, ``divided`` the scales by which the
    rows of a linear were divided.
    """

    def __init__(
        self,
        block: nn.Module,
        family: Family,
        stored: Callable[[str], torch.Tensor],
        solved: MutableMapping[str, WeightTensor],
    ) -> None:
        self._block, self._family, self._stored, self._solved = block, family, stored, solved
        self.overrides: dict[str, torch.Tensor] = {}
        self.divided: dict[str, torch.Tensor] = {}

    def producer(self, linear: str) -> Producer | None:
        """What can take up a scaling of the input of ``linear``, or None."""
        target = fold_target(self._block, self._family, linear)
        if target is None:
            return None
        q = self._solved.get(target)
        # rows of a solved producer that have no scales of their own cannot be divided any more
        if q is not None and not (isinstance(q, QuantizedTensor | FloatTensor) and _has_row_scales(q)):
            return None
        module = self._block.get_submodule(target)
        if isinstance(module, nn.Linear):
            return Producer(target)
        bias = self._stored(f"{target}.bias") if getattr(module, "bias", None) is not None else None
        return Producer(target, self._stored(f"{target}.weight"), bias, has_unit_offset(module))

    def apply(self, fold: Fold) -> None:
        """Divide the target."""
        self.overrides |= fold.norm
        if fold.norm:
            return
        target, module = fold.target, self._block.get_submodule(fold.target)
        assert isinstance(module, nn.Linear)
        self.divided[target] = fold.scales
        q = self._solved.get(target)
        if isinstance(q, QuantizedTensor | FloatTensor):
            self._solved[target] = divided(q, fold.scales)
        else:
            self.overrides[f"{target}.weight"] = module.weight / fold.scales[:, None]
        if module.bias is not None:
            self.overrides[f"{target}.bias"] = module.bias / fold.scales


@contextmanager
def folded(statistics: InputStatistics | None, fold: Fold | None) -> Iterator[None]:
    """While it lasts, ``statistics`` are those of the input as ``fold`` leaves it."""
    if statistics is None or fold is None:
        yield
        return
    statistics.divide_(fold.scales)
    try:
        yield
    finally:
        statistics.divide_(fold.scales.reciprocal())


def divided(q: _Q, scales: torch.Tensor) -> _Q:
    """``q`` with its rows divided by ``scales`` ``[out]``, which rounds its scales again."""
    return replace(q, scales=(q.scales.float() / scales[:, None].to(q.scales.device)).to(q.scales.dtype))


def _has_row_scales(q: QuantizedTensor | FloatTensor) -> bool:
    """Whether each row has float scales of its own."""
    if isinstance(q, QuantizedTensor):
        return q.spec.group_size != PER_TENSOR
    return q.spec.scale == "float" and q.spec.rows == 1 and q.spec.group_size != PER_TENSOR


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
