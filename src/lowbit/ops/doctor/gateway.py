"""The diagnoses of a gateway, or of any server that speaks OpenAI's HTTP: :data:`lowbit.ops.doctor.run.GATEWAY`."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from lowbit.errors import UsageError
from lowbit.gateway.engine_metrics import parse_figures
from lowbit.ops.alerts.table import ALERTS, THRESHOLDS
from lowbit.ops.doctor.run import GATEWAY, Finding, Report, collect

__all__ = ["FIGURES", "Samples", "examine_gateway"]

Samples = dict[str, list[tuple[Mapping[str, str], float]]]
"""Name of a series to its labels and values."""

_TIMEOUT = 10.0
_PROBE_TIMEOUT = 120.0
_MAX_BODY = 32 << 20


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of ``/metrics`` that an alert watches too: the alert has its meaning and what mends it.

    ``judge`` gives ``(where, detail)`` for what is beyond the limit now.
    """

    check: str
    alert: str
    needs: str
    judge: Callable[[Samples], Iterator[tuple[str, str]]]


def examine_gateway(url: str, *, key: str | None = None, ttft: float | None = None) -> Report:
    """Ask a server how it is: readiness, models, one token of each chat model, and its metrics.

    ``key`` is its API key, ``ttft`` the objective for the probe in seconds. Raises :class:`UsageError` for what is no
    url, or a key that the server refuses.
    """
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise UsageError(f"{url}: is not an http(s) url")
    base = url.rstrip("/").removesuffix("/v1")
    client = _Client(base, key)
    status, body = client.get("/v1/models")
    if status is None:
        return Report(base, tuple(collect(GATEWAY, "reachable", [(base, body)], "")))
    if status in (401, 403):
        raise UsageError(f"{base}: wants an API key (status {status}): give --api-key env:NAME")
    results = collect(GATEWAY, "reachable", [], f"status {status} from /v1/models")
    results += _ready(client)
    models = _models(body) if status == 200 else []
    bad = [] if models else [("/v1/models", f"status {status}, no models in the answer")]
    results += collect(GATEWAY, "models", bad, ", ".join(models))
    results += _probe(client, models, ttft if ttft is not None else THRESHOLDS["first_token_seconds"].value)
    results += _metrics(client)
    return Report(base, tuple(results))


class _Client:
    """GET and POST with the key; a server that cannot be reached is status None and the reason."""

    def __init__(self, base: str, key: str | None) -> None:
        self.base = base
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def get(self, path: str, timeout: float = _TIMEOUT) -> tuple[int | None, str]:
        """Status and text."""
        return self._ask(urllib.request.Request(self.base + path, headers=self._headers), timeout)

    def post(self, path: str, body: Any, timeout: float) -> tuple[int | None, str]:
        """Status and text of a JSON request."""
        data = json.dumps(body).encode()
        return self._ask(urllib.request.Request(self.base + path, data, self._headers), timeout)

    def _ask(self, request: urllib.request.Request, timeout: float) -> tuple[int | None, str]:
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, answer.read(_MAX_BODY).decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(_MAX_BODY).decode("utf-8", "replace")
        except urllib.error.URLError as error:
            return None, f"cannot be reached: {error.reason}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            return None, f"does not answer as a server should: {str(error) or type(error).__name__}"


def _ready(client: _Client) -> list[Finding]:
    status, body = client.get("/ready")
    if status == 404:
        return [Finding("ready", "not measured", "/ready", "this server has no such route")]
    bad = [] if status == 200 else [("/ready", f"status {status}: {_short(body)}")]
    return collect(GATEWAY, "ready", bad, "every model can answer")


def _models(body: str) -> list[str]:
    try:
        data = json.loads(body)["data"]
        return [str(entry["id"]) for entry in data]
    except (ValueError, TypeError, KeyError):
        return []


def _probe(client: _Client, models: list[str], ttft: float) -> list[Finding]:
    """One token of each model; names with a tier in them repeat the model's own."""
    results: list[Finding] = []
    for model in models:
        if "@" in model:
            continue
        begun = time.monotonic()
        body = {"model": model, "prompt": "Hello", "max_tokens": 1}
        status, text = client.post("/v1/completions", body, _PROBE_TIMEOUT)
        seconds = time.monotonic() - begun
        if status in (404, 405):
            results.append(Finding("probe", "not measured", model, f"does not complete text (status {status})"))
            continue
        bad = []
        if status != 200:
            bad.append((model, f"status {status}: {_short(text)}"))
        elif seconds > ttft:
            bad.append((model, f"one token took {seconds:.2f} s: above {ttft:g} s"))
        results += collect(GATEWAY, "probe", bad, f"{model}: one token in {seconds:.2f} s")
    return results


def _metrics(client: _Client) -> list[Finding]:
    status, text = client.get("/metrics")
    if status != 200:
        return [Finding("metrics", "not measured", "/metrics", f"status {status}")]
    try:
        samples = read_samples(text)
        figures = parse_figures(text)
    except ValueError as error:
        return [Finding("metrics", "finding", "/metrics", f"is not Prometheus text: {_short(str(error))}")]
    if not any(name.startswith("lowbit_") for name in samples):
        known = {"lowbit_kv_cache_usage_ratio": figures.kv_usage, "lowbit_engine_waiting": figures.waiting}
        samples = {name: [({}, value)] for name, value in known.items() if value is not None}
    results = []
    for figure in FIGURES:
        if figure.needs not in samples:
            results.append(Finding(figure.check, "not measured", "", f"the server does not tell {figure.needs}"))
            continue
        alert = next(alert for alert in ALERTS if alert.name == figure.alert)
        found = [
            Finding(figure.check, "finding", where, detail, "; ".join(alert.mend))
            for where, detail in figure.judge(samples)
        ]
        results += found or [Finding(figure.check, "ok", "", _now(samples[figure.needs]))]
    return results


def read_samples(text: str) -> Samples:
    """Every sample of an exposition. Raises :class:`ValueError` for text that is none."""
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


def _above(name: str, limit: float, what: str) -> Callable[[Samples], Iterator[tuple[str, str]]]:
    """Judge each series of ``name`` by itself."""

    def judge(samples: Samples) -> Iterator[tuple[str, str]]:
        for labels, value in samples.get(name, ()):
            if value > limit:
                yield _where(labels), f"{value:.3g} {what}" + (f": above {limit:g}" if limit else "")

    return judge


def _errors(samples: Samples) -> Iterator[tuple[str, str]]:
    counts: dict[str, list[float]] = {}
    for labels, value in samples["lowbit_requests_total"]:
        pair = counts.setdefault(labels.get("model", ""), [0.0, 0.0])
        pair[0] += value
        pair[1] += value if labels.get("status", "").startswith("5") else 0
    limit = 1 - THRESHOLDS["objective"].value
    for model, (total, failed) in counts.items():
        if failed > limit * total:
            yield model, f"{failed:.0f} of {total:.0f} requests since its start ended with a 5xx status"


def _queues(samples: Samples) -> Iterator[tuple[str, str]]:
    limit = next((value for _, value in samples.get("lowbit_queue_limit_requests", ())), 0.0)
    for labels, value in samples["lowbit_queue_requests"]:
        if limit and value > THRESHOLDS["queue_share"].value * limit:
            yield _where(labels), f"{value:.0f} of {limit:.0f} places in the queue are taken"


def _memory(samples: Samples) -> Iterator[tuple[str, str]]:
    used = sum(value for _, value in samples["lowbit_engine_memory_bytes"])
    budget = sum(value for _, value in samples.get("lowbit_memory_budget_bytes", ()))
    if budget and used > budget:
        yield "engines", f"they hold {used / budget:.0%} of the budget of {budget / 2**30:.2f} GiB"


def _machine(samples: Samples) -> Iterator[tuple[str, str]]:
    left = sum(value for _, value in samples["lowbit_memory_available_bytes"])
    total = sum(value for _, value in samples.get("lowbit_memory_total_bytes", ()))
    if left < (1 - THRESHOLDS["memory_share"].value) * total:
        yield "machine", f"{left / 2**30:.2f} of {total / 2**30:.2f} GiB are left"


def _slow_tiers(samples: Samples) -> Iterator[tuple[str, str]]:
    """Quantized tiers that write slower than a 16-bit one of the same model, by their means since the start."""
    counts = {_where(labels): value for labels, value in samples.get("lowbit_inter_token_latency_seconds_count", ())}
    bits = {_where(labels): value for labels, value in samples.get("lowbit_tier_bits", ())}
    means: dict[str, dict[str, float]] = {}
    for labels, total in samples["lowbit_inter_token_latency_seconds_sum"]:
        if count := counts.get(_where(labels)):
            means.setdefault(labels.get("model", ""), {})[_where(labels)] = total / count
    for tiers in means.values():
        baseline = min((mean for tier, mean in tiers.items() if bits.get(tier, 0) >= 16), default=None)
        for tier, mean in tiers.items():
            if baseline and bits.get(tier, 16) < 16 and mean > THRESHOLDS["slower"].value * baseline:
                yield tier, f"{1000 * mean:.3g} ms per token, its 16-bit tier {1000 * baseline:.3g} ms"


def _uncertified(samples: Samples) -> Iterator[tuple[str, str]]:
    measured = {_where(labels) for labels, _ in samples.get("lowbit_quantization_kl", ())}
    for labels, bits in samples["lowbit_tier_bits"]:
        if bits < 16 and _where(labels) not in measured:
            yield _where(labels), f"serves {bits:g} bits and carries no certificate"


def _not_ready(samples: Samples) -> Iterator[tuple[str, str]]:
    for labels, value in samples["lowbit_tier_state"]:
        if value and labels.get("state") not in ("ready", "cold", "loading", "draining"):
            yield _where(labels), f"is {labels.get('state')}"


FIGURES: tuple[Figure, ...] = (
    Figure("tiers", "LowbitNoTierReady", "lowbit_tier_state", _not_ready),
    Figure("errors", "LowbitErrorBudgetBurn", "lowbit_requests_total", _errors),
    Figure("restarts", "LowbitEngineRestarts", "lowbit_engine_restarts_total",
           _above("lowbit_engine_restarts_total", 0, "restarts since its start")),
    Figure("crashes", "LowbitEngineEnded", "lowbit_engine_crashes_total",
           _above("lowbit_engine_crashes_total", 0, "crashes since its start")),
    Figure("failed loads", "LowbitEngineLoadFailed", "lowbit_engine_load_failures_total",
           _above("lowbit_engine_load_failures_total", 0, "loads failed since its start")),
    Figure("circuit", "LowbitCircuitOpen", "lowbit_circuit_open",
           _above("lowbit_circuit_open", 0, "(out of use after failures)")),
    Figure("degraded", "LowbitDegraded", "lowbit_level", _above("lowbit_level", 0, "steps down from the first tier")),
    Figure("queue", "LowbitQueueFilling", "lowbit_queue_requests", _queues),
    Figure("engine queue", "LowbitEngineHoldsBack", "lowbit_engine_waiting",
           _above("lowbit_engine_waiting", 0, "requests held back by the engine")),
    Figure("KV cache", "LowbitKvCacheFull", "lowbit_kv_cache_usage_ratio",
           _above("lowbit_kv_cache_usage_ratio", THRESHOLDS["kv_share"].value, "of the KV cache is in use")),
    Figure("memory", "LowbitMemoryAboveBudget", "lowbit_engine_memory_bytes", _memory),
    Figure("machine memory", "LowbitMachineMemoryLow", "lowbit_memory_available_bytes", _machine),
    Figure("speed", "LowbitSlowerThanBaseline", "lowbit_inter_token_latency_seconds_sum", _slow_tiers),
    Figure("divergence", "LowbitCertificateFailing", "lowbit_quantization_kl",
           _above("lowbit_quantization_kl", THRESHOLDS["kl"].value, "nats per token")),
    Figure("weight error", "LowbitQuantizationErrorHigh", "lowbit_quantization_error",
           _above("lowbit_quantization_error", THRESHOLDS["weight_error"].value, "mean relative weight error")),
    Figure("certificates", "LowbitCertificateMissing", "lowbit_tier_bits", _uncertified),
)  # fmt: skip
"""What is read from ``/metrics``. Counters count since the gateway's start: the alerts see only what is new."""


def _where(labels: Mapping[str, str]) -> str:
    return "@".join(labels[name] for name in ("model", "tier") if labels.get(name))


def _now(values: list[tuple[Mapping[str, str], float]]) -> str:
    if not values:
        return "nothing yet"
    most = max(value for _, value in values)
    return f"at most {most:.3g}"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else f"{line[:159]}…"
