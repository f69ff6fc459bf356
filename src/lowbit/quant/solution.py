"""What a solver hands back."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.formats.weights import WeightTensor

__all__ = ["Solution"]


@dataclass(frozen=True, slots=True)
class Solution:
    """A quantized weight and how it was reached.

    ``damping``  the damping that the factorisation needed (0 when there was none)
    ``notes``    one line each on anything that did not go as asked, e.g. a raised damping
    """

    tensor: WeightTensor
    damping: float = 0.0
    notes: tuple[str, ...] = ()
