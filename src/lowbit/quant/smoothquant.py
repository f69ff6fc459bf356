"""SmoothQuant: move the outliers of an input into the weights, so that both survive being rounded.

With ``x`` the largest magnitude of each input channel and ``w`` that of the weights on it, the columns of the weights
are multiplied by ``s = x^a / w^(1-a)`` and the inputs divided by it (Xiao et al., arXiv:2211.10438). The migration
strength ``a`` is not fixed but searched for each input: on a sample of its rows, the output error of weights and
inputs rounded together, ``|X Wᵀ - Q(X / s) Q(W s)ᵀ|²``, decides, and no scaling at all is one of the candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lowbit.errors import NumericsError, UsageError
from lowbit.formats.activations import ActivationSpec, fake_quantize, static_scale
from lowbit.formats.rounding import round_weight
from lowbit.formats.weights import WeightSpec
from lowbit.quant.error import spaced_rows
from lowbit.quant.statistics import InputStatistics

__all__ = ["SmoothQuantOptions", "SmoothScaling", "search_scales"]


@dataclass(frozen=True, slots=True)
class SmoothQuantOptions:
    """How SmoothQuant works.

    ``steps``     strengths ``0, 1/steps, … 1`` that may be chosen
    ``strength``  the only one instead (the original's 0.5, say); negative: search
    ``rows``      about how many output features, evenly spaced, stand for all in the search (0: all)
    """

    steps: int = 10
    strength: float = -1.0
    rows: int = 512

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"smoothquant steps must be at least 1, not {self.steps}: 10 is usual")
        if self.strength > 1.0:
            raise UsageError(f"smoothquant strength must be 0 to 1 (negative: searched), not {self.strength}")
        if self.rows < 0:
            raise UsageError(f"smoothquant rows must be 0 (all) or positive, not {self.rows}")


@dataclass(frozen=True, slots=True)
class SmoothScaling:
    """The outcome of a search: float32 ``scales`` ``[in]`` to multiply the columns of the weights by.

    ``before`` and ``after`` are the output errors without and with them on the sample, as shares of the output.
    """

    scales: torch.Tensor
    strength: float
    before: float
    after: float


@torch.no_grad()
def search_scales(
    weights: Sequence[torch.Tensor],
    statistics: InputStatistics,
    spec: WeightSpec,
    inputs: ActivationSpec | None,
    options: SmoothQuantOptions,
) -> SmoothScaling:
    """Search the scales shared by ``weights`` (float ``[out_i, in]`` each, one input).

    Weights are rounded as ``spec`` and inputs as ``inputs`` (None: not at all). Raises :class:`NumericsError` without
    calibration inputs.
    """
    if statistics.tokens == 0:
        raise NumericsError("smoothquant needs calibration inputs and has none: give more calibration text")
    limit = None if options.rows == 0 else max(1, options.rows // len(weights))
    part = torch.cat([weight[spaced_rows(weight.shape[0], limit)].float() for weight in weights])
    largest = torch.stack([weight.abs().amax(0).float() for weight in weights]).amax(0)
    sample = statistics.sample
    wanted = sample @ part.T
    signal = float(wanted.square().sum()) or 1.0

    def error(scales: torch.Tensor) -> float:
        calibrated = None
        if inputs is not None and inputs.needs_calibration:
            calibrated = static_scale(float((statistics.abs_max / scales).max()), inputs).to(sample.device)
        rows = sample / scales
        rows = rows if inputs is None else fake_quantize(rows, inputs, calibrated)
        rounded = round_weight(part * scales, spec).dequantize()
        return float((rows @ rounded.T - wanted).square().sum()) / signal

    ones = torch.ones_like(largest)
    before = error(ones)
    strengths = [step / options.steps for step in range(options.steps + 1)]
    if options.strength >= 0:
        strengths = [options.strength]
    candidates = [(_scales(statistics.abs_max, largest, strength), strength) for strength in strengths]
    errors = [error(scales) for scales, _ in candidates]
    best = min(range(len(candidates)), key=errors.__getitem__)
    if errors[best] >= before and options.strength < 0:
        return SmoothScaling(ones, 0.0, before, before)
    return SmoothScaling(*candidates[best], before, errors[best])


def _scales(inputs: torch.Tensor, weights: torch.Tensor, strength: float) -> torch.Tensor:
    """Scales for one strength; channels without input or weights keep 1, and none strays further than 1e4 from it."""
    live = (inputs > 0) & (weights > 0)
    scales = inputs.pow(strength) / weights.clamp_min(1e-30).pow(1 - strength)
    scales = torch.where(live, scales, torch.ones_like(scales))
    if bool(live.any()):
        # The mean exponent is free: a common factor of all scales changes no rounding, but keeps norms in range.
        scales = torch.where(live, scales / scales[live].log().mean().exp(), scales)
    return scales.clamp(1e-4, 1e4)
