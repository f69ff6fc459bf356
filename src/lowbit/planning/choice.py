"""Choosing a precision: a pure rule over candidates that are known to fit or not, measured or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Quality = Literal["high", "balanced", "small"]

LIMITS: Mapping[Quality, float] = {"high": 0.02, "balanced": 0.05, "small": 0.25}
"""Largest increase of perplexity that a use may cost."""

_LARGE = 7_000_000_000
_SMALL = 2_000_000_000
_MARGIN = 0.05
"""Share of the budget that ought to stay free: fragmentation, a longer prompt."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A certificate: ``ratio`` of perplexities less one, ``divergence`` in nats, and the checkpoint it is of."""

    name: str
    method: str
    ratio: float
    divergence: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A precision with a cache format on the devices. ``missing`` are bytes that it lacks there, 0 if it fits."""

    scheme: str
    bits: float
    kv_dtype: str
    kv_bits: float
    total: int
    budget: int
    measured: Measured | None = None

    @property
    def missing(self) -> int:
        """Bytes that the device lacks."""
        return max(0, self.total - self.budget)

    @property
    def is_tight(self) -> bool:
        """Whether it fits with hardly any room."""
        return not self.missing and self.budget - self.total < _MARGIN * self.budget


@dataclass(frozen=True, slots=True)
class Choice:
    """``chosen`` is None where nothing will do; ``reasons`` by what was decided; ``warnings`` in words."""

    chosen: Candidate | None
    runner_up: Candidate | None
    reasons: Mapping[str, str]
    warnings: tuple[str, ...] = ()


def expected_loss(bits: float, parameters: int) -> float:
    """Increase of perplexity to expect of a weight width where nothing was measured.

    8 bits usually cost 1 to 2 %, 4 bits 3 to 5 % (the figures that lowbit warns beyond); models below 7 billion
    parameters lose more at few bits.
    """
    if bits >= 15:
        return 0.0
    if bits >= 7.5:
        loss = 0.012
    elif bits >= 4:
        loss = 0.018 + 0.022 * max(0.0, 5.5 - bits) / 1.5
    else:
        loss = 0.04 * 2.2 ** (4 - bits)
    if parameters < _LARGE and bits < 7.5:
        loss *= 2 if parameters < _SMALL else 1.3
    return loss


def choose(candidates: Sequence[Candidate], quality: Quality, parameters: int) -> Choice:
    """The candidate for a use that allows the loss of :data:`LIMITS`, and the next best.

    ``high`` takes the most precise that fits, ``balanced`` and ``small`` the smallest within their limit. A cache of
    fewer bits is taken only where a fuller one does not fit. Measured losses count before expected ones.
    """
    limit = LIMITS[quality]
    fitting = [entry for entry in candidates if not entry.missing]
    good = [entry for entry in fitting if loss_of(entry, parameters) <= limit]
    if not fitting:
        closest = min(candidates, key=lambda entry: entry.missing, default=None)
        return Choice(None, closest, {}, ())
    warnings: list[str] = []
    pool = good
    if not good:
        pool = [min(fitting, key=lambda entry: loss_of(entry, parameters))]
        warnings.append(
            f"what fits costs more than the {limit:.0%} of perplexity that {quality!r} allows: "
            f"{told_loss(pool[0], parameters)}: measure it with lowbit eval, or take a larger device"
        )
    sign = -1 if quality == "high" else 1
    ordered = sorted(pool, key=lambda entry: (sign * _class(entry.bits), -entry.kv_bits, loss_of(entry, parameters)))
    if quality != "high":
        ordered = sorted(
            pool, key=lambda entry: (entry.is_tight, _class(entry.bits), -entry.kv_bits, loss_of(entry, parameters))
        )
    chosen = ordered[0]
    others = [entry for entry in fitting if entry is not chosen and entry.scheme != chosen.scheme]
    runner_up = min(others, key=lambda entry: (entry.is_tight, abs(entry.bits - chosen.bits)), default=None)
    if chosen.is_tight:
        warnings.append("it fits with less than 5 % to spare: a longer prompt than asked for will wait or fail")
    return Choice(chosen, runner_up, _reasons(chosen, candidates, quality, parameters), tuple(warnings))


def loss_of(candidate: Candidate, parameters: int) -> float:
    """Measured increase of perplexity, else the expected one."""
    return candidate.measured.ratio if candidate.measured else expected_loss(candidate.bits, parameters)


def told_loss(candidate: Candidate, parameters: int) -> str:
    """The loss in words, with where it is known from."""
    if candidate.measured is not None:
        found = candidate.measured
        return f"measured {found.ratio:+.1%} perplexity, KL {found.divergence:.3g} nats ({found.name})"
    return f"expected {expected_loss(candidate.bits, parameters):+.1%} perplexity, not measured on this model"


def _class(bits: float) -> int:
    """Widths between which a choice is made; within one, the measured loss decides."""
    return round(bits)


def _reasons(chosen: Candidate, candidates: Sequence[Candidate], quality: Quality, parameters: int) -> dict[str, str]:
    rules = {
        "high": "the most precise that fits",
        "balanced": "the smallest within 5 % of the original's perplexity",
        "small": "the smallest within 25 % of the original's perplexity",
    }
    reasons = {"precision": f"{rules[quality]}; {told_loss(chosen, parameters)}"}
    fuller = [entry for entry in candidates if entry.scheme == chosen.scheme and entry.kv_bits > chosen.kv_bits]
    if fuller:
        missing = min(entry.missing for entry in fuller)
        reasons["kv cache"] = f"16 bits lack {missing / 2**30:.2f} GiB for the context and requests asked"
    elif chosen.kv_bits < 16:
        reasons["kv cache"] = "asked for"
    else:
        reasons["kv cache"] = "16 bits fit, so nothing is lost there"
    return reasons
