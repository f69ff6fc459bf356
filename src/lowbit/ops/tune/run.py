"""``lowbit tune``: the settings of llama.cpp with which this machine serves a described workload best.

Every measurement runs the real engine, started as ``lowbit serve`` would, under the workload's own arrivals: all
candidates of a round get the same requests. The winner is chosen in races (:mod:`lowbit.ops.tune.search`) and then
measured anew beside the default, in alternation; what counts is that last comparison, not the races, whose best has
been lucky as a rule.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from lowbit.errors import ResourceError, UnsupportedError, UsageError
from lowbit.ops.bench.client import session_for
from lowbit.ops.bench.engine import Model, context_for, model_of, running
from lowbit.ops.bench.load import Objectives, Outcome, serving_figures
from lowbit.ops.bench.serving import Level, Load, run_level
from lowbit.ops.bench.stats import Figure, Verdict, compare_figures
from lowbit.ops.tune.search import (
    DEFAULT,
    Candidate,
    Dimension,
    Race,
    combinations_of,
    race,
    rungs_of,
    single_changes,
)

if TYPE_CHECKING:
    from lowbit.gateway.config import ServeConfig, TierConfig
    from lowbit.gateway.launch import TierFacts

__all__ = ["SETTINGS", "Objective", "Tuned", "Workload", "changed", "dimensions_for", "tune"]

Objective: TypeAlias = Literal["goodput", "throughput", "ttft", "itl"]

SETTINGS = (
    *("threads", "threads_batch", "concurrency", "batch", "ubatch", "flash_attention"),
    *("prefix_caching", "cache_reuse", "lookup", "kv_dtype", "spin"),
)
"""What is searched; ``lookup`` is prompt lookup, ``spin`` threads that wait for each other busily."""

_SPINS: tuple[tuple[str, dict[str, Any]], ...] = (
    (" briefly", {"env.GOMP_SPINCOUNT": "1000"}),
    ("", {"env.OMP_WAIT_POLICY": "ACTIVE"}),
)
"""How threads wait for each other: a thousand turns and then asleep, which costs little beside a busy process, or awake
for good, which was measured there at a fifth of the speed and less."""
_SHARES = (0.5, 0.2, 0.3)
"""Of the budget: single changes, changes together, winner against default."""
_PAIRS = 5
"""Least measurements of winner and of default at the end: fewer than four could not be told apart at all."""
_MOST_PAIRS = 12
_SHORTEST = 1.0
_PATIENCE = 4.0
"""A candidate that takes so many times as long as planned has its requests counted as failed."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of the model: lengths, tokens that all prompts share, and the load (a rate, or clients)."""

    load: Load
    level: Level
    shared: int = 0
    temperature: float = 1.0

    def describe(self) -> dict[str, Any]:
        """For the evidence."""
        load = {"rate": self.level.rate} if self.level.rate is not None else {"concurrency": self.level.clients}
        shared = {"shared_prefix": self.shared} if self.shared else {}
        return {"prompt_tokens": str(self.load.prompt), "output_tokens": str(self.load.output), **load, **shared}


@dataclass(frozen=True, slots=True)
class Tuned:
    """The outcome: the best candidate found and the default measured beside it at the end.

    ``verdict`` is on the winner; ``adopted`` says whether it is worth writing down. ``scores`` are the mean scores of
    all candidates in the races, ``failed`` why some could not run.
    """

    winner: Candidate
    default: Figure
    tuned: Figure
    ratio: float
    p: float
    verdict: Verdict
    attainment: tuple[float, float]
    scores: Mapping[str, float]
    failed: Mapping[str, str]
    objective: str
    workload: Mapping[str, Any]
    objectives: Objectives
    machine: Mapping[str, Any]
    seconds: float
    threads: int | None = None
    kl: float | None = None
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    @property
    def adopted(self) -> bool:
        """Whether the winner beat the default beyond the spread of the repeats."""
        return self.winner != DEFAULT and self.verdict == "better"

    def evidence(self) -> dict[str, Any]:
        """The ``tuned:`` block of a configuration."""
        low, high = self.default.spread
        better, best = self.tuned.spread
        limits = {key: getattr(self.objectives, key) for key in ("ttft", "itl", "e2e")}
        found = {
            "date": self.date,
            "machine": f"{self.machine['cpu']}, {self.machine['cpus']:g} processors",
            "workload": {
                **self.workload,
                **{f"slo_{key}": value for key, value in limits.items() if value is not None},
            },
            "objective": f"{self.objective} ({self.default.unit})",
            "default": f"{self.default.median:.4g} ({low:.4g} to {high:.4g})",
            "this": f"{self.tuned.median:.4g} ({better:.4g} to {best:.4g})",
            "ratio": round(self.ratio, 3),
            "changed": self.winner.name,
        }
        return found if self.kl is None else {**found, "kv_cache_kl_at_least": round(self.kl, 6)}


def dimensions_for(
    model: Model,
    concurrency: int,
    workload: Workload,
    *,
    cores: int,
    allow_lossy: bool,
    dedicated: bool,
    only: Sequence[str] = SETTINGS,
) -> list[Dimension]:
    """What to try on this model, machine and workload; the default's own values left out.

    A KV cache of another type only with ``allow_lossy``; threads that spin for good only with ``dedicated``.
    """
    steps = sorted({1, 2, cores, max(1, cores // 2), max(1, cores * 3 // 4)} & set(range(1, cores + 1)))
    threads = model.threads or cores
    wanted = workload.level.clients or 32
    slots = [each for each in (1, 2, 4, 8, 16, 32, 64) if each != concurrency and each <= 2 * max(wanted, concurrency)]
    tokens = [64, 128, 256, 1024]
    shares = workload.shared > 0
    found: dict[str, dict[str, dict[str, Any]]] = {
        "threads": {str(each): {"flags.threads": each} for each in steps if each != threads},
        "threads_batch": {str(each): {"flags.threads_batch": each} for each in steps if each != threads},
        "concurrency": {str(each): {"concurrency": each} for each in slots},
        "batch": {str(each): {"flags.batch": each, "flags.ubatch": min(each, 512)} for each in tokens[:3]},
        "ubatch": {str(each): {"flags.ubatch": each} for each in tokens if each <= workload.load.prompt.high * wanted},
        "flash_attention": {
            "on": {"flags.flash_attention": True},
            "off": {"flags.flash_attention": False},
        },
        "prefix_caching": {"off": {"flags.prefix_caching": False}},
        "cache_reuse": {"32": {"flags.cache_reuse": 32}} if shares else {},
        "lookup": {
            f"{draft} after {match}": {"flags.ngram_draft": draft, "flags.ngram_match": match}
            for draft, match in ((4, 3), (12, 6))
        },
        "kv_dtype": {each: {"kv_dtype": each} for each in ("q8_0", "q4_0")} if allow_lossy else {},
        "spin": {
            f"{each}{label}": {"flags.threads": each, **environment}
            for each in steps
            if each > 1
            for label, environment in _SPINS[: None if dedicated else 1]
        },
    }
    return [Dimension(name, found[name]) for name in SETTINGS if name in only and found[name]]


def changed(tier: Mapping[str, Any], candidate: Candidate) -> dict[str, Any]:
    """A tier's settings with a candidate's changes."""
    found = {**tier, "flags": dict(tier.get("flags") or {}), "env": dict(tier.get("env") or {})}
    for key, value in candidate.changes:
        where, _, name = key.rpartition(".")
        (found[where] if where else found)[name] = value
    return found


@dataclass(slots=True)
class Bench:
    """Measures candidates of one tier under one workload; ``say`` hears what happens.

    ``requests_seconds`` is how long a measurement's arrivals or fixed number of requests should take.
    """

    config: ServeConfig
    facts: Mapping[str, TierFacts]
    workload: Workload
    objectives: Objectives
    objective: Objective
    text: str
    idle: float
    seed: int
    load: Load
    timeout: float
    say: Callable[[str], None]
    attained: dict[str, list[float]] = field(default_factory=dict)

    def model(self, candidate: Candidate) -> Model:
        """The engine of a candidate. Raises :class:`lowbit.errors.LowbitError` where it cannot be run so."""
        from lowbit.gateway.config import parse_config

        content = self.config.model_dump()
        (model,) = content["models"].values()
        model["tiers"] = [changed(model["tiers"][0], candidate)]
        return model_of(candidate.name, parse_config(content, where=candidate.name), dict(self.facts), self.idle)

    async def measure(self, candidate: Candidate, number: int) -> float | str:
        """Score of one run (more is better), or why there is none; round ``number`` decides the requests."""
        try:
            model = self.model(candidate)
            outcomes, _ = await self.run(model, number)
        except (ResourceError, UnsupportedError, UsageError) as error:
            self.say(f"{candidate.name}: cannot run: {error}")
            return str(error)
        figures = self.figures(outcomes)
        score = _score(self.objective, figures)
        self.attained.setdefault(candidate.name, []).append(figures["attainment"])
        self.say(f"round {number + 1}: {candidate.name}: {_shown(self.objective, score)}")
        return score

    async def run(self, model: Model, number: int) -> tuple[list[Outcome], float]:
        """Outcomes of a run, and the seconds until the engine was ready."""
        rng = random.Random(self.seed * 1_000_003 + number)
        workload = self.workload
        async with (
            running(
                model, self.text, shared=workload.shared, temperature=workload.temperature, timeout=self.timeout
            ) as engine,
            session_for(keep_alive=False) as session,
        ):
            warm = replace(self.load, count=2, seconds=None)
            await run_level(engine.target, engine.prompts, Level(clients=2), warm, session, random.Random(number))
            outcomes = await run_level(engine.target, engine.prompts, workload.level, self.load, session, rng)
            return outcomes, engine.load_seconds

    def figures(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """Figures of one run."""
        span = self.load.seconds if self.load.seconds is not None and self.workload.level.rate is not None else 0.0
        return serving_figures(outcomes, self.objectives, span)


async def tune(
    config: ServeConfig,
    workload: Workload,
    *,
    objectives: Objectives,
    objective: Objective,
    budget: float,
    text: str,
    allow_lossy: bool = False,
    dedicated: bool = False,
    only: Sequence[str] = SETTINGS,
    seed: int = 0,
    quiet: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Search within ``budget`` seconds; ``config`` has one model with one tier, run by llama.cpp.

    Raises :class:`UnsupportedError` for another engine and :class:`UsageError` where the workload does not fit into the
    tier's context or the budget is too small for a single comparison.
    """
    from lowbit.gateway.launch import idle_cores
    from lowbit.gateway.prepare import prepare
    from lowbit.ops.bench.results import machine_facts

    machine = machine_facts()
    facts = await prepare(config, quiet=quiet)
    began = time.perf_counter()
    # what serving would choose when nothing else runs: one busy moment must not cripple the default
    idle = max(idle_cores() for _ in range(5))
    bench = Bench(
        config, facts, workload, objectives, objective, text, idle, seed,
        replace(workload.load, count=8, seconds=None), 600.0, say,
    )  # fmt: skip
    model = _checked(bench)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tier = _tier(config)
    dimensions = dimensions_for(
        model, tier.concurrency, workload, cores=cores, allow_lossy=allow_lossy, dedicated=dedicated, only=only
    )
    candidates = single_changes(dimensions)
    if len(candidates) == 1:
        raise UsageError(f"there is nothing to try: {', '.join(only)} have no other value on this machine")
    cost = await _calibrate(bench, model, budget, len(candidates))
    rng = random.Random(seed)

    def until(share: float) -> Callable[[], bool]:
        return lambda: time.perf_counter() - began < budget * share

    slices = round(budget * _SHARES[0] / cost)
    screened = await race(candidates, bench.measure, slices=slices, in_time=until(_SHARES[0]), rng=rng)
    together = combinations_of(screened.means(), dimensions)
    state = screened
    if len(together) > 1:
        slices = round(budget * _SHARES[1] / cost)
        in_time = until(_SHARES[0] + _SHARES[1])
        state = await race(together, bench.measure, slices=slices, in_time=in_time, rng=rng, first_round=1000)
    best = state.best_change() or screened.best_change() or DEFAULT
    default, tuned, attainment = await _final(bench, best, until(1.0 - cost / budget))
    ratio, p, verdict = compare_figures(default, tuned)
    kl = await _kv_divergence(bench, best)
    return Tuned(
        best, default, tuned, ratio, p, verdict, attainment, _all_scores(screened, state),
        {each.name: reason for state_ in (screened, state) for each, reason in state_.failed.items()},
        objective, workload.describe(), objectives, machine, time.perf_counter() - began, model.threads, kl,
    )  # fmt: skip


def _tier(config: ServeConfig) -> TierConfig:
    """The only tier of the only model."""
    ((tier,),) = (model.tiers for model in config.models.values())
    return tier


def _checked(bench: Bench) -> Model:
    """The default's model, if it is one that can be tuned for this workload."""
    model = bench.model(DEFAULT)
    if model.facts.engine != "llama.cpp":
        raise UnsupportedError(
            f"engine {model.facts.engine} cannot be tuned", ["lowbit tune knows llama.cpp's settings"]
        )
    tier = _tier(bench.config)
    context = tier.context or model.facts.context or 0
    needed = context_for(bench.workload.load.prompt, bench.workload.load.output)
    longest = bench.workload.load.prompt.high + bench.workload.load.output.high
    if context < longest:
        raise UsageError(f"requests of {longest} tokens do not fit into a context of {context}: say --context {needed}")
    return model


async def _calibrate(bench: Bench, model: Model, budget: float, candidates: int) -> float:
    """Run the default once, and size measurements so that the first race fits; gives seconds of a measurement."""
    level = bench.workload.level
    fixed = bench.workload.load.count is not None
    if fixed:
        bench.load = bench.workload.load
    elif level.clients is not None:
        bench.load = replace(bench.load, count=max(8, 2 * level.clients))
    else:
        bench.load = replace(bench.load, count=None, seconds=max(2.0, 4.0 / (level.rate or 1.0)))
    started = time.perf_counter()
    outcomes, loaded = await bench.run(model, 999_999)
    whole = time.perf_counter() - started
    ran = max(each.finished for each in outcomes)
    if all(each.failure is not None for each in outcomes):
        raise UsageError(f"the default settings answer nothing: {outcomes[0].failure}")
    least_slices = candidates * rungs_of(candidates)
    seconds = max(_SHORTEST, budget * _SHARES[0] / least_slices - (whole - ran))
    if fixed:
        seconds = ran
    elif level.clients is not None:
        count = max(2 * level.clients, round(len(outcomes) * seconds / ran))
        bench.load = replace(bench.load, count=count)
        seconds = ran * count / len(outcomes)
    else:
        bench.load = replace(bench.load, seconds=max(seconds, 4.0 / (level.rate or 1.0)))
        seconds = (bench.load.seconds or 0.0) + ran - max(each.due for each in outcomes)
    cost = seconds + whole - ran
    needed = cost * (2 * _PAIRS + candidates)
    if needed > budget * 1.5:
        raise UsageError(
            f"--budget {budget:.0f}s is too little: a measurement takes {cost:.1f} s, {candidates} candidates "
            f"about {needed:.0f} s: raise it, or try fewer with --settings"
        )
    bench.timeout = max(10.0, _PATIENCE * seconds)
    bench.say(f"default: {model.threads} threads, {_tier(bench.config).concurrency} requests at a time")
    bench.say(f"one measurement takes {cost:.1f} s ({loaded:.1f} s to load); {candidates} candidates")
    return cost


async def _final(
    bench: Bench, best: Candidate, in_time: Callable[[], bool]
) -> tuple[Figure, Figure, tuple[float, float]]:
    """Default and winner in alternation (ABBA), with requests that neither has seen."""
    found: dict[str, list[float]] = {DEFAULT.name: [], best.name: []}
    bench.attained.clear()
    number = 0
    while number < _PAIRS or (number < _MOST_PAIRS and in_time()):
        pair = [DEFAULT, best] if number % 2 == 0 else [best, DEFAULT]
        for candidate in pair if best != DEFAULT else [DEFAULT]:
            score = await bench.measure(candidate, 2000 + number)
            if isinstance(score, str):
                raise ResourceError(f"{candidate.name} ran before and does not now: {score}")
            found[candidate.name].append(score)
        number += 1
    unit = _UNITS[bench.objective]
    figures = [Figure(unit, "more", tuple(found[each.name])) for each in (DEFAULT, best)]
    attained = [bench.attained[each.name] for each in (DEFAULT, best)]
    return figures[0], figures[1], (sum(attained[0]) / len(attained[0]), sum(attained[1]) / len(attained[1]))


async def _kv_divergence(bench: Bench, best: Candidate) -> float | None:
    """What a changed cache type costs; None where it is the same."""
    if "kv_dtype" not in dict(best.changes):
        return None
    from lowbit.ops.tune.quality import cache_divergence

    bench.say("measuring what the cache's type costs")
    return await cache_divergence(bench.model(DEFAULT), bench.model(best), bench.text)


_UNITS = {"goodput": "1/s", "throughput": "tokens/s", "ttft": "1/s", "itl": "1/s"}


def _score(objective: Objective, figures: Mapping[str, float]) -> float:
    """More is better; of a latency it is the inverse of its 90th percentile."""
    if objective == "goodput":
        return figures["goodput"]
    if objective == "throughput":
        return figures["output_tokens_per_second"]
    value = figures["ttft_p90" if objective == "ttft" else "tpot_p90"]
    return 1.0 / value if value > 0 else 0.0


def _shown(objective: Objective, score: float) -> str:
    if objective in ("goodput", "throughput"):
        return f"{score:.4g} {_UNITS[objective]}"
    return f"p90 {1e3 / score:.4g} ms" if score else "no answer"


def _all_scores(*races: Race) -> dict[str, float]:
    return {each.name: score for state in races for each, score in state.means().items()}
