"""GPTAQ: GPTQ towards the float model's outputs, although the inputs are those of the quantized model.

By the time a linear is solved, its inputs ``X`` are no longer the float model's ``X + ΔX``: what it should put out is
``W (X + ΔX)``, and the error to be made small is ``(W - Q) X + W ΔX`` (Li et al., arXiv:2504.02692). With the cross
product ``D = ΔX Xᵀ`` and the factor ``H = R Rᵀ`` of GPTQ, the weights that would cancel the second term are
``W + W D H⁻¹``, and ``D H⁻¹ = (D R⁻ᵀ) R⁻¹``. The paper spreads the term of each column over the columns still to come:
it keeps of ``D R⁻ᵀ`` what lies above the diagonal. GPTQ is linear in its weights, so either way the term can be added
before GPTQ begins. ``D`` is measured on few tokens and not only signal: a ``strength`` below 1 shrinks the term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lowbit.errors import UsageError
from lowbit.formats.weights import GridSpec
from lowbit.quant import gptq
from lowbit.quant.gptq import Factor, GptqOptions
from lowbit.quant.paired import PairedStatistics
from lowbit.quant.solution import Solution
from lowbit.quant.statistics import InputStatistics

__all__ = ["Correction", "GptaqOptions", "prepare", "solve", "target"]


@dataclass(frozen=True, slots=True)
class GptaqOptions:
    """How GPTAQ works; ``damping``, ``block_size``, ``ordering`` and ``range_method`` as for :class:`GptqOptions`.

    ``strength``    share of the correction that is made, from 0 (GPTQ) to 1 (all of it)
    ``correction``  ``joint``: by all columns together; ``columns``: each column's term by the columns solved after it,
                    as the paper has it
    """

    damping: float = 0.01
    block_size: int = 128
    ordering: Literal["none", "static"] = "static"
    range_method: Literal["minmax", "mse"] = "mse"
    strength: float = 0.5
    correction: Literal["joint", "columns"] = "joint"

    def __post_init__(self) -> None:
        self.gptq()
        if not 0.0 <= self.strength <= 1.0:
            raise UsageError(f"gptaq strength must be from 0 to 1, not {self.strength}")
        if self.correction not in ("joint", "columns"):
            raise UsageError(f"gptaq correction must be joint or columns, not {self.correction!r}")

    def gptq(self) -> GptqOptions:
        """The part of these options that GPTQ has too."""
        return GptqOptions(self.damping, self.block_size, self.ordering, self.range_method)


@dataclass(frozen=True, slots=True)
class Correction:
    """What every linear on one input shares: GPTQ's factor, and float32 ``[in, in]`` ``shift``, None for none.

    ``W + W shift`` is what GPTQ is to solve for.
    """

    factor: Factor
    shift: torch.Tensor | None


@torch.no_grad()
def prepare(statistics: InputStatistics, options: GptaqOptions) -> Correction:
    """Factorise the Gram matrix and work out the shift; statistics without a reference give no shift.

    Raises :class:`lowbit.errors.NumericsError` as :func:`lowbit.quant.gptq.factorise` does.
    """
    factor = gptq.factorise(statistics, options.gptq())
    if not isinstance(statistics, PairedStatistics) or options.strength == 0.0:
        return Correction(factor, None)
    order = factor.order
    cross = statistics.cross if order is None else statistics.cross[order][:, order]
    term = torch.linalg.solve_triangular(factor.upper, cross.T, upper=True).T
    if options.correction == "columns":
        term = term.triu(1)
    shift = torch.linalg.solve_triangular(factor.upper, term, upper=True, left=False).mul_(options.strength)
    if order is not None:
        back = torch.argsort(order)
        shift = shift[back][:, back]
    return Correction(factor, shift)


def target(weight: torch.Tensor, correction: Correction) -> torch.Tensor:
    """What GPTQ is to solve for instead of ``weight`` float ``[out, in]``; float32."""
    weight = weight.to(torch.float32)
    return weight if correction.shift is None else torch.addmm(weight, weight, correction.shift)


@torch.no_grad()
def solve(
    weight: torch.Tensor,
    correction: Correction,
    spec: GridSpec,
    options: GptaqOptions,
    keep: torch.Tensor | None = None,
) -> Solution:
    """Quantize ``weight`` float ``[out, in]`` (left unchanged), to zero where ``keep`` is False."""
    return gptq.solve(target(weight, correction), correction.factor, spec, options.gptq(), keep)
