"""A load test of a server: requests sent on a schedule (open loop) or by a number of clients (closed loop)."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lowbit.errors import UsageError
from lowbit.ops.bench.client import Target, ask, session_for
from lowbit.ops.bench.load import (
    SERVING_FIGURES,
    Lengths,
    Objectives,
    Outcome,
    Request,
    failures,
    poisson_requests,
    requests_of,
    serving_figures,
)
from lowbit.ops.bench.prompts import TextPrompts, TokenPrompts
from lowbit.ops.bench.results import Run
from lowbit.ops.bench.stats import Figure

if TYPE_CHECKING:
    from aiohttp import ClientSession

__all__ = ["Level", "Load", "bench_serving", "fit_to_server", "run_closed", "run_open"]

_MANY = 1_000_000


@dataclass(frozen=True, slots=True)
class Level:
    """How hard to press: requests per second (``rate``), or requests kept under way (``clients``)."""

    rate: float | None = None
    clients: int | None = None

    @property
    def name(self) -> str:
        """``rate 2`` or ``8 clients``."""
        return f"rate {self.rate:g}" if self.rate is not None else f"{self.clients} clients"

    def to_json(self) -> dict[str, Any]:
        """For a run's facts."""
        return {"rate": self.rate, "clients": self.clients}


@dataclass(frozen=True, slots=True)
class Load:
    """Lengths, and when a run ends: after ``seconds`` of arrivals, or ``count`` requests."""

    prompt: Lengths
    output: Lengths
    seconds: float | None = None
    count: int | None = None

    def schedule(self, level: Level, rng: random.Random) -> tuple[Request, ...]:
        """The requests of a run; the same for the same state of ``rng``."""
        if level.rate is not None:
            return poisson_requests(level.rate, self.prompt, self.output, rng, seconds=self.seconds, count=self.count)
        return requests_of(self.prompt, self.output, rng, self.count or min(_MANY, round(1000 * (self.seconds or 1.0))))


async def run_open(
    target: Target, prompts: Sequence[Any], schedule: Sequence[Request], session: ClientSession
) -> list[Outcome]:
    """Send every request when it is due, whatever became of the others; outcomes in the order of the schedule."""
    start = time.perf_counter()
    tasks = []
    for request, prompt in zip(schedule, prompts, strict=True):
        wait = start + request.at - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        sending = ask(session, target, prompt, request.output_tokens, due=request.at, start=start)
        tasks.append(asyncio.create_task(sending))
    return list(await asyncio.gather(*tasks))


async def run_closed(
    target: Target,
    make: Callable[[int], Any],
    requests: Sequence[Request],
    session: ClientSession,
    *,
    clients: int,
    seconds: float | None,
) -> list[Outcome]:
    """Keep ``clients`` requests under way until all are sent or ``seconds`` have passed.

    A client that waits for its answer sends less to a server that is slow: latencies under such load flatter it.
    """
    start = time.perf_counter()
    outcomes: list[Outcome] = []
    waiting = iter(requests)

    async def client() -> None:
        for request in waiting:
            due = time.perf_counter() - start
            if seconds is not None and due >= seconds:
                return
            prompt = make(request.prompt_tokens)
            outcomes.append(await ask(session, target, prompt, request.output_tokens, due=due, start=start))

    await asyncio.gather(*(client() for _ in range(clients)))
    return outcomes


async def bench_serving(
    target: Target,
    prompts: TokenPrompts | TextPrompts,
    levels: Sequence[Level],
    load: Load,
    objectives: Objectives,
    *,
    repeats: int,
    warmup: int,
    keep_alive: bool = False,
    seed: int = 0,
    facts: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Run]:
    """Every level ``repeats`` times, in rounds whose order is drawn anew; a run begins when the last one's requests are
    all answered or have failed.
    """
    rng = random.Random(seed)
    found: dict[str, list[tuple[int, Outcome]]] = {level.name: [] for level in levels}
    figures: dict[str, list[dict[str, float]]] = {level.name: [] for level in levels}
    async with session_for(keep_alive=keep_alive) as session:
        await _warm(target, prompts, load, session, warmup, rng)
        for turn in range(repeats):
            for level in rng.sample(levels, len(levels)):
                say(f"round {turn + 1} of {repeats}: {level.name}")
                outcomes = await run_level(target, prompts, level, load, session, rng)
                span = load.seconds if load.seconds is not None and level.rate is not None else 0.0
                figures[level.name].append(serving_figures(outcomes, objectives, span))
                found[level.name] += [(turn, each) for each in outcomes]
    return [
        Run(
            level.name,
            {**(facts or {}), **level.to_json()},
            {
                key: Figure(unit, better, tuple(each[key] for each in figures[level.name]))
                for key, (unit, better) in SERVING_FIGURES.items()
            },
            failures([each for _, each in found[level.name]]),
            tuple(found[level.name]),
        )
        for level in levels
    ]


async def run_level(
    target: Target,
    prompts: TokenPrompts | TextPrompts,
    level: Level,
    load: Load,
    session: ClientSession,
    rng: random.Random,
) -> list[Outcome]:
    """One run at one level."""
    schedule = load.schedule(level, rng)
    if level.clients is None:
        made = [prompts.make(request.prompt_tokens, rng) for request in schedule]
        return await run_open(target, made, schedule, session)
    return await run_closed(
        target, lambda tokens: prompts.make(tokens, rng), schedule, session, clients=level.clients, seconds=load.seconds
    )


async def _warm(
    target: Target,
    prompts: TokenPrompts | TextPrompts,
    load: Load,
    session: ClientSession,
    warmup: int,
    rng: random.Random,
) -> None:
    for request in requests_of(load.prompt, load.output, rng, warmup):
        prompt = prompts.make(request.prompt_tokens, rng)
        await ask(session, target, prompt, request.output_tokens, due=0.0, start=time.perf_counter())


async def fit_to_server(
    target: Target, text: str, *, shared: int = 0, say: Callable[[str], None] = lambda line: None
) -> tuple[Target, TextPrompts]:
    """Ask a server twice how many tokens a prompt has, and leave out what it does not know.

    Raises :class:`UsageError` with its answer where it gives none.
    """
    import aiohttp

    prompts = TextPrompts(text.split(), shared=shared)
    async with session_for(keep_alive=False) as session:
        extras: list[dict[str, Any]] = [dict(target.extra), {**target.extra, "ignore_eos": None}]
        extras.append({key: value for key, value in extras[1].items() if key != "temperature"})
        reason = ""
        for extra in extras:
            extra = {key: value for key, value in extra.items() if value is not None}
            asked = replace(target, extra=extra)
            try:
                counts = [await _count(session, asked, prompts.words[:words], words) for words in (8, 72)]
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
                reason = str(error) or type(error).__name__
                if not isinstance(error, ValueError):
                    break
                continue
            if extra != target.extra:
                say(f"the server refuses {', '.join(sorted({*target.extra} - {*extra}))}: answers may end early")
            if not all(tokens for _, tokens in counts):
                say("the server does not count prompt tokens: prompts are of about the length that was asked for")
                return asked, prompts
            return asked, prompts.fit(counts)
    raise UsageError(f"{target.address}: {reason}; check --url, --model and --api-key")


async def _count(session: ClientSession, target: Target, words: Sequence[str], count: int) -> tuple[int, int]:
    """``(words, prompt tokens as the server counts them or 0)``; ValueError with the server's complaint."""
    import aiohttp

    body = {**target.body(" ".join(words), 1), "stream": False}
    del body["stream_options"]
    limit = aiohttp.ClientTimeout(total=target.timeout)
    async with session.post(target.address, json=body, headers=dict(target.headers), timeout=limit) as response:
        text = (await response.read()).decode("utf-8", errors="replace")
        if response.status != 200:
            raise ValueError(f"answers with status {response.status}: {' '.join(text.split())[:200]}")
    try:
        usage = json.loads(text).get("usage") or {}
    except (ValueError, AttributeError) as error:
        raise ValueError("does not answer with JSON: not an OpenAI-compatible server?") from error
    return count, int(usage.get("prompt_tokens") or 0)
