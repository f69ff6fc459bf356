"""The Pareto front of a comparison: what has less divergence than everything as small."""

from __future__ import annotations

import math

from lowbit.evaluation.results import Comparison

__all__ = ["frontier"]


def frontier(comparison: Comparison) -> frozenset[str]:
    """Names of the candidates that no other beats: none has as few bits per weight and as little divergence, and less
    of one. Bits are those of the quantized modules; a candidate without a divergence is never on the front."""
    points = [
        (entry.name, entry.evaluation.linear_bits_per_weight, entry.evaluation.kl_divergence)
        for entry in comparison.candidates
    ]
    known = [(name, bits, kl) for name, bits, kl in points if kl is not None and math.isfinite(kl)]
    return frozenset(
        name for name, bits, kl in known if not any(b <= bits and k <= kl and (b < bits or k < kl) for _, b, k in known)
    )
