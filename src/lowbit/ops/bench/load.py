"""The pure core of a load test: lengths, arrivals, what became of each request, and the figures of a level of load.

Arrivals are a Poisson process fixed before the run (open loop): none waits for an answer, and latency is counted from
the moment a request was due. A server that stalls is charged for every request that was due meanwhile, which a client
that waits would leave out (coordinated omission).
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lowbit.errors import UsageError
from lowbit.ops.bench.stats import Better, quantile

__all__ = [
    "SERVING_FIGURES",
    "Lengths",
    "Objectives",
    "Outcome",
    "Request",
    "failures",
    "parse_lengths",
    "parse_rates",
    "parse_seconds",
    "poisson_requests",
    "requests_of",
    "serving_figures",
]

_TIME = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|m|min|h)?")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_LENGTHS = re.compile(r"(\d+)|(\d+)-(\d+)|lognormal:(\d+):(\d+(?:\.\d+)?)")
_WIDEST = 4.0
"""A log-normal length is cut at this multiple of its median."""
_PERCENTILES = (50, 90, 99)
_LATENCIES = ("ttft", "itl", "tpot", "e2e")

SERVING_FIGURES: dict[str, tuple[str, Better]] = {
    **{f"{name}_p{share}": ("s", "less") for name in _LATENCIES for share in _PERCENTILES},
    "requests_per_second": ("1/s", "more"),
    "output_tokens_per_second": ("tokens/s", "more"),
    "goodput": ("1/s", "more"),
    "attainment": ("share", "more"),
    "in_flight": ("requests", "less"),
    "late": ("s", "less"),
}
"""Figure to its unit and better direction. ``late``: how long after it was due this client sent a request, at worst."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts: uniform from ``low`` to ``high``, or log-normal with ``median`` and ``sigma``."""

    low: int
    high: int
    median: float | None = None
    sigma: float = 0.0

    def draw(self, rng: random.Random) -> int:
        """One length."""
        if self.median is None:
            return rng.randint(self.low, self.high)
        return min(self.high, max(self.low, round(self.median * math.exp(rng.gauss(0.0, self.sigma)))))

    def __str__(self) -> str:
        if self.median is not None:
            return f"lognormal:{self.median:g}:{self.sigma:g}"
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class Request:
    """A request to be sent ``at`` seconds after the start, with lengths in tokens."""

    at: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Objectives:
    """Most seconds to the first token, between tokens (mean of a request, TPOT) and in all; None: no matter."""

    ttft: float | None = None
    itl: float | None = None
    e2e: float | None = None

    def met(self, outcome: Outcome) -> bool:
        """Whether a request was answered, and in time."""
        if outcome.failure is not None or outcome.ttft is None:
            return False
        pairs = ((outcome.ttft, self.ttft), (outcome.tpot, self.itl), (outcome.e2e, self.e2e))
        return all(limit is None or value <= limit for value, limit in pairs)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request; seconds since the start of the run.

    ``due`` and ``sent`` are apart only where the client was late. ``gaps`` are the times between tokens; a chunk of k
    tokens counts as k gaps of a k-th each. ``failure`` names its kind, None for an answer that came whole.
    """

    due: float
    sent: float
    finished: float
    first: float | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    gaps: tuple[float, ...] = ()
    failure: str | None = None

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token, from when the request was due."""
        return None if self.first is None else self.first - self.due

    @property
    def tpot(self) -> float:
        """Mean seconds per token after the first; 0 for a single one."""
        return sum(self.gaps) / len(self.gaps) if self.gaps else 0.0

    @property
    def e2e(self) -> float:
        """Seconds to the last token, from when the request was due."""
        return self.finished - self.due


def parse_seconds(text: str, flag: str) -> float:
    """``500ms``, ``2s``, ``5m`` or plain seconds. Raises :class:`UsageError` naming ``flag``."""
    match = _TIME.fullmatch(text.strip())
    if match is None or float(match["number"]) <= 0:
        raise UsageError(f"{flag} {text!r} is not a time: write e.g. 500ms, 30s or 5m")
    return float(match["number"]) * _SECONDS[match["unit"] or "s"]


def parse_lengths(text: str, flag: str) -> Lengths:
    """``128``, ``64-256`` (uniform) or ``lognormal:MEDIAN:SIGMA``. Raises :class:`UsageError` naming ``flag``."""
    match = _LENGTHS.fullmatch(text.strip())
    if match is not None:
        fixed, low, high, median, sigma = match.groups()
        if fixed and int(fixed) > 0:
            return Lengths(int(fixed), int(fixed))
        if low and 0 < int(low) <= int(high):
            return Lengths(int(low), int(high))
        if median and int(median) > 0:
            return Lengths(1, math.ceil(int(median) * _WIDEST), float(median), float(sigma))
    raise UsageError(f"{flag} {text!r} is not a length in tokens: write e.g. 128, 64-256 or lognormal:128:0.5")


def parse_rates(text: str, flag: str) -> tuple[float, ...]:
    """Numbers above zero, separated by commas. Raises :class:`UsageError` naming ``flag``."""
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise UsageError(f"{flag} {text!r}: write numbers above zero, e.g. 1,2,4")
    return rates


def poisson_requests(
    rate: float, prompt: Lengths, output: Lengths, rng: random.Random, *, seconds: float | None, count: int | None
) -> tuple[Request, ...]:
    """Requests of a Poisson process of ``rate`` per second: the first ``count``, or all that are due in ``seconds``."""
    found: list[Request] = []
    at = rng.expovariate(rate)
    while (count is None or len(found) < count) and (seconds is None or at < seconds):
        found.append(Request(at, prompt.draw(rng), output.draw(rng)))
        at += rng.expovariate(rate)
    return tuple(found)


def requests_of(prompt: Lengths, output: Lengths, rng: random.Random, count: int) -> tuple[Request, ...]:
    """``count`` requests due at once, for clients that send the next when the last is answered."""
    return tuple(Request(0.0, prompt.draw(rng), output.draw(rng)) for _ in range(count))


def failures(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Failed requests by kind, most first."""
    return dict(Counter(each.failure for each in outcomes if each.failure is not None).most_common())


def serving_figures(outcomes: Sequence[Outcome], objectives: Objectives, seconds: float) -> dict[str, float]:
    """The figures of one run, by the names of :data:`SERVING_FIGURES`.

    Rates are over the time from the start to the last answer, at least ``seconds`` (the span of the arrivals). Failed
    requests are in no percentile, but each counts against attainment.
    """
    whole = [each for each in outcomes if each.failure is None and each.ttft is not None]
    span = max([seconds, *(each.finished for each in outcomes)])
    samples = {
        "ttft": [each.ttft for each in whole if each.ttft is not None],
        "itl": [gap for each in whole for gap in each.gaps],
        "tpot": [each.tpot for each in whole if each.gaps],
        "e2e": [each.e2e for each in whole],
    }
    good = sum(objectives.met(each) for each in outcomes)
    return {
        **{f"{name}_p{share}": quantile(samples[name], share / 100) for name in _LATENCIES for share in _PERCENTILES},
        "requests_per_second": len(whole) / span if span else 0.0,
        "output_tokens_per_second": sum(each.output_tokens for each in outcomes) / span if span else 0.0,
        "goodput": good / span if span else 0.0,
        "attainment": good / len(outcomes) if outcomes else math.nan,
        "in_flight": sum(each.e2e for each in outcomes) / span if span else 0.0,
        "late": max((each.sent - each.due for each in outcomes), default=0.0),
    }
