"""Learned rounding: the codes and ranges of a whole block, tuned by signed gradient descent on its output.

Each weight gets an offset ``v`` in ``[-1/2, 1/2]`` steps that is added before it is rounded, each group a factor on
either end of its range; all of a block are learned together, so that its output comes close to the float block's
(SignRound, Cheng et al., arXiv:2309.05516). Gradients pass through the rounding as if it were not there, and only their
signs count: with a rate that falls linearly to zero from ``1 / steps`` every offset can travel half a step, which is
all it takes to change a code. Differently from the paper, tuning can start from the codes of another solver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lowbit.errors import NumericsError, UsageError
from lowbit.formats.integer import round_scales
from lowbit.formats.spec import IntSpec
from lowbit.formats.tensor import QuantizedTensor

__all__ = ["AutoRoundOptions", "Rounding", "Tuned", "tune"]

_INSIDE = 0.49
"""How near to the edge of its code's cell a weight starts that another solver has put there."""
_NARROWEST, _WIDEST = 0.5, 1.25
"""Bounds of the factors on the ends of a range."""
_JUDGED = 8
"""Batches that tell whether the tuned block is better than it was."""


@dataclass(frozen=True, slots=True)
class AutoRoundOptions:
    """How rounding is learned.

    ``steps``   of signed gradient descent
    ``batches`` of some 2048 tokens each that a step looks at
    ``rate``    first learning rate; 0 is ``1 / steps``
    ``start``   the method whose codes it begins with; ``rtn`` is the paper's
    ``ranges``  whether ranges are learned, too
    ``seed``    of the order of batches
    """

    steps: int = 200
    batches: int = 2
    rate: float = 0.0
    start: Literal["rtn", "gptq", "gptaq"] = "gptaq"
    ranges: bool = True
    seed: int = 42

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batches < 1:
            raise UsageError(f"autoround steps and batches must be at least 1, not {self.steps} and {self.batches}")
        if not 0.0 <= self.rate <= 1.0:
            raise UsageError(f"autoround rate must be from 0 (1 / steps) to 1, not {self.rate}")
        if self.start not in ("rtn", "gptq", "gptaq"):
            raise UsageError(f"autoround start must be rtn, gptq or gptaq, not {self.start!r}")


@dataclass(frozen=True, slots=True)
class Tuned:
    """The outcome: a tensor for each linear, and the block's mean squared error ``before`` and ``after``."""

    tensors: tuple[QuantizedTensor, ...]
    before: float
    after: float


class Rounding:
    """What is learned of one linear.

    ``linear``   the module in the block, whose weight follows
    ``weight``   float32 ``[out, in]``, what was quantized
    ``start``    the tensor to begin with
    ``columns``  float32 ``[in]`` that the block's weight is divided by (a transform's scales), or None
    """

    def __init__(
        self, linear: nn.Linear, weight: torch.Tensor, start: QuantizedTensor, columns: torch.Tensor | None = None
    ) -> None:
        self.linear = linear
        self.start = start
        self.spec: IntSpec = start.spec
        self._columns = columns
        self._groups = start.columns_to_groups()
        steps = start.scales.float()
        zero = self._zero_points()
        whole = (start.codes.float() - self._wide(zero)) * self._wide(steps)
        half = _INSIDE * self._wide(steps)
        self._weight = whole + (weight.float() - whole).clamp(-half, half)
        self._low, self._high = -zero * steps, (self.spec.levels - 1 - zero) * steps
        self.offset = torch.zeros_like(self._weight, requires_grad=True)
        self.ends = torch.ones(2, *steps.shape, device=steps.device, requires_grad=True)
        self.remember()

    def _zero_points(self) -> torch.Tensor:
        steps = self.start.scales.float()
        points = self.start.zero_points
        return torch.full_like(steps, float(self.spec.midpoint)) if points is None else points.float()

    def _wide(self, values: torch.Tensor) -> torch.Tensor:
        """Values of groups, one for each weight."""
        return values if self.spec.group_size == 0 else values[:, self._groups]

    def _grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Float scales (as stored) and zero points of each group, differentiable."""
        low, high = self._low * self.ends[0], self._high * self.ends[1]
        if self.spec.symmetric:
            low = self._low * self.ends[1]
        steps = (high - low) / (self.spec.levels - 1)
        steps = _as_if(round_scales(steps.detach(), self.spec.scale_dtype).float(), steps)
        if self.spec.symmetric:
            return steps, self._zero_points()
        points = -low / steps
        return steps, _as_if(points.detach().round().clamp(0, self.spec.levels - 1), points)

    def quantized(self) -> torch.Tensor:
        """The weight of the block's linear as it would be now, differentiable."""
        steps, zero = (self._wide(values) for values in self._grid())
        position = self._weight / steps + self.offset
        codes = (_as_if(position.detach().round(), position) + zero).clamp(0, self.spec.levels - 1)
        weight = (codes - zero) * steps
        return weight if self._columns is None else weight / self._columns

    @torch.no_grad()
    def tensor(self) -> QuantizedTensor:
        """The quantized weight as it would be now."""
        steps, zero = self._grid()
        position = self._weight / self._wide(steps) + self.offset
        codes = (position.round() + self._wide(zero)).clamp(0, self.spec.levels - 1).to(torch.uint8)
        zeros = None if self.spec.symmetric else zero.to(torch.uint8)
        return QuantizedTensor(self.spec, codes, steps.to(self.spec.scale_dtype), zeros)

    @torch.no_grad()
    def remember(self) -> None:
        """Keep what has been learned so far."""
        self._best = (self.offset.detach().clone(), self.ends.detach().clone())

    @torch.no_grad()
    def recall(self) -> None:
        """Go back to what was kept last."""
        self.offset.copy_(self._best[0])
        self.ends.copy_(self._best[1])

    @torch.no_grad()
    def descend(self, rate: float, *, ranges: bool) -> None:
        """One step against the signs of the gradients, which are forgotten."""
        learned = [(self.offset, -0.5, 0.5)]
        if ranges:
            learned.append((self.ends, _NARROWEST, _WIDEST))
        for values, low, high in learned:
            if values.grad is not None:
                values.sub_(values.grad.nan_to_num_().sign_(), alpha=rate).clamp_(low, high)
        self.offset.grad = self.ends.grad = None


Pair = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""Reads one batch: the block's input, and the output that is wanted."""


def tune(
    roundings: Sequence[Rounding],
    forward: Callable[[torch.Tensor], torch.Tensor],
    batches: Sequence[Pair],
    options: AutoRoundOptions,
) -> Tuned:
    """Learn all ``roundings`` of a block, which ``forward`` runs.

    What counts is the step whose error was the smallest share of what its batches had at the start, and where that is
    no better on a sample of all batches, the start. The block keeps the weights that it came with. Raises
    :class:`NumericsError` when its output is not finite.
    """
    generator = torch.Generator().manual_seed(options.seed)
    judged = batches[:: max(1, len(batches) // _JUDGED)][:_JUDGED]
    kept = [rounding.linear._parameters.pop("weight") for rounding in roundings]
    try:
        _set(roundings, [_started(rounding) for rounding in roundings])
        before = _loss(forward, judged)
        starts = [_loss(forward, [batch]) for batch in batches]
        first = options.rate or 1.0 / options.steps
        best = float("inf")
        for step in range(options.steps):
            picked = torch.randint(len(batches), (options.batches,), generator=generator).tolist()
            errors = [_learn(roundings, forward, batches[index]) for index in picked]
            share = sum(errors) / (sum(starts[index] for index in picked) or 1.0)
            if share < best:
                best = share
                for rounding in roundings:
                    rounding.remember()
            for rounding in roundings:
                rounding.descend(first * (1 - step / options.steps), ranges=options.ranges)
        for rounding in roundings:
            rounding.recall()
        tensors = tuple(rounding.tensor() for rounding in roundings)
        with torch.no_grad():
            _set(roundings, [rounding.quantized() for rounding in roundings])
        after = _loss(forward, judged)
    finally:
        for rounding, parameter in zip(roundings, kept, strict=True):
            del rounding.linear.weight
            rounding.linear._parameters["weight"] = parameter
    if not after < before:
        return Tuned(tuple(rounding.start for rounding in roundings), before, before)
    return Tuned(tensors, before, after)


def _learn(roundings: Sequence[Rounding], forward: Callable[[torch.Tensor], torch.Tensor], batch: Pair) -> float:
    """Add the gradients of one batch; returns its mean squared error."""
    inputs, wanted = batch()
    with torch.enable_grad():
        _set(roundings, [rounding.quantized() for rounding in roundings])
        output = forward(inputs).float()
        error = (output - wanted.to(output.device).float()).square().mean()
        error.backward()  # type: ignore[no-untyped-call]
    return float(error.detach())


def _started(rounding: Rounding) -> torch.Tensor:
    weight = rounding.start.dequantize()
    return weight if rounding._columns is None else weight / rounding._columns


def _set(roundings: Sequence[Rounding], weights: Sequence[torch.Tensor]) -> None:
    for rounding, weight in zip(roundings, weights, strict=True):
        # a plain attribute: a parameter would cut the gradient off
        rounding.linear.__dict__["weight"] = weight


@torch.no_grad()
def _loss(forward: Callable[[torch.Tensor], torch.Tensor], batches: Sequence[Pair]) -> float:
    total, count = 0.0, 0
    for batch in batches:
        inputs, wanted = batch()
        output = forward(inputs).double()
        total += float((output - wanted.to(output.device).double()).square().sum())
        count += wanted.numel()
    loss = total / max(1, count)
    if loss != loss:
        raise NumericsError("the block's output is not finite: use another method here")
    return loss


def _as_if(value: torch.Tensor, smooth: torch.Tensor) -> torch.Tensor:
    """``value`` forwards, the gradient of ``smooth`` backwards."""
    return smooth + (value - smooth).detach()
