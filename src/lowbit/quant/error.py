"""How far a quantized matrix is from the original: in its weights, and in its outputs on the calibration inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.quant.factor import quadratic_form
from lowbit.quant.statistics import InputStatistics

__all__ = ["WeightError", "output_energies", "output_error", "spaced_rows", "weight_error"]


@dataclass(frozen=True, slots=True)
class WeightError:
    """Differences between quantized and original weights: ``mean`` (signed), ``std``, ``max`` (absolute), and the
    root of the squared error over the squared weights, ``relative``."""

    mean: float
    std: float
    max: float
    relative: float


@torch.no_grad()
def weight_error(weight: torch.Tensor, quantized: torch.Tensor) -> WeightError:
    """Compare two matrices ``[out, in]``."""
    original = weight.float()
    difference = quantized.float() - original
    norm = float(original.norm())
    return WeightError(
        mean=float(difference.mean()),
        std=float(difference.std(correction=0)),
        max=float(difference.abs().max()),
        relative=float(difference.norm()) / norm if norm else 0.0,
    )


@torch.no_grad()
def output_error(
    weight: torch.Tensor, quantized: torch.Tensor, statistics: InputStatistics, rows: int | None = 512
) -> float:
    """``|X (W - Q)ᵀ|² / |X Wᵀ|²`` on the inputs ``X`` behind ``statistics``, without a forward.

    ``rows`` bounds the number of output features that are measured, evenly spaced (None: all). Zero when the original
    output is zero and the same, infinite when it is zero and the quantized one is not.
    """
    error, signal = output_energies(weight, quantized, statistics, rows)
    if signal <= 0.0:
        return 0.0 if error <= 0.0 else float("inf")
    return max(error, 0.0) / signal


@torch.no_grad()
def output_energies(
    weight: torch.Tensor, quantized: torch.Tensor, statistics: InputStatistics, rows: int | None = 512
) -> tuple[float, float]:
    """``|X (W - Q)ᵀ|²`` and ``|X Wᵀ|²`` on the rows that :func:`output_error` measures."""
    picked = spaced_rows(weight.shape[0], rows)
    original = weight[picked].float()
    error = float(quadratic_form(original - quantized[picked].float(), statistics.upper_gram).sum())
    return error, float(quadratic_form(original, statistics.upper_gram).sum())


def spaced_rows(count: int, limit: int | None) -> slice:
    """About ``limit`` evenly spaced rows out of ``count`` (never more than twice as many)."""
    return slice(0, count, 1 if limit is None else max(1, count // limit))
