"""How many replicas a load needs: what one replica does, as measured, and a queueing model of several.

A replica computes prompts one after the other and decodes ``n`` requests together, a token each in ``step(n)`` seconds
(continuous batching). Prompts and decoding share it: while a prompt is computed nobody gets a token. With ``n``
requests under way all the time, each passes through in ``n * prefill + tokens * step(n)`` seconds, which is how the
steps are had from closed-loop measurements.

The queue is a birth-death chain over the number of requests in the fleet: arrivals are Poisson, the gateway sends each
to the replica with the fewest, and ``j`` requests spread evenly leave at the rate that so many under way do. A queue
for processors that share their capacity does not depend on the distribution of the work but for its mean
(insensitivity; Kelly 1979), which is why exponential rates serve for the body of it; what waits for a slot is taken
for M/M/k.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from statistics import NormalDist, fmean

from lowbit.errors import UsageError
from lowbit.ops.bench.load import Lengths, Objectives
from lowbit.ops.bench.results import Bench
from lowbit.ops.bench.stats import quantile

__all__ = ["Forecast", "Replica", "Work", "forecast", "mean_length", "replica_of", "smallest_fleet"]

_BASES = (2, 3, 5, 7, 11, 13)
_POINTS = 2000
_NORMAL = NormalDist()
_TAIL = 1e-12
_SURE = 1e-9
_LONGEST = 20_000
"""Requests in the fleet beyond which the chain is cut."""


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine as measured: a prompt of p tokens takes ``base + p * per_token`` seconds; ``steps`` are seconds of a
    decoding step by requests under way, rising in both; ``slots`` is the most that go together.
    """

    base: float
    per_token: float
    steps: tuple[tuple[int, float], ...]
    slots: int

    def prefill(self, tokens: float) -> float:
        """Seconds that a prompt occupies the engine."""
        return self.base + tokens * self.per_token

    def step(self, together: float) -> float:
        """Seconds of one decoding step with so many requests, between measurements by straight lines."""
        counts = self.steps
        if together <= counts[0][0]:
            return counts[0][1]
        for (low, fast), (high, slow) in pairwise(counts):
            if together <= high:
                return fast + (slow - fast) * (together - low) / (high - low)
        return counts[-1][1]


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked for: requests per second, and tokens of prompt and answer."""

    rate: float
    prompt: Lengths
    output: Lengths

    @property
    def prompt_mean(self) -> float:
        """Mean tokens of a prompt."""
        return mean_length(self.prompt)

    @property
    def output_mean(self) -> float:
        """Mean tokens of an answer."""
        return mean_length(self.output)


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a fleet of ``replicas`` would do. ``stable`` is whether it keeps up at all; else the rest means nothing.

    ``busy`` is the share of the greatest throughput that is used; ``waiting`` the chance that a request finds no slot.
    Seconds are means but for the percentiles; ``attainment`` is the share of requests within the objectives.
    """

    replicas: int
    stable: bool
    busy: float
    waiting: float = 0.0
    under_way: float = 0.0
    ttft: float = math.inf
    ttft_p50: float = math.inf
    ttft_p90: float = math.inf
    tpot: float = math.inf
    tpot_p90: float = math.inf
    e2e: float = math.inf
    attainment: float = 0.0


def length_at(lengths: Lengths, share: float) -> int:
    """The length that ``share`` of the draws do not exceed."""
    if lengths.median is None:
        return min(lengths.high, lengths.low + int(share * (lengths.high - lengths.low + 1)))
    drawn = lengths.median * math.exp(lengths.sigma * _NORMAL.inv_cdf(min(1 - 1e-9, max(1e-9, share))))
    return min(lengths.high, max(lengths.low, round(drawn)))


@lru_cache(maxsize=64)
def mean_length(lengths: Lengths) -> float:
    """Mean of a distribution of lengths (of the log-normal, cut as it is, over 1000 quantiles)."""
    if lengths.median is None:
        return (lengths.low + lengths.high) / 2
    return fmean(length_at(lengths, (index + 0.5) / 1000) for index in range(1000))


def replica_of(bench: Bench, *, slots: int | None = None) -> Replica:
    """A replica from the closed-loop runs of a bench document (``lowbit bench MODEL --concurrency 1,2,4,8``).

    Raises :class:`UsageError` where the document has no run of one client, or nothing but failures.
    """
    runs = sorted((run for run in bench.runs if run.facts.get("clients")), key=lambda run: int(run.facts["clients"]))
    if bench.kind != "serving" or not runs or int(runs[0].facts["clients"]) != 1:
        raise UsageError(
            "the bench file has no closed-loop run of one client: lowbit bench MODEL --concurrency 1,2,4,8 makes one"
        )
    points: list[tuple[int, float]] = []
    base = per_token = 0.0
    for run in runs:
        clients = int(run.facts["clients"])
        whole = [each for _, each in run.requests if each.failure is None and each.first is not None]
        if not whole:
            raise UsageError(f"the bench file's run of {run.name} has no answered request")
        if clients == 1:
            base, per_token = _prefill_line([(each.prompt_tokens, each.ttft or 0.0) for each in whole])
        prefill = fmean(base + each.prompt_tokens * per_token for each in whole)
        decoded = fmean(each.output_tokens - 1 for each in whole)
        if decoded <= 0:
            raise UsageError("the bench file's answers have one token each: nothing to tell the speed of decoding by")
        inside = fmean(each.finished - each.sent for each in whole)
        step = (inside - clients * prefill) / decoded
        points.append((clients, step))
    parallel = runs[-1].facts.get("parallel")
    most = min(int(runs[-1].facts["clients"]), int(parallel)) if parallel else int(runs[-1].facts["clients"])
    inside_slots = [(count, step) for count, step in points if count <= most]
    return Replica(base, per_token, _rising(inside_slots), slots or most)


def _prefill_line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Least squares of seconds by tokens, no part below zero; through the origin where all lengths are about equal."""
    tokens = fmean(each for each, _ in points)
    seconds = fmean(each for _, each in points)
    spread = sum((each - tokens) ** 2 for each, _ in points)
    if spread < 0.01 * len(points) * tokens**2:
        return 0.0, quantile([each for _, each in points], 0.5) / tokens
    slope = sum((each - tokens) * (value - seconds) for each, value in points) / spread
    slope = min(max(slope, 0.0), seconds / tokens)
    return seconds - slope * tokens, slope


def _rising(points: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Steps that never get shorter with more requests, the nearest in least squares (pool adjacent violators)."""
    pools: list[list[float]] = []  # mean, weight
    for _, step in points:
        pools.append([max(step, 1e-9), 1.0])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            value, weight = pools.pop()
            before = pools[-1]
            before[0] = (before[0] * before[1] + value * weight) / (before[1] + weight)
            before[1] += weight
    values = [value for value, weight in pools for _ in range(int(weight))]
    return tuple((count, value) for (count, _), value in zip(points, values, strict=True))


def passage(replica: Replica, work: Work, together: int) -> float:
    """Seconds from slot to last token with ``together`` requests under way all the time."""
    return together * replica.prefill(work.prompt_mean) + max(0.0, work.output_mean - 1) * replica.step(together)


def throughput(replica: Replica, work: Work, together: int) -> float:
    """Requests per second that one replica finishes with so many under way."""
    return together / passage(replica, work, together)


def forecast(replica: Replica, work: Work, replicas: int, objectives: Objectives) -> Forecast:
    """The steady state of a fleet.

    Means are sums over the chain. Percentiles and attainment need a distribution of what a request meets: the number
    under way as it arrives (Poisson arrivals see time averages; Wolff 1982), the wait for a slot (exponential at the
    rate at which the queue drains), the prompt being computed, the rest of a decoding step, and lengths of its own,
    taken as independent and integrated over a Halton sequence.
    """
    slots = _useful_slots(replica, work)
    capacity = replicas * throughput(replica, work, slots)
    if work.rate >= capacity * (1 - 1e-9):
        return Forecast(replicas, False, work.rate / capacity)
    chances, leaving = _chain(replica, work, replicas, slots)
    under_way = sum(count * chance for count, chance in enumerate(chances))
    waiting = sum(chances[replicas * slots :])
    shrink = _averaging(chances, leaving, work.rate, under_way)
    totals = list(accumulate(chances))
    steps = [_shared_step(replica, min(count + 1, replicas * slots), replicas) for count in range(len(chances))]
    mean_step = sum(step * chance for step, chance in zip(steps, chances, strict=True))
    met = _Met(replica, work, replicas, slots, totals, steps, mean_step, waiting, capacity - work.rate, shrink)
    requests = [met.request(place) for place in _places()]
    ttfts, tpots = [each[0] for each in requests], [each[1] for each in requests]
    attained = fmean(
        (objectives.ttft is None or ttft <= objectives.ttft)
        and (objectives.itl is None or tpot <= objectives.itl)
        and (objectives.e2e is None or e2e <= objectives.e2e)
        for ttft, tpot, e2e in requests
    )
    return Forecast(
        replicas, True, work.rate / capacity, waiting, under_way, fmean(ttfts), quantile(ttfts, 0.5),
        quantile(ttfts, 0.9), fmean(tpots), quantile(tpots, 0.9), under_way / work.rate, attained,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Met:
    """What a request meets in the steady state: by the number under way, ``totals`` are cumulated chances, ``steps``
    the decoding step of a newcomer; ``mean_step`` is its mean."""

    replica: Replica
    work: Work
    replicas: int
    slots: int
    totals: Sequence[float]
    steps: Sequence[float]
    mean_step: float
    waiting: float
    drain: float
    shrink: float

    def request(self, place: Sequence[float]) -> tuple[float, float, float]:
        """``(seconds to the first token, per token, in all)`` at a point of the unit cube."""
        replica, rate = self.replica, self.work.rate / self.replicas
        prefill = replica.prefill(self.work.prompt_mean)
        prompt, output = length_at(self.work.prompt, place[3]), length_at(self.work.output, place[4])
        wait = 0.0 if place[0] <= 1 - self.waiting else math.log(self.waiting / max(1e-12, 1 - place[0])) / self.drain
        count = min(len(self.totals) - 1, bisect_left(self.totals, place[0]))
        together = min(self.slots, 1 + count // self.replicas)
        clash = min(0.95, rate * prefill)
        # with chance `clash` a prompt is being computed, and perhaps others wait for the same
        head = 0.0 if place[1] <= 1 - clash else math.log(clash / (1 - place[1])) * prefill / 2 / (1 - clash)
        left = place[2] * replica.step(together) if count >= self.replicas else 0.0
        ttft = wait + head + left + replica.prefill(prompt)
        step = self.mean_step + (self.steps[count] - self.mean_step) * self.shrink
        # while it decodes, prompts of others are computed: a Poisson number of them, of about this mean and spread
        plain = max(1, output - 1) * step
        prompts = rate * plain / (1 - clash)
        share = min(1.0, step / self.mean_step)
        spread = math.sqrt(prompts) * (_NORMAL.inv_cdf(min(1 - 1e-9, max(1e-9, place[5]))))
        tpot = (plain + max(0.0, prompts * share + spread) * prefill) / max(1, output - 1)
        return ttft, tpot, ttft + tpot * max(0, output - 1)


def _shared_step(replica: Replica, count: int, replicas: int) -> float:
    """The decoding step that one of ``count`` requests, spread evenly, has with those on its replica, in the mean."""
    low, more = divmod(count, replicas)
    fuller = more * (low + 1) * replica.step(low + 1)
    return (fuller + (replicas - more) * low * replica.step(max(1, low))) / count


def _averaging(chances: Sequence[float], leaving: Sequence[float], rate: float, mean: float) -> float:
    """How far the number under way, averaged over a request's stay, still strays from its mean, of what it strays at a
    moment: with ``x`` the stay in relaxation times, the square root of ``2/x - 2(1 - exp(-x))/x**2``.

    The relaxation time is the integral of the autocorrelation of a birth-death chain (Whitt 1992).
    """
    variance = sum((count - mean) ** 2 * chance for count, chance in enumerate(chances))
    below = integral = 0.0
    for count, chance in enumerate(chances):
        below += (count - mean) * chance
        if chance > _SURE:  # beyond, the sum is rounding error
            integral += below**2 / (rate * chance)
    relaxation = integral / variance if variance > 0 else 0.0
    stay = mean / rate
    x = stay / relaxation if relaxation > 0 else math.inf
    return math.sqrt(max(0.0, 2 / x - 2 * (1 - math.exp(-x)) / x**2)) if x < 1e9 else 0.0


@lru_cache(maxsize=1)
def _places() -> tuple[tuple[float, ...], ...]:
    """Points that fill the unit cube evenly."""
    return tuple(tuple(_radical_inverse(index, base) for base in _BASES) for index in range(1, _POINTS + 1))


def _radical_inverse(index: int, base: int) -> float:
    """The place of ``index`` in the van der Corput sequence of ``base``, between 0 and 1."""
    value, scale = 0.0, 1.0 / base
    while index:
        index, digit = divmod(index, base)
        value += digit * scale
        scale /= base
    return value


def _useful_slots(replica: Replica, work: Work) -> int:
    """The number under way, up to the slots, with the greatest throughput: the chain's rates must not fall."""
    return max(range(1, replica.slots + 1), key=lambda count: (round(throughput(replica, work, count), 12), count))


def _chain(replica: Replica, work: Work, replicas: int, slots: int) -> tuple[list[float], list[float]]:
    """Chance of each number of requests in the fleet, and the rate at which so many leave."""
    weights, leaving = [1.0], [0.0]
    total = 1.0
    rates = [0.0, *(throughput(replica, work, count) for count in range(1, slots + 1))]
    for count in range(1, _LONGEST):
        low, more = divmod(min(count, replicas * slots), replicas)
        leaving.append((replicas - more) * rates[low] + (more * rates[low + 1] if more else 0.0))
        weights.append(weights[-1] * work.rate / leaving[-1])
        total += weights[-1]
        if count > replicas * slots and weights[-1] < _TAIL * total:
            break
        if total > 1e280:
            weights = [weight / total for weight in weights]
            total = 1.0
    total = sum(weights)
    return [weight / total for weight in weights], leaving


def smallest_fleet(
    replica: Replica, work: Work, objectives: Objectives, attainment: float, most: int
) -> tuple[Forecast, list[Forecast]]:
    """The fewest replicas that keep up and answer a share ``attainment`` in time, and all sizes looked at.

    Raises :class:`UsageError` where not even ``most`` do, saying which objective no number of replicas can meet.
    """
    tried: list[Forecast] = []
    least = max(1, math.ceil(work.rate / throughput(replica, work, _useful_slots(replica, work)) - 1e-9))
    for replicas in range(least, most + 1):
        found = forecast(replica, work, replicas, objectives)
        tried.append(found)
        if found.stable and found.attainment >= attainment:
            return found, tried
        if found.stable and found.busy < 0.02:
            break
    alone = replica.prefill(work.prompt_mean)
    floor = f"alone on a replica a request has its first token after {alone * 1e3:.0f} ms and then one every "
    floor += f"{replica.step(1) * 1e3:.1f} ms"
    raise UsageError(
        f"{tried[-1].replicas if tried else most} replicas do not answer {attainment:.0%} of {work.rate:g} requests "
        f"per second in time: {floor}; loosen the objectives, raise --max-replicas, or measure a faster replica"
    )
