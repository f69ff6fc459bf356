"""Models as ``lowbit serve`` would run them, one at a time: prepared, started as a process, asked directly."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.errors import UnsupportedError, UsageError
from lowbit.ops.bench.client import Target, ask, session_for
from lowbit.ops.bench.load import Lengths, Outcome
from lowbit.ops.bench.prompts import TextPrompts, TokenPrompts
from lowbit.ops.bench.results import Run
from lowbit.ops.bench.stats import Better, Figure, quantile

if TYPE_CHECKING:
    from aiohttp import ClientSession

    from lowbit.engines.process import EngineSpec
    from lowbit.gateway.config import ServeConfig
    from lowbit.gateway.launch import TierFacts

__all__ = ["OFFLINE_FIGURES", "Model", "Running", "bench_offline", "context_for", "prepare_models", "running"]

OFFLINE_FIGURES: dict[str, tuple[str, Better]] = {
    "load": ("s", "less"),
    "memory": ("B", "less"),
    "ttft": ("s", "less"),
    "itl_p50": ("s", "less"),
    "itl_p90": ("s", "less"),
    "itl_p99": ("s", "less"),
    "prefill": ("tokens/s", "more"),
    "decode": ("tokens/s", "more"),
}
"""Figure to its unit and better direction."""

_ROOM = 64
"""Tokens of context beyond prompt and answer: begin and end of text, a chat template."""
_STEP = 256


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is ready to be started: its engine's command, and what is known of its quality."""

    name: str
    spec: EngineSpec
    upstream: str
    facts: TierFacts
    perplexity: float | None = None

    @property
    def threads(self) -> int | None:
        """Threads that its engine is told to use."""
        return _option(self.spec.command, "--threads")

    def describe(self) -> dict[str, Any]:
        """What goes into a bench document."""
        path = Path(str(self.facts.path))
        return {
            "path": str(path),
            "engine": self.facts.engine,
            "bits_per_weight": self.facts.bits,
            "bytes": sum(each.stat().st_size for each in ([path] if path.is_file() else path.rglob("*.safetensors"))),
            "kl_divergence": self.facts.kl,
            "perplexity": self.perplexity,
            "threads": self.threads,
        }


@dataclass(frozen=True, slots=True)
class Running:
    """An engine that answers, and how long that took."""

    target: Target
    prompts: TokenPrompts | TextPrompts
    load_seconds: float
    memory: Callable[[], int]


def context_for(prompt: Lengths, output: Lengths) -> int:
    """Tokens of context that the longest request needs."""
    return -(-(prompt.high + output.high + _ROOM) // _STEP) * _STEP


async def prepare_models(
    sources: Sequence[tuple[str, str | None]],
    *,
    context: int,
    concurrency: int,
    threads: int | None = None,
    kv_dtype: str | None = None,
    quiet: bool = False,
) -> list[Model]:
    """Models of ``(path, quantization or None)``, converted as ``lowbit serve`` does it.

    All are told to use the same threads: those that are idle now, as serving would choose. Raises the error that it met
    as :class:`UsageError`.
    """
    from lowbit.gateway.launch import idle_cores

    idle = None if threads else idle_cores()
    names = _names(sources)
    models = []
    for (path, quantize), name in zip(sources, names, strict=True):
        flags = {} if threads is None else {"flags": {"threads": threads}}
        tier = {"name": "bench", "path": path, "quantize": quantize, "context": context, "concurrency": concurrency}
        config = {"tiers": [{**tier, "kv_dtype": kv_dtype, "pinned": True, **flags}]}
        models.append(await prepare_model(name, config, idle=idle, quiet=quiet))
    return models


async def prepare_model(name: str, model: dict[str, Any], *, idle: float | None, quiet: bool) -> Model:
    """One model of one tier, given as the configuration of ``lowbit serve`` has it."""
    from lowbit.gateway.config import parse_config
    from lowbit.gateway.prepare import prepare

    served = "model"
    config = parse_config({"models": {served: model}}, where=name)
    facts = await prepare(config, quiet=quiet)
    return model_of(name, config, facts, idle)


def model_of(name: str, config: ServeConfig, facts: dict[str, TierFacts], idle: float | None) -> Model:
    """The only tier of a configuration as a model to be started. Raises :class:`UnsupportedError` for no text model."""
    from lowbit.checkpoint.manifest import read_manifest
    from lowbit.gateway.launch import plan_tiers

    (plan,) = plan_tiers(config, facts, None, idle).values()
    if plan.spec is None or plan.facts.engine == "encoder":
        raise UnsupportedError(f"{name} cannot be run here", ["bench starts models that generate text, from a path"])
    manifest = read_manifest(Path(str(plan.facts.path)))
    quality = (manifest.quality if manifest is not None else None) or {}
    return Model(name, plan.spec, plan.upstream_model, plan.facts, quality.get("perplexity"))


def _names(sources: Sequence[tuple[str, str | None]]) -> list[str]:
    """A short name for each, no two the same."""
    found: list[str] = []
    for path, quantize in sources:
        short = Path(path).name.removesuffix(".gguf") or path
        name = f"{short}@{quantize}" if quantize else short
        if name in found:
            name = f"{path}@{quantize}" if quantize else path
        if name in found:
            raise UsageError(f"{name} is named twice")
        found.append(name)
    return found


@asynccontextmanager
async def running(
    model: Model, text: str, *, shared: int = 0, temperature: float = 1.0, timeout: float = 300.0
) -> AsyncIterator[Running]:
    """Start a model's engine, and end it. Raises :class:`lowbit.errors.ResourceError` with its own last words."""
    from lowbit.engines.process import Supervisor

    async with session_for(keep_alive=False) as session:
        supervisor = Supervisor(model.spec, session)
        began = time.perf_counter()
        await supervisor.start()
        loaded = time.perf_counter() - began
        try:
            extra: dict[str, Any] = {"ignore_eos": True, "temperature": temperature}
            if model.facts.engine == "llama.cpp":
                extra["timings_per_token"] = True
            target = Target(supervisor.base_url, model.upstream, "completions", headers=model.spec.headers, extra=extra)
            prompts = TokenPrompts(await _tokenize(session, target, text), shared)
            yield Running(target, prompts, loaded, supervisor.resident_bytes)
        finally:
            await supervisor.stop()


async def _tokenize(session: ClientSession, target: Target, text: str) -> list[int]:
    """Token ids of a text, by the engine itself (llama.cpp's and vLLM's forms of the question)."""
    body = {"content": text, "prompt": text, "model": target.model, "add_special": False, "add_special_tokens": False}
    async with session.post(f"{target.url}/tokenize", json=body, headers=dict(target.headers)) as response:
        if response.status != 200:
            raise UnsupportedError(f"{target.model}: its engine does not tokenize (status {response.status})")
        ids: list[int] = json.loads(await response.read())["tokens"]
    if len(ids) < 2:
        raise UnsupportedError(f"{target.model}: its tokenizer makes nothing of the text")
    return ids


async def bench_offline(
    models: Sequence[Model],
    *,
    prompt: Lengths,
    output: Lengths,
    repeats: int,
    warmup: int,
    text: str,
    temperature: float = 1.0,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> list[Run]:
    """Each model alone on the machine, in ``repeats`` rounds whose order is drawn anew: a machine that slows down slows
    all of them. Each round starts the engine, sends ``warmup`` requests and measures one.
    """
    rng = random.Random(seed)
    values: dict[str, dict[str, list[float]]] = {model.name: {key: [] for key in OFFLINE_FIGURES} for model in models}
    for turn in range(repeats):
        lengths = prompt.draw(rng), max(2, output.draw(rng))
        for model in rng.sample(models, len(models)):
            say(f"round {turn + 1} of {repeats}: {model.name}")
            async with running(model, text, temperature=temperature) as engine:
                for _ in range(warmup):
                    await _once(engine, lengths, rng, model)
                outcome = await _once(engine, lengths, rng, model)
                figures = _offline_figures(outcome, engine)
            for key, value in figures.items():
                values[model.name][key].append(value)
    return [
        Run(
            model.name,
            model.describe(),
            {
                key: Figure(unit, better, tuple(values[model.name][key]))
                for key, (unit, better) in OFFLINE_FIGURES.items()
            },
        )
        for model in models
    ]


async def _once(engine: Running, lengths: tuple[int, int], rng: random.Random, model: Model) -> Outcome:
    """One request, alone. Raises :class:`UsageError` where it fails: without an answer there is nothing to measure."""
    prompt = engine.prompts.make(lengths[0], rng)
    async with session_for(keep_alive=False) as session:
        start = time.perf_counter()
        outcome = await ask(session, engine.target, prompt, lengths[1], due=0.0, start=start)
    await asyncio.sleep(0)
    if outcome.failure is not None or outcome.ttft is None:
        raise UsageError(f"{model.name}: its engine did not answer a request of {lengths[0]} tokens: {outcome.failure}")
    if not outcome.gaps:
        raise UsageError(f"{model.name}: its engine gave one token where {lengths[1]} were asked: nothing to time")
    return outcome


def _offline_figures(outcome: Outcome, engine: Running) -> dict[str, float]:
    ttft = outcome.ttft or 0.0
    return {
        "load": engine.load_seconds,
        "memory": float(engine.memory()),
        "ttft": ttft,
        **{f"itl_p{share}": quantile(outcome.gaps, share / 100) for share in (50, 90, 99)},
        "prefill": outcome.prompt_tokens / ttft if ttft else 0.0,
        "decode": len(outcome.gaps) / sum(outcome.gaps) if sum(outcome.gaps) else 0.0,
    }


def _option(command: Sequence[str], flag: str) -> int | None:
    """The whole number after ``flag`` on a command line."""
    for name, value in pairwise(command):
        if name == flag and value.isdigit():
            return int(value)
    return None
