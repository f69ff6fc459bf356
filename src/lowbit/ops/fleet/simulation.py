"""A fleet, event by event: the check of :mod:`lowbit.ops.fleet.model`, which knows averages only.

Every replica runs one thing at a time: the prompt of the next request that has a slot, else a decoding step of all
that are past theirs. A request goes to the replica with the fewest, if that has a free slot, and waits in one line
otherwise.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lowbit.ops.bench.load import Lengths, Objectives, Outcome, Request, poisson_requests, serving_figures
from lowbit.ops.fleet.model import Forecast, Replica, Work, forecast

__all__ = ["Cell", "Simulated", "error_grid", "simulate", "simulate_requests"]

_WARM = 0.1
"""Of the requests that are left out at the beginning, when the fleet is still empty."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """What a simulated fleet did: the figures of :func:`lowbit.ops.bench.load.serving_figures` and means in seconds."""

    figures: dict[str, float]
    ttft: float
    tpot: float
    e2e: float
    attainment: float


@dataclass(slots=True)
class _Engine:
    """A replica's requests: those whose prompt is still to be computed, and those that decode (token count left)."""

    prompts: deque[int] = field(default_factory=deque)
    decoding: dict[int, int] = field(default_factory=dict)
    running: bool = False

    @property
    def held(self) -> int:
        return len(self.prompts) + len(self.decoding)


def simulate(
    replica: Replica,
    rate: float,
    prompt: Lengths,
    output: Lengths,
    replicas: int,
    objectives: Objectives,
    *,
    requests: int = 4000,
    seed: int = 0,
) -> Simulated:
    """The steady state of a fleet under Poisson arrivals, the first tenth of the requests left out."""
    schedule = poisson_requests(rate, prompt, output, random.Random(seed), seconds=None, count=requests)
    outcomes = simulate_requests(replica, schedule, replicas)[int(requests * _WARM) :]
    count = len(outcomes)
    spaced = [each for each in outcomes if each.gaps]
    return Simulated(
        serving_figures(outcomes, objectives, 0.0),
        sum(each.ttft or 0.0 for each in outcomes) / count,
        sum(each.tpot for each in spaced) / max(1, len(spaced)),
        sum(each.e2e for each in outcomes) / count,
        sum(objectives.met(each) for each in outcomes) / count,
    )


@dataclass(frozen=True, slots=True)
class Cell:
    """Model and simulation of one size of fleet at one share of its greatest throughput."""

    replicas: int
    busy: float
    forecast: Forecast
    simulated: Simulated


def error_grid(
    replica: Replica,
    work: Work,
    objectives: Objectives,
    *,
    replicas: Sequence[int],
    busy: Sequence[float],
    requests: int = 4000,
    seed: int = 0,
) -> list[Cell]:
    """Model beside simulation for every size and load; the rate of ``work`` is of no account."""
    found = []
    for count in replicas:
        most = 1.0 / forecast(replica, replace(work, rate=1.0), count, objectives).busy
        for share in busy:
            loaded = replace(work, rate=share * most)
            expected = forecast(replica, loaded, count, objectives)
            seen = simulate(
                replica, loaded.rate, work.prompt, work.output, count, objectives, requests=requests, seed=seed
            )
            found.append(Cell(count, share, expected, seen))
    return found


def simulate_requests(replica: Replica, schedule: Sequence[Request], replicas: int) -> list[Outcome]:
    """What becomes of each request of a schedule, in its order."""
    engines = [_Engine() for _ in range(replicas)]
    line: deque[int] = deque()
    first: dict[int, float] = {}
    finished: dict[int, float] = {}
    order = 0
    events: list[tuple[float, int, int, int]] = []  # time, order, kind (0 arrival, 1 end of work), request or engine
    for index, request in enumerate(schedule):
        heapq.heappush(events, (request.at, order, 0, index))
        order += 1
    work: dict[int, int] = {}  # engine to the request whose prompt it computes; none: a decoding step

    def begin(number: int, now: float) -> None:
        nonlocal order
        engine = engines[number]
        if engine.prompts:
            work[number] = engine.prompts[0]
            took = replica.prefill(schedule[engine.prompts[0]].prompt_tokens)
        elif engine.decoding:
            work.pop(number, None)
            took = replica.step(len(engine.decoding))
        else:
            engine.running = False
            return
        engine.running = True
        heapq.heappush(events, (now + took, order, 1, number))
        order += 1

    def admit(now: float) -> None:
        while line:
            number = min(range(replicas), key=lambda each: engines[each].held)
            if engines[number].held >= replica.slots:
                return
            engines[number].prompts.append(line.popleft())
            if not engines[number].running:
                begin(number, now)

    while events:
        now, _, kind, subject = heapq.heappop(events)
        if kind == 0:
            line.append(subject)
            admit(now)
            continue
        engine = engines[subject]
        done = work.pop(subject, None)
        if done is not None:
            engine.prompts.popleft()
            first[done] = now
            engine.decoding[done] = schedule[done].output_tokens - 1
        else:
            for each in engine.decoding:
                engine.decoding[each] -= 1
        for each in [each for each, left in engine.decoding.items() if left <= 0]:
            del engine.decoding[each]
            finished[each] = now
        admit(now)
        begin(subject, now)
    return [_outcome(request, first[index], finished[index]) for index, request in enumerate(schedule)]


def _outcome(request: Request, first: float, finished: float) -> Outcome:
    gaps = request.output_tokens - 1
    spaced = ((finished - first) / gaps,) * gaps if gaps else ()
    return Outcome(request.at, request.at, finished, first, request.prompt_tokens, request.output_tokens, spaced)
