"""Pruning: which weights become zero, and what becomes of the others.

``magnitude`` drops the smallest weights. ``wanda`` drops those whose weight times the norm of their input is smallest
in their row (Sun et al., arXiv:2306.11695). ``sparsegpt`` goes from left to right, drops what costs least once the
columns still to come have made up for it, and has them make up for it (Frantar and Alistarh, arXiv:2301.00774); its
bookkeeping is that of :mod:`lowbit.quant.gptq`, with zero as the only code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from lowbit.errors import NumericsError, UsageError
from lowbit.quant import gptq
from lowbit.quant.factor import invert_upper
from lowbit.quant.gptq import Factor, GptqOptions
from lowbit.quant.statistics import InputStatistics

__all__ = ["DEFAULT_PRUNER", "PRUNERS", "Pruned", "Sparsity", "parse_sparsity"]

_BLOCK = 128
_PATTERN = re.compile(r"(?P<kept>\d+):(?P<of>\d+)|(?P<share>\d+(?:\.\d+)?)%")


@dataclass(frozen=True, slots=True)
class Sparsity:
    """How many weights are zero: ``kept`` of every ``of`` in a row stay, or, with ``of`` 0, a ``share`` of all go."""

    share: float
    kept: int = 0
    of: int = 0

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}" if self.of else f"{100 * self.share:g}%"


@dataclass(frozen=True, slots=True)
class Pruned:
    """float32 ``weight`` ``[out, in]`` with its zeros, and bool ``keep``: False where one is.

    ``made_up`` says that the weights that stay have been changed to make up for those that went.
    """

    weight: torch.Tensor
    keep: torch.Tensor
    made_up: bool = False


def parse_sparsity(text: str) -> Sparsity:
    """``2:4`` (two of four weights stay), ``4:8`` …, or ``50%`` (half of all go).

    Raises :class:`UsageError` for other spellings, and for a pattern that prunes nothing or everything.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"sparsity {text!r}: write a pattern such as 2:4 or 4:8, or a share such as 50%")
    if match["share"]:
        share = float(match["share"]) / 100
        if not 0.0 < share < 1.0:
            raise UsageError(f"sparsity {text!r}: must be above 0% and below 100%")
        return Sparsity(share)
    kept, of = int(match["kept"]), int(match["of"])
    if not 0 < kept < of <= 64:
        raise UsageError(f"sparsity {text!r}: N:M keeps N of every M weights, 0 < N < M <= 64, e.g. 2:4")
    return Sparsity(1 - kept / of, kept, of)


Pruner: TypeAlias = Callable[[torch.Tensor, InputStatistics | None, Sparsity], Pruned]


@torch.no_grad()
def magnitude(weight: torch.Tensor, statistics: InputStatistics | None, sparsity: Sparsity) -> Pruned:
    """The smallest of the whole matrix, or of each run of columns, become zero."""
    scores = weight.float().abs()
    keep = _keep_runs(scores, sparsity) if sparsity.of else _keep_largest(scores.reshape(1, -1), sparsity.share)
    keep = keep.reshape(weight.shape)
    return Pruned(weight.float() * keep, keep)


@torch.no_grad()
def wanda(weight: torch.Tensor, statistics: InputStatistics | None, sparsity: Sparsity) -> Pruned:
    """Weights that matter least to their row's output, each taken alone, become zero."""
    scores = weight.float().abs() * _calibrated(statistics, "wanda").diagonal.clamp_min(0).sqrt()
    keep = _keep_runs(scores, sparsity) if sparsity.of else _keep_largest(scores, sparsity.share)
    return Pruned(weight.float() * keep, keep)


@torch.no_grad()
def sparsegpt(weight: torch.Tensor, statistics: InputStatistics | None, sparsity: Sparsity) -> Pruned:
    """Column by column, the error of what becomes zero moves onto the columns to come.

    A share is met in each block of 128 columns, over all rows together.
    """
    factor = gptq.factorise(_calibrated(statistics, "sparsegpt"), GptqOptions(ordering="none"))
    original = weight.to(torch.float32, copy=True)
    original[:, factor.dead] = 0.0
    keep = torch.ones_like(original, dtype=torch.bool)

    def prune_column(start: int, inside: int, current: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        pivots, column = inverse.diagonal(), start + inside
        if not sparsity.of and inside == 0:
            scores = (current / pivots).square().reshape(1, -1)
            keep[:, start : start + current.shape[1]] = _keep_largest(scores, sparsity.share).reshape(current.shape)
        elif sparsity.of and inside % sparsity.of == 0:
            run = slice(inside, inside + sparsity.of)
            scores = (current[:, run] / pivots[run]).square()
            keep[:, column : column + scores.shape[1]] = _keep_runs(scores, sparsity)
        return current[:, inside] * keep[:, column]

    block = _BLOCK - _BLOCK % sparsity.of if sparsity.of else _BLOCK
    result = _sweep(original, factor, block, prune_column)
    return Pruned(result, keep, made_up=True)


def _sweep(
    original: torch.Tensor,
    factor: Factor,
    block: int,
    choose: Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Replace columns of ``original`` (in the factor's order) one by one, errors moving onto those to come.

    ``choose(start, inside, current, inverse)`` gives the value of column ``inside`` of the block that begins at
    ``start``, from the block's corrected weights and its part of the inverse factor.
    """
    residual, result = torch.zeros_like(original), torch.empty_like(original)
    for start in range(0, original.shape[1], block):
        end = min(start + block, original.shape[1])
        inverse = invert_upper(factor.upper[start:end, start:end]).float()
        current = original[:, start:end].clone()
        if start:
            current += residual[:, :start] @ factor.upper[:start, start:end] @ inverse
        for column in range(end - start):
            value = choose(start, column, current, inverse)
            error = (current[:, column] - value) / inverse[column, column]
            current[:, column + 1 :] -= error[:, None] * inverse[column, column + 1 :]
            result[:, start + column] = value
        residual[:, start:end] = original[:, start:end] - result[:, start:end]
    return result


DEFAULT_PRUNER = "sparsegpt"

PRUNERS: Mapping[str, Pruner] = {"magnitude": magnitude, "wanda": wanda, "sparsegpt": sparsegpt}
"""Every pruner of ``--pruner``; all but ``magnitude`` need statistics."""


def _calibrated(statistics: InputStatistics | None, name: str) -> InputStatistics:
    if statistics is None or statistics.tokens == 0:
        raise NumericsError(
            f"{name} needs calibration inputs and has none: give more calibration text, or --pruner magnitude"
        )
    return statistics


def _keep_largest(scores: torch.Tensor, share: float) -> torch.Tensor:
    """bool like ``scores`` ``[n, m]``: False for exactly ``round(share m)`` of each row, the smallest, left first."""
    gone = round(share * scores.shape[1])
    keep = torch.ones_like(scores, dtype=torch.bool)
    smallest = torch.argsort(scores, dim=1, stable=True)[:, :gone]
    return keep.scatter_(1, smallest, False)


def _keep_runs(scores: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """bool like ``scores`` ``[out, in]``: True for the ``kept`` largest of every ``of`` columns; of a rest, as many."""
    rows, columns = scores.shape
    padding = -columns % sparsity.of
    runs = torch.nn.functional.pad(scores, (0, padding), value=-1.0).reshape(-1, sparsity.of)
    largest = torch.argsort(runs, dim=1, descending=True, stable=True)[:, : sparsity.kept]
    keep = torch.zeros_like(runs, dtype=torch.bool).scatter_(1, largest, True)
    return keep.reshape(rows, columns + padding)[:, :columns]
