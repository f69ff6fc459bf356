"""Rules of thumb that people know, to be shown beside exact figures."""

from __future__ import annotations

from dataclasses import dataclass

_OVERHEAD = 1.2


@dataclass(frozen=True, slots=True)
class ThumbRules:
    """Bytes by the rules: weights at 32, 16, 8 and 4 bits times 1.2, and the 16-bit cache of 1k, 16k, 128k tokens."""

    weights: dict[int, int]
    cache: dict[int, int]


def thumb_weights(parameters: int, bits: float) -> int:
    """``M = P * 4 bytes / (32 / Q) * 1.2``."""
    return int(parameters * 4 / (32 / bits) * _OVERHEAD)


def thumb_rules(parameters: int, bytes_per_token: int) -> ThumbRules:
    """The rules for a model of ``parameters`` whose cache grows by ``bytes_per_token``."""
    return ThumbRules(
        {bits: thumb_weights(parameters, bits) for bits in (32, 16, 8, 4)},
        {tokens: tokens * bytes_per_token for tokens in (1024, 16_000, 128_000)},
    )


def select_bits(weights_8: int, weights_4: int, memory: int, *, critical: bool) -> tuple[int | None, str]:
    """The selector people use: 4 bits with room and an uncritical use, 8 bits where it is critical and they fit.

    ``memory`` are the bytes for weights. Returns bits (None: neither will do) and the reason.
    """
    if critical:
        if weights_8 <= memory:
            return 8, "the use is critical and 8 bits fit"
        if weights_4 <= memory:
            return None, "the use is critical, and only 4 bits fit: a larger device, or a smaller model at 8 bits"
        return None, "neither 8 nor 4 bits fit: a larger device, more of them, or a smaller model"
    if weights_4 <= memory:
        return 4, "4 bits fit and the use is not critical"
    return None, "not even 4 bits fit: a larger device, more of them, or a smaller model"
