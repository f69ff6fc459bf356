"""GPTQ: quantize columns one by one, each time moving the error onto the columns not yet quantized.

The output error of a row with residual ``e`` is ``e H eᵀ``, ``H`` the damped Gram matrix of the inputs. With
``H = R Rᵀ``, ``R`` upper triangular, that is ``|e R|²``, and column ``j`` of ``e R`` involves ``e_1 .. e_j`` only: once
the columns left of a block are done, the weights of the block that would cancel their error are
``w + e_left R[left, block] R[block, block]⁻¹``. So one triangular factor serves, the inverse of ``H`` is never formed
(only those of the diagonal blocks), the corrections of a block are one matrix product, and they read residuals
instead of rewriting all columns to the right. It is the algorithm of Frantar et al. (arXiv:2210.17323), as LDLQ
(arXiv:2307.13304) puts it: the same numbers as its inverse-Cholesky form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from lowbit.errors import NumericsError, UsageError
from lowbit.formats.codebook import CodebookSpec, CodebookTensor, nest, sorted_table
from lowbit.formats.floating import Element, FloatSpec, FloatTensor, stored_scale_values
from lowbit.formats.floating import encode as encode_floats
from lowbit.formats.spec import PER_CHANNEL, IntSpec
from lowbit.formats.tensor import QuantizedTensor
from lowbit.formats.weights import GridSpec, WeightTensor
from lowbit.kernels.gptq import Block, quantize_columns
from lowbit.quant.factor import invert_upper, reverse_cholesky_
from lowbit.quant.float_scales import choose_scales
from lowbit.quant.ranges import choose_grid, float_grid
from lowbit.quant.solution import Solution
from lowbit.quant.statistics import InputStatistics

__all__ = ["Factor", "GptqOptions", "factorise", "solve"]


_SMALLEST = 1e-38
_SPAN = 512
"""Columns whose corrections from further left are one product: wide products run faster than narrow ones."""


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """How GPTQ works.

    ``damping``       share of the Gram matrix's mean diagonal added to its diagonal, in ``(0, 1]``
    ``block_size``    columns between two matrix products
    ``ordering``      ``none``: columns from left to right, ranges from the corrected weights as each group starts;
                      ``static``: columns by falling mean square of their input, ranges from the original weights, so
                      that groups stay where they are and no ``g_idx`` is needed
    ``range_method``  how each group's range is chosen; ``mse`` weighs columns by their share in the final error
    """

    damping: float = 0.01
    block_size: int = 128
    ordering: Literal["none", "static"] = "static"
    range_method: Literal["minmax", "mse"] = "mse"

    def __post_init__(self) -> None:
        if not 0.0 < self.damping <= 1.0:
            raise UsageError(f"gptq damping must be above 0 and at most 1, not {self.damping}: 0.01 is usual")
        if self.block_size < 1:
            raise UsageError(f"gptq block_size must be positive, not {self.block_size}: 128 is usual")
        if self.ordering not in ("none", "static"):
            raise UsageError(f"gptq ordering must be none or static, not {self.ordering!r}")
        if self.range_method not in ("minmax", "mse"):
            raise UsageError(f"gptq range_method must be minmax or mse, not {self.range_method!r}")


@dataclass(frozen=True, slots=True)
class Factor:
    """What every linear with the same input shares.

    ``upper``      float32 ``[in, in]``, ``R`` of ``H = R Rᵀ`` in its upper triangle, rubbish below
    ``dead``       bool ``[in]``: columns whose input was always zero
    ``order``      int64 ``[in]``: column solved at each position, or None for left to right
    ``damping``    the share that was used: the one asked for, or the first larger one that worked
    ``precision``  dtype of the factorisation that worked
    """

    upper: torch.Tensor
    dead: torch.Tensor
    order: torch.Tensor | None
    damping: float
    precision: torch.dtype


@torch.no_grad()
def factorise(statistics: InputStatistics, options: GptqOptions) -> Factor:
    """Factorise the damped Gram matrix; needs one more matrix of its size.

    float32 first, then float64 at the same damping, then four times the damping until it holds. Raises
    :class:`NumericsError` when no rows were counted or nothing up to a damping of 1 holds.
    """
    diagonal = statistics.diagonal
    if statistics.tokens == 0 or not bool(torch.isfinite(diagonal).all()):
        raise NumericsError("gptq needs finite calibration inputs and has none: give more calibration text, or use rtn")
    dead = diagonal == 0
    order = None
    if options.ordering == "static":
        order = torch.argsort(diagonal, descending=True, stable=True)
    mean = float(diagonal.double().mean()) or 1.0
    damping = options.damping
    while True:
        for precision in (torch.float32, torch.float64):
            matrix = _ordered(statistics, order).to(precision)
            ridge = torch.where(dead, mean, damping * mean).to(precision)
            matrix.diagonal().add_(ridge if order is None else ridge[order])
            if reverse_cholesky_(matrix):
                return Factor(matrix.float(), dead, order, damping, precision)
            del matrix
        if damping == 1.0:
            raise NumericsError("the Gram matrix of the inputs cannot be factorised even with damping 1: use rtn here")
        damping = min(4 * damping, 1.0)


def _ordered(statistics: InputStatistics, order: torch.Tensor | None) -> torch.Tensor:
    """A copy of the Gram matrix (upper blocks suffice), rows and columns in ``order``."""
    if order is None:
        return statistics.upper_gram.clone()
    gram = statistics.gram
    permuted = torch.empty_like(gram)
    for rows, target in zip(torch.split(order, 512), torch.split(permuted, 512), strict=True):
        torch.index_select(gram[rows], 1, order, out=target)
    return permuted


@torch.no_grad()
def solve(
    weight: torch.Tensor,
    factor: Factor,
    spec: GridSpec,
    options: GptqOptions,
    keep: torch.Tensor | None = None,
) -> Solution:
    """Quantize ``weight`` float ``[out, in]`` (left unchanged). Raises :class:`NumericsError` if it is not finite.

    Where ``keep`` (bool, like ``weight``) is False the result is zero; what a zero takes away is an error like that of
    rounding, made up for by the columns solved after it. Ranges are then chosen beforehand from the weights that stay.
    """
    columns = weight.shape[1]
    if factor.upper.shape[0] != columns:
        raise NumericsError(f"weight has {columns} columns, the statistics of its input {factor.upper.shape[0]}")
    weight = weight.to(torch.float32, copy=True)
    if bool(factor.dead.any()):
        weight[:, factor.dead] = 0.0
    solved: WeightTensor
    if isinstance(spec, FloatSpec):
        solved = _solve_floats(weight, factor, spec, options, keep)
    elif isinstance(spec, CodebookSpec):
        solved = _solve_codebook(weight, factor, spec, options, keep)
    elif spec.group_size > 0 and factor.order is None and keep is None:
        solved = _solve_growing(weight, factor, spec, options)
    else:
        solved = _solve_fixed(weight, factor, spec, options, keep)
    notes: tuple[str, ...] = ()
    if factor.damping > options.damping:
        notes = (f"damping raised from {options.damping:g} to {factor.damping:g} for the factorisation to hold",)
    return Solution(solved, factor.damping, notes)


def _solve_growing(weight: torch.Tensor, factor: Factor, spec: IntSpec, options: GptqOptions) -> QuantizedTensor:
    """Left to right, each group's range chosen from its corrected weights when its turn comes."""
    rows, columns = weight.shape
    size = spec.group_size
    run = _Run(weight, factor.upper, spec.levels)
    one_group = replace(spec, group_size=PER_CHANNEL)
    importance = factor.upper.diagonal().square()
    scales: list[torch.Tensor] = []
    zeros: list[torch.Tensor] = []
    span = size * max(1, options.block_size // size)
    for start in range(0, columns, span):
        end = min(start + span, columns)
        current = run.corrected(start, end)
        whole = run.block(current, start)
        for left in range(start, end, size):
            right = min(left + size, end)
            part = current[:, left - start : right - start]
            step, zero = choose_grid(part, one_group, options.range_method, importance=importance[left:right])
            scales.append(step)
            zeros.extend([] if zero is None else [zero])
            grid = float_grid(step, zero, spec, rows)
            if size <= options.block_size:
                quantize_columns(whole, *grid, left - start, right - start)
                continue
            for first in range(left, right, options.block_size):
                last = min(first + options.block_size, right)
                quantize_columns(run.block(run.corrected(first, last), first), *grid, 0, last - first)
    return QuantizedTensor(spec, run.codes, torch.cat(scales, 1), torch.cat(zeros, 1) if zeros else None)


def _solve_fixed(
    weight: torch.Tensor, factor: Factor, spec: IntSpec, options: GptqOptions, keep: torch.Tensor | None
) -> QuantizedTensor:
    """In the factor's order, all ranges chosen from the original weights beforehand."""
    kept = weight if keep is None else weight * keep
    scales, zeros = choose_grid(kept, spec, options.range_method, importance=_importance(factor))
    steps, points = float_grid(scales, zeros, spec, weight.shape[0])
    order = _order(factor)
    groups = order // spec.group_size if spec.group_size > 0 else torch.zeros_like(order)
    run = _Run(weight[:, order] if factor.order is not None else weight, factor.upper, spec.levels)
    run.solve(steps, points, groups, options.block_size, None if keep is None else keep[:, order].float())
    return QuantizedTensor(spec, _in_place(run.codes, factor), scales, zeros)


def _solve_floats(
    weight: torch.Tensor, factor: Factor, spec: FloatSpec, options: GptqOptions, keep: torch.Tensor | None
) -> FloatTensor:
    """In the factor's order, all scales chosen from the original weights beforehand."""
    search = options.range_method != "minmax"
    kept = weight if keep is None else weight * keep
    scales, whole = choose_scales(kept, spec, search=search, importance=_importance(factor))
    rows = weight.shape[0]
    steps = stored_scale_values(scales, spec, whole).repeat_interleave(max(1, spec.rows), 0)[:rows].expand(rows, -1)
    order = _order(factor)
    groups = order // spec.group_size if spec.group_size > 0 else torch.zeros_like(order)
    run = _Run(weight[:, order], factor.upper, 0, spec.element)
    run.solve(steps.contiguous(), steps, groups, options.block_size, None if keep is None else keep[:, order].float())
    # What is left of a weight is how far it was moved; the values lie on the grid, so that their codes are certain.
    return encode_floats(weight - _in_place(run.residual, factor), spec, scales, whole)


def _solve_codebook(
    weight: torch.Tensor, factor: Factor, spec: CodebookSpec, options: GptqOptions, keep: torch.Tensor | None
) -> CodebookTensor:
    """In the factor's order, each block of the flattened matrix under the maximum of its original weights."""
    rows, columns = weight.shape
    padding = spec.blocks(rows, columns) * spec.group_size - weight.numel()
    kept = weight if keep is None else weight * keep
    maxima = torch.nn.functional.pad(kept.flatten(), (0, padding)).view(-1, spec.group_size).abs().amax(1)
    if not bool(torch.isfinite(maxima).all()):
        raise NumericsError("a weight is NaN or infinite: the source checkpoint is damaged")
    table, codes, _ = (part.to(weight.device) for part in sorted_table(spec.codebook))
    absmax = nest(maxima) if spec.double_quant else maxima
    stored = maxima if isinstance(absmax, torch.Tensor) else absmax.values()
    # a block may begin in the middle of a row, so that every weight has a scale of its own here
    steps = stored.clamp_min(_SMALLEST).repeat_interleave(spec.group_size)[: weight.numel()].view(rows, columns)
    order = _order(factor)
    run = _Run(weight[:, order], factor.upper, 0, table)
    run.solve(steps, steps, order, options.block_size, None if keep is None else keep[:, order].float())
    return CodebookTensor(spec, codes[_in_place(run.codes, factor).long()].to(torch.uint8), absmax)


def _order(factor: Factor) -> torch.Tensor:
    """int64 ``[in]``: the column solved at each position."""
    if factor.order is not None:
        return factor.order
    return torch.arange(factor.upper.shape[0], device=factor.upper.device)


def _importance(factor: Factor) -> torch.Tensor:
    """float32 ``[in]``: the share of each column's squared error in the output's, later columns having made up."""
    return _in_place(factor.upper.diagonal().square()[None], factor)[0]


def _in_place(values: torch.Tensor, factor: Factor) -> torch.Tensor:
    """Columns of ``values`` back from the factor's order."""
    if factor.order is None:
        return values
    back = torch.empty_like(values)
    back[:, factor.order] = values
    return back


class _Run:
    """The state of one solve: residuals left of the current block, original weights from it on, and the codes."""

    def __init__(
        self, weight: torch.Tensor, upper: torch.Tensor, levels: int, grid: Element | torch.Tensor | None = None
    ) -> None:
        """Takes ``weight`` over as the residual of nothing quantized."""
        self.residual = weight.contiguous()
        self.upper = upper
        self.codes = torch.empty_like(self.residual, dtype=torch.uint8)
        self.levels, self.grid = levels, grid
        self._span = 0
        self._carried = self.residual[:, :0]

    def solve(
        self,
        steps: torch.Tensor,
        points: torch.Tensor,
        groups: torch.Tensor,
        size: int,
        keep: torch.Tensor | None,
    ) -> None:
        """Quantize all columns, ``size`` at a time, on ranges that stand; ``groups`` ``[in]`` names that of each."""
        columns = self.residual.shape[1]
        for start in range(0, columns, size):
            end = min(start + size, columns)
            block = self.block(self.corrected(start, end), start, groups[start:end], keep)
            quantize_columns(block, steps, points, 0, end - start)

    def corrected(self, start: int, end: int) -> torch.Tensor:
        """Columns ``start .. end`` moved to cancel the error of all columns before ``start``; float32, contiguous."""
        if start == 0:
            return self.residual[:, :end].clone()
        inverse = invert_upper(self.upper[start:end, start:end]).float()
        return torch.addmm(self.residual[:, start:end], self._left(start, end), inverse)

    def _left(self, start: int, end: int) -> torch.Tensor:
        """``residual[:, :start] @ upper[:start, start:end]``; what lies left of a span is multiplied once for all."""
        if start // _SPAN != self._span or end > self._span * _SPAN + self._carried.shape[1]:
            self._span = start // _SPAN
            left = self._span * _SPAN
            right = max(end, min(left + _SPAN, self.upper.shape[0]))
            self._carried = self.residual[:, :left] @ self.upper[:left, left:right]
        left = self._span * _SPAN
        carried = self._carried[:, start - left : end - left]
        if left == start:
            return carried
        return torch.addmm(carried, self.residual[:, left:start], self.upper[left:start, start:end])

    def block(
        self,
        current: torch.Tensor,
        start: int,
        groups: torch.Tensor | None = None,
        keep: torch.Tensor | None = None,
    ) -> Block:
        """The kernel's view of the columns of ``current``, which begin at ``start``; one group unless told.

        ``keep`` is float32 ``[out, in]``.
        """
        end = start + current.shape[1]
        inverse = invert_upper(self.upper[start:end, start:end]).float().contiguous()
        if groups is None:
            groups = torch.zeros(end - start, dtype=torch.int32, device=current.device)
        groups = groups.to(torch.int32)
        kept = None if keep is None else keep[:, start:end].contiguous()
        return Block(start, self.levels, current, inverse, groups, self.codes, self.residual, self.grid, kept)
