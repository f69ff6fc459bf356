"""What a solver hands back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lowbit.formats.weights import WeightTensor

__all__ = ["Solution"]


@dataclass(frozen=True, slots=True)
class Solution:
    """A quantized weight and how it was reached.

    ``damping``   the damping that the factorisation needed (0 when there was none)
    ``notes``     one line each on anything that did not go as asked, e.g. a raised damping
    ``method``    the method that was chosen, where there was a choice (:mod:`lowbit.quant.best`); then
    ``errors``    of each method that was tried, the share of the output that is error, what is wanted being GPTAQ's
    ``energy``    what those are shares of
    ``left_out``  methods that there was no time for
    """

    tensor: WeightTensor
    damping: float = 0.0
    notes: tuple[str, ...] = ()
    method: str | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    energy: float = 0.0
    left_out: tuple[str, ...] = ()
