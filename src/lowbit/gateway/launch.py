"""From the configuration and what was found out about each tier to the policy's data and the engines' commands."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from lowbit.engines.flags import EngineFlags, build_command
from lowbit.engines.llama_server import KEY_VARIABLE
from lowbit.engines.nodes import from_first, node_commands
from lowbit.engines.presets import ENGINES
from lowbit.engines.process import EngineSpec
from lowbit.engines.vllm import check_vllm, speculative_config
from lowbit.errors import UsageError
from lowbit.gateway.config import ModelConfig, ServeConfig, TierConfig
from lowbit.gateway.placement import Device, Wanted, place, split_over, variables
from lowbit.gateway.policy import ModelPolicy, Policy, TierPolicy
from lowbit.gateway.room import added, beyond, pool_name

__all__ = [
    "TierFacts",
    "TierPlan",
    "engine_threads",
    "idle_cores",
    "plan_tiers",
    "printable",
    "serving_policy",
    "thread_variables",
    "weight_bytes",
]

_SLEEP: Mapping[str, str] = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Variables for engines whose threads meet at barriers: they sleep there rather than spin."""
_SPINS, _SPINS_LARGE, _LARGE = 300, 1000, 512 * 1024**2
"""How often llama.cpp's threads look again before they sleep, for models below and from so many bytes. A thread that
sleeps at once is woken too late; one that spins for long takes the processor from a busy neighbour, the more often the
smaller the model is (docs/serving.md has what was measured)."""

_RESERVED_ABOVE = 4
"""With more cores than this, one is left to the gateway."""
_SMALL = 32 * 1024**2
"""A model of fewer bytes than this is fastest on one thread."""
_TOLD = ("vllm", "tgi")
"""Engines that are told which share of a GPU to fill with weights and cache."""
_FILLING = (*_TOLD, "sglang", "lmdeploy", "tensorrt-llm")
"""Engines that fill a GPU with cache, whatever the model's size."""


@dataclass(frozen=True, slots=True)
class TierFacts:
    """What :mod:`lowbit.gateway.prepare` found out about a tier: the engine that takes it, the file or directory it
    loads, planned bytes of the host, bits of the weights, KL divergence and relative weight error of its certificate,
    the tokens of context that the model was made for, how many GPUs it computes on with planned bytes on each, and
    whether its chat template knows tools (None: nobody looked).
    """

    engine: str
    path: str | None = None
    memory: int = 0
    bits: float | None = None
    kl: float | None = None
    error: float | None = None
    context: int | None = None
    gpus: int = 0
    gpu_memory: int = 0
    tools: bool | None = None


@dataclass(frozen=True, slots=True)
class TierPlan:
    """A tier ready to be served: the policy's data, and how its engine is run (``spec``) or reached (``url``)."""

    policy: TierPolicy
    facts: TierFacts
    upstream_model: str
    context: int | None = None
    spec: EngineSpec | None = None
    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def engine_threads(config: ServeConfig, cores: int | None = None, idle: float | None = None) -> int:
    """Threads of one engine: the physical cores (those that are idle now, where ``idle`` says how many), one left to
    the gateway where there are many, divided among the models that this machine's processors run.

    llama.cpp's threads meet at a barrier for every operation: with more threads than free cores, all wait for the one
    that is not running. Two threads beside two busy processes were measured at 0.03 to 0.6 of one thread's speed.
    """
    if config.threads is not None:
        return config.threads
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count() or 1
    usable = cores or min(allowed, psutil.cpu_count(logical=False) or allowed)
    usable -= usable > _RESERVED_ABOVE
    if idle is not None:
        usable = min(usable, round(idle))
    local = sum(any(tier.path for tier in model.tiers) for model in config.models.values())
    return max(1, usable // max(1, local))


def idle_cores(seconds: float = 0.3) -> float:
    """How many processors had nothing to do just now."""
    return (psutil.cpu_count() or 1) * (1 - psutil.cpu_percent(seconds) / 100)


def plan_tiers(
    config: ServeConfig,
    facts: Mapping[str, TierFacts],
    logs: Path | None = None,
    idle: float | None = None,
    devices: Sequence[Device] = (),
) -> dict[str, TierPlan]:
    """Plans by tier id; ``idle`` cores as of :func:`idle_cores`, ``devices`` as they were for the facts.

    Raises :class:`lowbit.errors.UnsupportedError` for settings that an engine cannot take and :class:`UsageError` for
    GPUs that are not there.
    """
    threads = engine_threads(config, idle=idle)
    homes = _homes(config, facts, devices)
    plans = {}
    for name, model in config.models.items():
        for tier in model.tiers:
            tier_id = f"{name}@{tier.name}"
            gpu = _gpu_share(tier_id, tier, facts, homes, devices)
            plans[tier_id] = _plan(name, model, tier, facts[tier_id], threads, logs, gpu)
    return plans


@dataclass(frozen=True, slots=True)
class _GpuShare:
    """What a tier gets of the GPUs: bytes by number, variables for its engine, the share to tell it or None."""

    memory: tuple[int, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    told: float | None = None


def _homes(
    config: ServeConfig, facts: Mapping[str, TierFacts], devices: Sequence[Device]
) -> dict[str, tuple[int, ...]]:
    """The GPUs of each tier that computes on any, by tier id."""
    wanted = {}
    for name, model in config.models.items():
        for tier in model.tiers:
            tier_id = f"{name}@{tier.name}"
            known = facts[tier_id]
            ours = tier.command is not None and (tier.gpus or tier.gpu_memory)
            count = known.gpus or (len(tier.gpus or ()) or split_over(tier) if ours else 0)
            if not count:
                continue
            chosen = tuple(tier.gpus) if tier.gpus else None
            if chosen is not None and len(chosen) != count:
                raise UsageError(f"{tier_id}: gpus names {len(chosen)}, and its engine takes {count} as it is split")
            size = tier.gpu_memory if tier.gpu_memory is not None else known.gpu_memory
            wanted[tier_id] = Wanted(count, size, chosen, tier.pinned or model.pinned)
    return place(wanted, devices)


def _gpu_share(
    tier_id: str,
    tier: TierConfig,
    facts: Mapping[str, TierFacts],
    homes: Mapping[str, tuple[int, ...]],
    devices: Sequence[Device],
) -> _GpuShare:
    """An engine that fills its GPUs gets their whole budget where it is alone there, else what was planned for it."""
    home = homes.get(tier_id, ())
    if not home:  # an engine of ours that computes on the processor must not see a GPU; of a command nothing is known
        return _GpuShare(environment=variables((), devices) if tier.path is not None else {})
    engine, given = facts[tier_id].engine, tier.flags.gpu_memory
    shared = any(other != tier_id and set(there) & set(home) for other, there in homes.items())
    planned = facts[tier_id].gpu_memory
    if tier.gpu_memory is not None:
        sizes = [tier.gpu_memory] * len(home)
    elif given is not None:
        sizes = [int(given * (devices[number].memory or devices[number].budget)) for number in home]
    elif engine in _FILLING and not (engine in _TOLD and shared):
        sizes = [devices[number].budget for number in home]
    else:
        sizes = [planned] * len(home)
    memory = [0] * (max(home) + 1)
    for number, size in zip(home, sizes, strict=True):
        memory[number] = size
    whole = max(devices[number].memory for number in home)
    told = int(1e4 * min(sizes) / whole) / 1e4 if engine in _TOLD and whole and given is None else None
    return _GpuShare(tuple(memory), variables(home, devices), told)


def serving_policy(
    config: ServeConfig, plans: Mapping[str, TierPlan], memory_budget: int, gpu_budgets: tuple[int, ...] = ()
) -> Policy:
    """The policy of the whole gateway. Raises :class:`UsageError` where what is pinned does not fit."""
    models = {
        name: ModelPolicy(name, tuple(f"{name}@{tier.name}" for tier in model.tiers), model.policy.settings())
        for name, model in config.models.items()
    }
    policy = Policy({name: plan.policy for name, plan in plans.items()}, models, memory_budget, gpu_budgets)
    pinned = added([tier.room for tier in policy.tiers.values() if tier.pinned])
    for pool in beyond(pinned, policy.room):
        budget = policy.room[pool] if pool < len(policy.room) else 0
        where = pool_name(pool).replace("memory", "memory budget")
        raise UsageError(
            f"pinned tiers need {pinned[pool] / 2**30:.2f} GiB of a {where} of {budget / 2**30:.2f} GiB: "
            f"pin fewer, give them less context or concurrency, or raise {'--gpu-memory' if pool else '--memory'}"
        )
    return policy


def printable(plan: TierPlan, nodes: Sequence[str] = ()) -> str:
    """The command of a tier's engine as a shell would take it; with ``nodes`` a line for each of them."""
    if plan.spec is None:
        return f"# runs at {plan.url}"
    if not nodes:
        return _line(plan.spec.env, plan.spec.command)
    lines = []
    for each in from_first(plan.spec.command, nodes):
        lines += [f"# on {each.node}", _line({**plan.spec.env, **each.environment}, each.command)]
    return "\n".join(lines)


def _line(environment: Mapping[str, str], command: Sequence[str]) -> str:
    variables = [f"{key}={shlex.quote(value)}" for key, value in environment.items() if key != KEY_VARIABLE]
    return " ".join([*variables, *(part if part == "{port}" else shlex.quote(part) for part in command)])


def _plan(
    name: str,
    model: ModelConfig,
    tier: TierConfig,
    facts: TierFacts,
    threads: int,
    logs: Path | None,
    gpu: _GpuShare,
) -> TierPlan:
    tier_id = f"{name}@{tier.name}"
    policy = TierPolicy(
        id=tier_id,
        model=name,
        name=tier.name,
        bits=tier.known_bits() or facts.bits or 16.0,
        memory=0 if tier.url else tier.memory if tier.memory is not None else facts.memory,
        concurrency=tier.concurrency,
        kl=tier.kl if tier.kl is not None else facts.kl,
        pinned=tier.pinned or model.pinned,
        remote=tier.url is not None,
        gpu_memory=() if tier.url else gpu.memory,
    )
    profile = ENGINES.get(facts.engine)
    nameless = tier.path is not None and profile is not None and not profile.takes_name
    upstream = tier.upstream_model or (str(facts.path) if nameless else name if tier.url is None else tier.name)
    context = tier.context or facts.context
    headers = _bearer(tier.api_key, tier_id)
    if tier.url is not None:
        return TierPlan(policy, facts, upstream, context, url=tier.url, headers=headers)
    log = logs / f"{tier_id.replace('/', '_')}.log" if logs is not None else None
    spec = _spec(tier_id, model, tier, facts, upstream, context, threads, log, gpu)
    return TierPlan(policy, facts, upstream, context, spec=spec, headers={**spec.headers, **headers})


def _bearer(api_key: str | None, tier_id: str) -> dict[str, str]:
    if api_key is None:
        return {}
    variable = api_key.removeprefix("env:")
    if variable == api_key:
        raise UsageError(f"{tier_id}: api_key must be env:NAME, never the key itself")
    value = os.environ.get(variable)
    if not value:
        raise UsageError(f"{tier_id}: api_key env:{variable}: that environment variable is not set")
    return {"Authorization": f"Bearer {value}"}


def _spec(
    tier_id: str,
    model: ModelConfig,
    tier: TierConfig,
    facts: TierFacts,
    upstream: str,
    context: int | None,
    threads: int,
    log: Path | None,
    gpu: _GpuShare,
) -> EngineSpec:
    if tier.command is not None:
        profile = ENGINES.get(facts.engine)
        health = profile.health if profile else "/health"
        return EngineSpec(
            tier_id,
            tuple(tier.command),
            env={**gpu.environment, **tier.env},
            health=health,
            ready_timeout=tier.ready_timeout,
            hang_timeout=tier.hang_timeout,
            log=log,
        )
    if facts.engine == "encoder":
        return _encoder_spec(tier_id, model, tier, facts, upstream, threads, log, gpu)
    profile = ENGINES[facts.engine]
    given = tier.flags.model_dump(exclude={"extra"})
    if given["threads"] is None and facts.engine == "llama.cpp":
        given["threads"] = 1 if 0 < weight_bytes(Path(str(facts.path))) < _SMALL else threads
    if gpu.told is not None:
        given["gpu_memory"] = gpu.told
    flags = EngineFlags(
        context=context if facts.engine == "llama.cpp" else tier.context,
        concurrency=tier.concurrency,
        kv_dtype=tier.kv_dtype,
        extra=(*_extra(facts.engine, model, tier), *tier.flags.extra),
        **given,
    )
    if facts.engine == "vllm":
        check_vllm(flags)
        flags = replace(flags, extra=(*flags.extra, *speculative_config(flags)))
    command, environment = build_command(profile, str(facts.path), upstream, flags, tier.python or sys.executable)
    if tier.nodes:
        if facts.engine != "vllm":
            raise UsageError(f"{tier_id}: nodes are for vLLM, and this is served by {facts.engine}: leave nodes out")
        first = node_commands(command, tier.nodes)[0]
        command, environment = first.command, environment | first.environment
    headers = {}
    if facts.engine == "llama.cpp":
        key = secrets.token_hex(16)
        environment |= {KEY_VARIABLE: key, **thread_variables(weight_bytes(Path(str(facts.path))))}
        headers = {"Authorization": f"Bearer {key}"}
    return EngineSpec(
        tier_id,
        command,
        env={**environment, **gpu.environment, **tier.env},
        headers=headers,
        health=profile.health,
        warmup=_warmup(model, upstream),
        probe=profile.probe,
        ready_timeout=tier.ready_timeout,
        hang_timeout=tier.hang_timeout,
        log=log,
    )


def thread_variables(size: int) -> dict[str, str]:
    """The environment of llama.cpp over a model of ``size`` bytes: how its threads wait for each other."""
    return {**_SLEEP, "GOMP_SPINCOUNT": str(_SPINS_LARGE if size >= _LARGE else _SPINS)}


def weight_bytes(path: Path) -> int:
    """Bytes of a GGUF file (all its parts), or of a directory's safetensors."""
    if path.is_file():
        stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
        parts = [each for each in path.parent.glob("*.gguf") if re.sub(r"-\d{5}-of-\d{5}$", "", each.stem) == stem]
        return sum(each.stat().st_size for each in parts)
    return sum(each.stat().st_size for each in path.rglob("*.safetensors"))


def _extra(engine: str, model: ModelConfig, tier: TierConfig) -> tuple[str, ...]:
    """What the kind of model needs on the engine's command line."""
    if engine == "llama.cpp" and model.kind != "chat":
        return ("--embedding",) if model.kind == "embedding" else ("--rerank",)
    return ()


def _warmup(model: ModelConfig, upstream: str) -> tuple[str, dict[str, object]]:
    if model.kind == "embedding":
        return "/v1/embeddings", {"model": upstream, "input": "warm"}
    if model.kind == "rerank":
        return "/v1/rerank", {"model": upstream, "query": "warm", "documents": ["up"]}
    return "/v1/completions", {"model": upstream, "prompt": "warm up", "max_tokens": 1}


def _encoder_spec(
    tier_id: str,
    model: ModelConfig,
    tier: TierConfig,
    facts: TierFacts,
    upstream: str,
    threads: int,
    log: Path | None,
    gpu: _GpuShare,
) -> EngineSpec:
    """The encoder engine, a process of its own."""
    key = secrets.token_hex(16)
    command = (
        *(tier.python or sys.executable, "-m", "lowbit.engines.encoder_server", "--model", str(facts.path)),
        *("--name", upstream, "--kind", model.kind, "--port", "{port}"),
        *("--threads", str(tier.flags.threads or threads), *(["--int8"] if tier.quantize == "int8" else [])),
        *tier.flags.extra,
    )
    return EngineSpec(
        tier_id,
        command,
        env={KEY_VARIABLE: key, **_SLEEP, **gpu.environment, **tier.env},
        headers={"Authorization": f"Bearer {key}"},
        warmup=_warmup(model, upstream),
        probe="/v1/models",
        ready_timeout=tier.ready_timeout,
        hang_timeout=tier.hang_timeout,
        log=log,
    )
