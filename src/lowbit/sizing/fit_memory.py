"""Fitting into memory: weights, cache and engine share a device, so bits, the cache's format and, where that is left
open, the length of requests are chosen together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from lowbit.errors import ResourceError, UsageError
from lowbit.pipeline.fit import Fit, Measurement, choose
from lowbit.pipeline.fit_candidates import GGUF, GGUF_BASE
from lowbit.planning import Hardware, probe
from lowbit.planning.kv_dtypes import KV_DTYPES, LLAMA_CPP, VLLM, KvDtype, parse_kv_dtype
from lowbit.planning.serving import BATCH_TOKENS, MEMORY, Load, Served, largest, largest_concurrency, largest_context
from lowbit.sizing.advice import advise, told_size
from lowbit.sizing.estimate import UTILISATION, estimate, served_model
from lowbit.sizing.headers import HeaderModel, open_header_model
from lowbit.sizing.variants import make_variant

__all__ = ["Asked", "Serving", "check_room", "choose_together", "offered_caches", "open_asked"]

_SMALLER_CACHES: Mapping[str, tuple[str, ...]] = {VLLM: ("fp8",), LLAMA_CPP: ("q8_0", "q4_0")}
"""Cache formats of fewer bits to choose from, by engine."""
_USUAL, _LONGEST, _STEP = 8192, 131072, 256
"""Tokens: where no context is asked for; the most that ``auto`` takes where the model names no maximum; and how finely
contexts are chosen, which is how llama.cpp rounds them."""
_MAX_KL = 0.01
"""Nats that a longer context may lose in all: hard to notice, about what 4 to 5 bits lose."""
_DEARER = 0.05
"""How much more than the shortest context a longer one may lose, in any case."""


@dataclass(frozen=True, slots=True)
class Serving:
    """How the fitted model is to be served within the memory.

    ``context``        tokens of each request, and ``context_reason`` why so many
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
    context_reason: str = ""


@dataclass(frozen=True, slots=True)
class Contexts:
    """Lengths of requests to choose from, ``least`` to ``most``; longer ones may lose ``max_kl`` nats in all."""

    least: int
    most: int
    max_kl: float
    told: str

    def price(self, shortest: float) -> float:
        """What the longest may lose where the shortest loses so much."""
        return max(self.max_kl, shortest * (1 + _DEARER))


@dataclass(frozen=True, slots=True)
class Asked:
    """A memory budget, resolved: the model on a device, everything but the choice of weights, cache and context.

    ``load`` has the shortest of ``contexts``.
    """

    model: HeaderModel
    engine: str
    served: Served
    load: Load
    memory: int
    whole: int
    """Bytes of ``served``'s weights over all devices."""
    contexts: Contexts

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

    def of_length(self, context: int) -> Asked:
        """The same for requests of ``context`` tokens."""
        return replace(self, load=replace(self.load, context=context))

    def with_embedding(self, size: int) -> Asked:
        """The same with a token table of ``size`` bytes, which llama.cpp keeps in the host's memory."""
        return replace(self, served=replace(self.served, embedding=size))

    def with_weights(self, size: int) -> Served:
        """The model with weights of ``size`` bytes over all devices."""
        return replace(self.served, weights=self.served.weights * size // max(1, self.whole))


def open_asked(
    source: str | Path,
    memory: int,
    *,
    context: int | str | None,
    concurrency: int,
    kv_dtype: str,
    format: str,
    max_kl: float | None = None,
    gpus: int | None = None,
    hardware: Hardware | None = None,
) -> Asked:
    """The budget of ``memory`` bytes on each of ``gpus`` devices, checked as :func:`lowbit.estimate` checks it.

    0 GPUs are the host's own memory. Without a number, vLLM gets one and llama.cpp those of this machine, or none.
    ``context`` is a number of tokens, ``"least..most"`` or ``"auto"``.
    """
    hardware = hardware or probe()
    engine = LLAMA_CPP if format == GGUF else VLLM
    count = (1 if engine == VLLM or hardware.gpus else 0) if gpus is None else gpus
    opened = open_header_model(source)
    contexts = _contexts(context, max_kl, opened.description.max_positions)
    scheme = GGUF_BASE if format == GGUF else "int4-g128-sym"
    stored = "compressed-tensors" if format == GGUF else format
    found = estimate(
        opened,
        schemes=[scheme],
        format=stored,
        context=contexts.least,
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
    return Asked(opened, engine, served_model(opened, variant, devices), load, memory, variant.data, contexts)


def _contexts(asked: int | str | None, max_kl: float | None, limit: int | None) -> Contexts:
    """``asked`` as lengths to choose from; that one length is too long is left to :func:`lowbit.estimate` to tell."""
    if max_kl is not None and not 0 < max_kl < math.inf:
        raise UsageError(f"--max-kl {max_kl:g}: give a number of nats such as 0.02")
    text = "" if asked is None else str(asked).strip().lower()
    if text == "auto":
        least, most = min(_STEP, limit or _STEP), limit or _LONGEST
        told = f"{least:,}..{most:,}"
    elif ".." in text:
        first, _, last = text.partition("..")
        if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last)):
            raise UsageError(f"--context {asked}: write e.g. 4096..32768, the smaller number first, or auto")
        least, most = int(first), int(last)
        told = f"{least:,}..{most:,}"
        if limit and most > limit:
            raise UsageError(f"--context {asked}: beyond the model's maximum of {limit}: use at most {limit}")
    elif not text:
        least = most = min(_USUAL, limit or _USUAL)
        told = "the usual length; --context N or auto for another"
    elif text.isdecimal() and int(text) > 0:
        least = most = int(text)
        told = "asked for"
    else:
        raise UsageError(f"--context {asked}: give a number of tokens such as 8192, a range 4096..32768, or auto")
    if max_kl is not None and least == most:
        raise UsageError("--max-kl is for a context that is to be chosen: give --context 4096..32768 or auto")
    return Contexts(least, most, _MAX_KL if max_kl is None else max_kl, told)


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
    """Bits of every module, the cache's format and the context with the least predicted divergence in all.

    ``measured`` are the divergences of cache formats beside the one that was asked for (which is taken to lose nothing
    unless it is among them); ``unmeasured`` says why there are none. Of several contexts it is the longest whose
    divergence is within :meth:`Contexts.price`. Raises :class:`ResourceError` saying by how much the budget is too
    small and what would do.
    """
    table = next((group for group in measurement.groups if group.modules == (measurement.embedding,)), None)
    if table is not None:
        # What stays in host memory is not known yet: the least of it is on the safe side.
        asked = asked.with_embedding(min(one.bytes for one in table.candidates.values()))
    names = list(dict.fromkeys((asked.load.kv.name, *measured)))

    @cache
    def best(context: int) -> Mapping[str, Fit]:
        return _best_by_cache(asked.of_length(context), measurement, names)

    def loss(context: int) -> float:
        """Of the best there is; infinite where nothing fits."""
        return min((fit.divergence + measured.get(name, 0.0) for name, fit in best(context).items()), default=math.inf)

    contexts = asked.contexts
    if not best(contexts.least):
        least = sum(min(one.bytes for one in group.candidates.values()) for group in measurement.groups)
        raise ResourceError(_shortage(asked, measurement.other_bytes + least, names))
    price = contexts.price(loss(contexts.least))
    context = contexts.most
    if loss(context) > price:
        context = max(contexts.least, largest(lambda n: n <= contexts.least or loss(n) <= price, context, _STEP))
    found = best(context)
    chosen = min(found, key=lambda name: (found[name].divergence + measured.get(name, 0.0), names.index(name)))
    if table is not None:
        asked = asked.with_embedding(table.candidates[found[chosen].choices[measurement.embedding]].bytes)
    serving = _serving(asked.of_length(context), found, chosen, measured, unmeasured)
    return found[chosen], replace(serving, context_reason=_context_reason(contexts, context, price, loss))


def _best_by_cache(asked: Asked, measurement: Measurement, names: Sequence[str]) -> dict[str, Fit]:
    """The best choice of weights beside each cache format that leaves room for any."""
    found: dict[str, Fit] = {}
    for name in names:
        with suppress(ResourceError):
            found[name] = choose(measurement, total_bytes=max(1, asked.room(KV_DTYPES[name])))
    return found


def _context_reason(contexts: Contexts, context: int, price: float, loss: Callable[[int], float]) -> str:
    if contexts.least == contexts.most:
        return contexts.told
    rule = f"{price:.3g} nats" if price <= contexts.max_kl else f"{_DEARER:.0%} more than {contexts.least:,} tokens do"
    if context == contexts.most:
        return f"the longest there is: weights and cache lose {loss(context):.3g} nats, and may lose {rule}"
    most = f"{loss(contexts.most):.3g} at {contexts.most:,}"
    if loss(contexts.most) == math.inf:
        most = f"{contexts.most:,} do not fit"
    return (
        f"the longest of {contexts.told} that loses at most {rule}: {loss(context):.3g} nats of weights and cache, "
        f"against {loss(contexts.least):.3g} at {contexts.least:,}; {most}"
    )


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
        enough = told_size(math.ceil(need / UTILISATION[asked.engine]), digits=2, up=True)
        ways.append(f"--memory {enough.replace(' ', '')}")
    weights = f"the smallest weights ({told_size(least, digits=2)}), " if least else ""
    would = f"; this would do: {', or '.join(ways)}" if ways else ": take a larger device, or a smaller model"
    return (
        f"--memory: {weights}the {smallest} cache of {load.concurrency} x {load.context:,} tokens and {asked.engine} "
        f"need {told_size(need, digits=2)}, {told_size(need - asked.budget, digits=2)} more than the "
        f"{told_size(asked.budget, digits=2)} that may be used of {told_size(asked.memory, digits=2)}{would}"
    )
