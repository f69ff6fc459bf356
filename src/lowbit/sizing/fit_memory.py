"""Fitting into memory: weights, cache and engine share a device, so bits and the cache's format are chosen together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from lowbit.errors import ResourceError, UsageError
from lowbit.pipeline.fit import GGUF, GGUF_BASE, Fit, Measurement, choose
from lowbit.planning import Hardware, probe
from lowbit.planning.kv_dtypes import KV_DTYPES, LLAMA_CPP, VLLM, KvDtype, parse_kv_dtype
from lowbit.planning.serving import BATCH_TOKENS, MEMORY, Load, Served, largest_concurrency, largest_context
from lowbit.sizing.advice import advise
from lowbit.sizing.estimate import UTILISATION, estimate, served_model
from lowbit.sizing.headers import HeaderModel, open_header_model
from lowbit.sizing.variants import make_variant

__all__ = ["Asked", "Serving", "check_room", "choose_together", "offered_caches", "open_asked"]

_SMALLER_CACHES: Mapping[str, tuple[str, ...]] = {VLLM: ("fp8",), LLAMA_CPP: ("q8_0", "q4_0")}
"""Cache formats of fewer bits to choose from, by engine."""
_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Serving:
    """How the fitted model is to be served within the memory.

    ``kv_divergence``  what the cache is predicted to add, in nats; None where it was not measured
    ``total``          bytes that are needed of ``budget``, on each device
    ``largest_context`` for as many requests, ``largest_concurrency`` for as long ones; ``flags`` of the engine
    ``reason``         why this cache
    """

    engine: str
    context: int
    concurrency: int
    kv_dtype: str
    kv_divergence: float | None
    total: int
    budget: int
    largest_context: int
    largest_concurrency: int
    flags: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Asked:
    """A memory budget, resolved: the model on a device, everything but the choice of weights and cache."""

    model: HeaderModel
    engine: str
    served: Served
    load: Load
    memory: int
    whole: int
    """Bytes of ``served``'s weights over all devices."""

    @property
    def budget(self) -> int:
        """Bytes of one device that the engine may fill."""
        return int(self.memory * UTILISATION[self.engine])

    def room(self, kv: KvDtype) -> int:
        """Bytes that all weights together may take beside a cache of ``kv``; below 0 where nothing is left."""
        found = MEMORY[self.engine](self.served, replace(self.load, kv=kv))
        elsewhere = self.served.weights - found.parts["weights"]
        left = self.budget - (found.total - found.parts["weights"])
        return (left + elsewhere) * self.whole // max(1, self.served.weights)

    def with_weights(self, size: int) -> Served:
        """The model with weights of ``size`` bytes over all devices."""
        return replace(self.served, weights=self.served.weights * size // max(1, self.whole))


def open_asked(
    source: str | Path,
    memory: int,
    *,
    context: int | None,
    concurrency: int,
    kv_dtype: str,
    format: str,
    gpus: int | None = None,
    hardware: Hardware | None = None,
) -> Asked:
    """The budget of ``memory`` bytes on each of ``gpus`` devices, checked as :func:`lowbit.estimate` checks it.

    0 GPUs are the host's own memory. Without a number, vLLM gets one and llama.cpp those of this machine, or none.
    """
    hardware = hardware or probe()
    engine = LLAMA_CPP if format == GGUF else VLLM
    count = (1 if engine == VLLM or hardware.gpus else 0) if gpus is None else gpus
    opened = open_header_model(source)
    scheme = GGUF_BASE if format == GGUF else "int4-g128-sym"
    stored = "compressed-tensors" if format == GGUF else format
    found = estimate(
        opened,
        schemes=[scheme],
        format=stored,
        context=context,
        concurrency=concurrency,
        kv_dtype=kv_dtype,
        engine=engine,
        gpus=count,
        gpu_memory=memory if count else None,
        hardware=hardware if count else replace(hardware, memory=memory),
    )
    if not found.precisions[0].parts:
        raise UsageError(found.precisions[0].problem)
    devices = found.tensor_parallel
    variant = make_variant(opened, scheme, stored, prefer_gguf=format == GGUF)
    kv = parse_kv_dtype(kv_dtype, engine, str(opened.dtype).removeprefix("torch."))
    load = Load(found.context, concurrency, kv, BATCH_TOKENS[engine], devices, bool(count))
    return Asked(opened, engine, served_model(opened, variant, devices), load, memory, variant.data)


def offered_caches(asked: Asked, kv_dtype: str) -> tuple[str, ...]:
    """Formats of fewer than 16 bits that may be chosen: none where the user named one, or none is kept."""
    if kv_dtype != "auto" or not any(layer.attends for layer in asked.model.layers):
        return ()
    return _SMALLER_CACHES[asked.engine]


def check_room(asked: Asked, caches: Sequence[str]) -> None:
    """Raise :class:`ResourceError` where cache and engine alone take all there is, whichever of ``caches`` it is."""
    names = list(dict.fromkeys((asked.load.kv.name, *caches)))
    if max(asked.room(KV_DTYPES[name]) for name in names) <= 0:
        raise ResourceError(_shortage(asked, 0, names))


def choose_together(
    asked: Asked, measurement: Measurement, measured: Mapping[str, float], unmeasured: str = ""
) -> tuple[Fit, Serving]:
    """Bits of every module and the cache's format with the least predicted divergence in all.

    ``measured`` are the divergences of cache formats beside the one that was asked for (which is taken to lose nothing
    unless it is among them); ``unmeasured`` says why there are none. Raises :class:`ResourceError` saying by how much
    the budget is too small and what would do.
    """
    names = list(dict.fromkeys((asked.load.kv.name, *measured)))
    found: dict[str, Fit] = {}
    for name in names:
        with suppress(ResourceError):
            found[name] = choose(measurement, total_bytes=max(1, asked.room(KV_DTYPES[name])))
    if not found:
        least = sum(min(one.bytes for one in group.candidates.values()) for group in measurement.groups)
        raise ResourceError(_shortage(asked, measurement.other_bytes + least, names))
    chosen = min(found, key=lambda name: (found[name].divergence + measured.get(name, 0.0), names.index(name)))
    return found[chosen], _serving(asked, found, chosen, measured, unmeasured)


def _serving(
    asked: Asked, found: Mapping[str, Fit], chosen: str, measured: Mapping[str, float], unmeasured: str
) -> Serving:
    fit, load = found[chosen], replace(asked.load, kv=KV_DTYPES[chosen])
    served = asked.with_weights(fit.bytes)
    need = MEMORY[asked.engine](served, load)
    limit = asked.model.description.max_positions or 1 << 20
    return Serving(
        engine=asked.engine,
        context=load.context,
        concurrency=load.concurrency,
        kv_dtype=chosen,
        kv_divergence=measured.get(chosen),
        total=need.total,
        budget=asked.budget,
        largest_context=largest_context(asked.engine, served, load, asked.budget, limit),
        largest_concurrency=largest_concurrency(asked.engine, served, load, asked.budget),
        flags=advise(asked.engine, served, load, asked.memory, asked.budget, need).flags,
        reason=_reason(asked, found, chosen, measured, unmeasured),
    )


def _reason(asked: Asked, found: Mapping[str, Fit], chosen: str, measured: Mapping[str, float], unmeasured: str) -> str:
    if unmeasured:
        return f"not chosen: {unmeasured}"
    if not measured:
        return "asked for" if asked.load.kv.bits < 16 else "16 bits"
    others = [name for name in (asked.load.kv.name, *measured) if name != chosen]
    told = []
    for name in others:
        if name not in found:
            told.append(f"{name} leaves too little for any choice of weights")
        else:
            total = found[name].divergence + measured.get(name, 0.0)
            told.append(f"with {name} weights and cache would lose {total:.3g} nats")
    own = found[chosen].divergence + measured.get(chosen, 0.0)
    return f"the least loss in all, {own:.3g} nats; " + ", ".join(told)


def _shortage(asked: Asked, least: int, names: Sequence[str]) -> str:
    """How much is missing with the smallest cache and weights of ``least`` bytes, and what would do."""
    smallest = min(names, key=lambda name: KV_DTYPES[name].bits)
    load = replace(asked.load, kv=KV_DTYPES[smallest])
    served = asked.with_weights(least)
    need = MEMORY[asked.engine](served, load).total
    ways = []
    if found := largest_concurrency(asked.engine, served, load, asked.budget, load.concurrency):
        ways.append(f"--concurrency {found}")
    if found := largest_context(asked.engine, served, load, asked.budget, load.context):
        ways.append(f"--context {found}")
    if least:
        ways.append(f"--memory {_size(math.ceil(need / UTILISATION[asked.engine]), up=True).replace(' ', '')}")
    weights = f"the smallest weights ({_size(least)}), " if least else ""
    would = f"; this would do: {', or '.join(ways)}" if ways else ": take a larger device, or a smaller model"
    return (
        f"--memory: {weights}the {smallest} cache of {load.concurrency} x {load.context:,} tokens and {asked.engine} "
        f"need {_size(need)}, {_size(need - asked.budget)} more than the {_size(asked.budget)} that may be used of "
        f"{_size(asked.memory)}{would}"
    )


def _size(size: int, *, up: bool = False) -> str:
    """``size`` with two digits after the point, of which the last is rounded ``up`` where it must suffice."""
    unit, name = (_GIB, "GiB") if size >= _GIB else (2**20, "MiB")
    hundredths = 100 * size / unit
    return f"{(math.ceil(hundredths) if up else round(hundredths)) / 100:.2f} {name}"
