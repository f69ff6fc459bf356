"""What ``/metrics`` tells: requests, latency, tokens, queues, tiers, engines, and each checkpoint's measured quality.

Counters and histograms are fed as requests pass; the state of pool, queues and engines is read when someone scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from lowbit.engines.memory import available_bytes, oom_kills, total_bytes
from lowbit.gateway.engine_metrics import EngineFigures
from lowbit.gateway.gate import Gate
from lowbit.gateway.protocol import PoolProtocol

__all__ = ["GapHistogram", "Metrics"]

_Count: TypeAlias = Callable[[float], None]

LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
GAPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0)
TIER = ("model", "tier")

_EVENTS = {
    "fallback": ("lowbit_fallbacks", "Requests that went on to another tier because this one failed"),
    "degraded": ("lowbit_degradations", "Steps down to this tier because objectives were missed or a tier was lost"),
    "recovered": ("lowbit_recoveries", "Climbs back to this tier"),
    "circuit_opened": ("lowbit_circuit_openings", "Times that consecutive failures took this tier out of use"),
    "crashed": ("lowbit_engine_crashes", "Ends of an engine's process that nobody asked for"),
    "hung": ("lowbit_engine_hangs", "Engines ended because they no longer answered"),
    "restarted": ("lowbit_engine_restarts", "Restarts of an engine after a crash or a hang"),
    "load_failed": ("lowbit_engine_load_failures", "Engines that did not become ready"),
}
"""Event of the pool to the counter it moves."""


class GapHistogram:
    """Inter-token latency: one addition per chunk, where prometheus_client's histogram would walk its buckets."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, str], tuple[list[int], list[float]]] = {}

    def series(self, model: str, tier: str) -> tuple[list[int], list[float]]:
        """``(counts by bucket, [sum of seconds])``: add to both."""
        found = self._series.get((model, tier))
        if found is None:
            found = self._series[model, tier] = ([0] * (len(GAPS) + 1), [0.0])
        return found

    @staticmethod
    def add(series: tuple[list[int], list[float]], seconds: float) -> None:
        """Count one gap."""
        series[0][bisect_left(GAPS, seconds)] += 1
        series[1][0] += seconds

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        family = HistogramMetricFamily(
            "lowbit_inter_token_latency_seconds", "Time between two chunks of a stream", labels=TIER
        )
        for labels, (counts, total) in self._series.items():
            buckets, running = [], 0
            for bound, count in zip((*map(str, GAPS), "+Inf"), counts, strict=True):
                running += count
                buckets.append((bound, running))
            family.add_metric(labels, buckets, total[0])
        yield family


class _State:
    """Gauges read at the moment of a scrape."""

    def __init__(self, pool: PoolProtocol, gate: Gate) -> None:
        self.pool, self.gate = pool, gate
        self.figures: Mapping[str, EngineFigures] = {}

    def collect(self) -> Iterator[Metric]:
        yield from self._tiers()
        yield from self._queues()
        yield from self._engines()
        available = GaugeMetricFamily("lowbit_memory_available_bytes", "Memory that can still be taken on this machine")
        available.add_metric((), available_bytes())
        total = GaugeMetricFamily("lowbit_memory_total_bytes", "Memory of this machine or container")
        total.add_metric((), total_bytes())
        kills = CounterMetricFamily("lowbit_oom_kills", "Processes that the kernel killed for want of memory")
        kills.add_metric((), oom_kills())
        yield from (available, total, kills)

    def _tiers(self) -> Iterator[Metric]:
        snapshot = self.pool.snapshot()
        state = GaugeMetricFamily("lowbit_tier_state", "1 for the state that a tier is in", labels=(*TIER, "state"))
        opened = GaugeMetricFamily("lowbit_circuit_open", "1 while a tier is out of use after failures", labels=TIER)
        flight = GaugeMetricFamily("lowbit_in_flight", "Requests that a tier is answering", labels=TIER)
        memory = GaugeMetricFamily("lowbit_tier_memory_bytes", "Memory planned for a loaded tier", labels=TIER)
        on_gpu = GaugeMetricFamily(
            "lowbit_tier_gpu_memory_bytes", "Memory of a GPU planned for a loaded tier", labels=(*TIER, "gpu")
        )
        kl = GaugeMetricFamily("lowbit_quantization_kl", "Measured KL divergence, nats per token", labels=TIER)
        error = GaugeMetricFamily("lowbit_quantization_error", "Mean relative error of the weights", labels=TIER)
        bits = GaugeMetricFamily("lowbit_tier_bits", "Bits of a tier's weights", labels=TIER)
        preferred = GaugeMetricFamily("lowbit_level", "Steps down from the first tier", labels=("model",))
        for model in self.pool.models():
            level = snapshot.levels.get(model.name)
            preferred.add_metric((model.name,), level.index if level else 0)
            for tier in model.tiers:
                labels = (model.name, tier.name)
                health = snapshot.tiers[tier.id]
                state.add_metric((*labels, health.state), 1)
                opened.add_metric(labels, health.circuit != "closed")
                flight.add_metric(labels, health.in_flight)
                memory.add_metric(labels, health.memory)
                for number, size in enumerate(health.gpu_memory):
                    if size:
                        on_gpu.add_metric((*labels, str(number)), size)
                bits.add_metric(labels, tier.bits)
                if tier.kl is not None:
                    kl.add_metric(labels, tier.kl)
                if tier.error is not None:
                    error.add_metric(labels, tier.error)
        yield from (state, opened, flight, memory, on_gpu, bits, kl, error, preferred)
        budget = GaugeMetricFamily("lowbit_memory_budget_bytes", "Memory that all loaded tiers may take")
        budget.add_metric((), snapshot.memory_budget)
        gpus = GaugeMetricFamily(
            "lowbit_gpu_memory_budget_bytes", "Memory of a GPU that all loaded tiers may take", labels=("gpu",)
        )
        for number, size in enumerate(snapshot.gpu_budgets):
            gpus.add_metric((str(number),), size)
        yield from (budget, gpus)

    def _queues(self) -> Iterator[Metric]:
        depth = GaugeMetricFamily("lowbit_queue_requests", "Requests that wait for their turn", labels=("model",))
        tokens = GaugeMetricFamily("lowbit_queue_tokens", "Estimated tokens of those requests", labels=("model",))
        for model in self.pool.models():
            queue = self.gate.queues.get(model.name)
            depth.add_metric((model.name,), queue.waiting if queue else 0)
            tokens.add_metric((model.name,), queue.waiting_tokens if queue else 0)
        limit = GaugeMetricFamily("lowbit_queue_limit_requests", "Requests that may wait for one model")
        limit.add_metric((), self.gate.limits.queue_requests)
        yield from (depth, tokens, limit)

    def _engines(self) -> Iterator[Metric]:
        labels = (*TIER, "engine")
        resident = GaugeMetricFamily(
            "lowbit_engine_memory_bytes", "Resident memory of an engine, as last measured", labels=labels
        )
        gauges = {
            "running": GaugeMetricFamily("lowbit_engine_running", "Requests the engine works on", labels=labels),
            "waiting": GaugeMetricFamily("lowbit_engine_waiting", "Requests the engine holds back", labels=labels),
            "kv_usage": GaugeMetricFamily("lowbit_kv_cache_usage_ratio", "Share of the KV cache in use", labels=labels),
            "prompt_tokens": GaugeMetricFamily(
                "lowbit_engine_prompt_tokens", "Prompt tokens since its start", labels=labels
            ),
            "generated_tokens": GaugeMetricFamily(
                "lowbit_engine_generated_tokens", "Generated tokens since its start", labels=labels
            ),
        }
        for engine in self.pool.engines():
            model, _, tier = engine.tier_id.rpartition("@")
            if engine.resident_bytes:
                resident.add_metric((model, tier, engine.engine), engine.resident_bytes)
            figures = self.figures.get(engine.tier_id)
            for name, gauge in gauges.items():
                value = getattr(figures, name, None)
                if value is not None:
                    gauge.add_metric((model, tier, engine.engine), value)
        yield resident
        yield from gauges.values()


class Metrics:
    """All figures of one gateway, in a registry of its own."""

    def __init__(self, pool: PoolProtocol, gate: Gate) -> None:
        self.registry = CollectorRegistry()
        self._state = _State(pool, gate)
        self.gaps = GapHistogram()
        self._requests = self._counter("lowbit_requests", "Answers by status", ("model", "tier", "route", "status"))
        self._tokens = self._counter("lowbit_tokens", "Tokens of prompts and answers", (*TIER, "kind"))
        self._latency = self._histogram(
            "lowbit_request_seconds", "Arrival to the end of the answer", ("model", "route")
        )
        self._first = self._histogram("lowbit_time_to_first_token_seconds", "Arrival to the first token", TIER)
        self._queued = self._histogram("lowbit_queue_seconds", "Arrival to a place in an engine", ("model",))
        self._cancelled = self._counter("lowbit_cancelled", "Requests whose client left before the end", ("model",))
        self._events = {name: self._counter(title, text, TIER) for name, (title, text) in _EVENTS.items()}
        self.flowed = 0
        self._children: dict[tuple[Any, ...], Any] = {}
        self._ends: dict[tuple[str, str, str, int], tuple[_Count, _Count]] = {}
        self._pairs: dict[tuple[str, str], tuple[_Count, _Count]] = {}
        self.registry.register(self.gaps)
        self.registry.register(self._state)
        for model in pool.models():
            for tier in model.tiers:  # a counter that begins above 0 hides its first event from Prometheus' increase()
                for counter in self._events.values():
                    self._child(counter, model.name, tier.name)

    def on_event(self, event: str, tier_id: str, details: Mapping[str, Any]) -> None:
        """Listener of the pool."""
        if event in self._events:
            model, _, tier = tier_id.rpartition("@")
            self._child(self._events[event], model or tier_id, tier).inc()

    def answered(self, model: str, tier: str, route: str, status: int, seconds: float) -> None:
        """A request ended; ``model`` and ``tier`` are empty where it was refused before one was known."""
        count, observe = self._ends.get((model, tier, route, status)) or self._end(model, tier, route, status)
        count(1)
        observe(seconds)

    def left(self, model: str) -> None:
        """A client went away before its answer was complete."""
        self._child(self._cancelled, model).inc()

    def queued(self, model: str, seconds: float) -> None:
        """A request got its place."""
        self._child(self._queued, model).observe(seconds)

    def first_token(self, model: str, tier: str, seconds: float) -> None:
        """A stream began to speak."""
        self._child(self._first, model, tier).observe(seconds)

    def tokens(self, model: str, tier: str, prompt: int, completion: int) -> None:
        """Tokens of one answer."""
        add_prompt, add_completion = self._pairs.get((model, tier)) or self._pair(model, tier)
        add_prompt(prompt)
        add_completion(completion)

    def total_tokens(self) -> int:
        """Tokens of answers so far, of all models; those of streams under way are counted by their events."""
        return self.flowed

    def render(self, figures: Mapping[str, EngineFigures]) -> bytes:
        """The text of ``/metrics``; ``figures`` are the engines' own, by tier id."""
        self._state.figures = figures
        return generate_latest(self.registry)

    def _end(self, model: str, tier: str, route: str, status: int) -> tuple[_Count, _Count]:
        """What counts the end of a request, kept so that it is looked up once."""
        found = self._requests.labels(model, tier, route, str(status)).inc, self._latency.labels(model, route).observe
        self._ends[model, tier, route, status] = found
        return found

    def _pair(self, model: str, tier: str) -> tuple[_Count, _Count]:
        found = self._tokens.labels(model, tier, "prompt").inc, self._tokens.labels(model, tier, "completion").inc
        self._pairs[model, tier] = found
        return found

    def _child(self, metric: Any, *labels: str) -> Any:
        found = self._children.get((metric, *labels))
        if found is None:
            found = self._children[(metric, *labels)] = metric.labels(*labels)
        return found

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, labels: Sequence[str]) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=LATENCY)
