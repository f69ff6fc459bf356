"""A Grafana dashboard, made from a table of panels whose expressions name only metrics that the gateway declares."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lowbit.ops.alerts.rules import checked

__all__ = ["PANELS", "Panel", "dashboard"]

SCHEMA = 39
"""Version of Grafana's dashboard model (Grafana 11): what later versions migrate from."""
_WIDE, _HEIGHT = 24, 8
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_M = 'model=~"$model"'


@dataclass(frozen=True, slots=True)
class Panel:
    """A picture: its unit as Grafana calls it, and expressions with the names of their lines.

    ``width`` is in 24ths of the page; ``limit`` draws a red line.
    """

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    kind: Literal["timeseries", "stat", "heatmap"] = "timeseries"
    width: int = 8
    limit: float | None = None
    about: str = ""


def _rate(metric: str, by: str, more: str = "") -> str:
    return f"sum by ({by}) (rate({metric}{{{_M}{more}}}[$__rate_interval]))"


def _quantile(share: float, metric: str, by: str) -> str:
    return f"histogram_quantile({share}, {_rate(f'{metric}_bucket', f'{by}, le')})"


PANELS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Service",
        (
            Panel(
                "Errors of the last hour", "percentunit", (("lowbit:errors:ratio_1h", "{{model}}"),), "stat", 6, 0.001
            ),
            Panel("Tokens per second", "short", ((f"sum({_rate('lowbit_tokens_total', 'model')})", ""),), "stat", 6),
            Panel("Requests under way", "short", ((f"sum(lowbit_in_flight{{{_M}}})", ""),), "stat", 6),
            Panel("Steps down from the first tier", "short", ((f"lowbit_level{{{_M}}}", "{{model}}"),), "stat", 6),
            Panel("Answers", "reqps", ((_rate("lowbit_requests_total", "model, status"), "{{model}} {{status}}"),)),
            Panel(
                "Time to first token",
                "s",
                (
                    (_quantile(0.5, "lowbit_time_to_first_token_seconds", "model, tier"), "{{model}}@{{tier}} median"),
                    (_quantile(0.95, "lowbit_time_to_first_token_seconds", "model, tier"), "{{model}}@{{tier}} p95"),
                ),
            ),
            Panel(
                "Time between tokens",
                "s",
                (
                    (_quantile(0.5, "lowbit_inter_token_latency_seconds", "model, tier"), "{{model}}@{{tier}} median"),
                    (_quantile(0.99, "lowbit_inter_token_latency_seconds", "model, tier"), "{{model}}@{{tier}} p99"),
                ),
            ),
            Panel(
                "Tokens per second by tier",
                "short",
                ((_rate("lowbit_tokens_total", "model, tier, kind"), "{{model}}@{{tier}} {{kind}}"),),
            ),
            Panel(
                "Whole answers, p95", "s", ((_quantile(0.95, "lowbit_request_seconds", "model, route"), "{{route}}"),)
            ),
            Panel("Clients that left", "reqps", ((_rate("lowbit_cancelled_total", "model"), "{{model}}"),)),
        ),
    ),
    (
        "Queues",
        (
            Panel(
                "Waiting requests",
                "short",
                ((f"lowbit_queue_requests{{{_M}}}", "{{model}}"), ("lowbit_queue_limit_requests", "limit")),
            ),
            Panel("Time in the queue, p95", "s", ((_quantile(0.95, "lowbit_queue_seconds", "model"), "{{model}}"),)),
            Panel("Waiting tokens", "short", ((f"lowbit_queue_tokens{{{_M}}}", "{{model}}"),)),
        ),
    ),
    (
        "Engines",
        (
            Panel(
                "Memory",
                "bytes",
                (
                    (f"lowbit_engine_memory_bytes{{{_M}}}", "{{model}}@{{tier}}"),
                    ("lowbit_memory_budget_bytes", "budget"),
                    ("lowbit_memory_available_bytes", "left on the machine"),
                ),
            ),
            Panel(
                "KV cache in use",
                "percentunit",
                ((f"lowbit_kv_cache_usage_ratio{{{_M}}}", "{{model}}@{{tier}}"),),
                limit=0.95,
                about="llama.cpp does not tell it.",
            ),
            Panel(
                "Requests in the engines",
                "short",
                (
                    (f"lowbit_engine_running{{{_M}}}", "{{model}}@{{tier}} running"),
                    (f"lowbit_engine_waiting{{{_M}}}", "{{model}}@{{tier}} waiting"),
                ),
            ),
            Panel(
                "Trouble of the last 10 minutes",
                "short",
                tuple(
                    (f"sum by (model, tier) (increase({metric}{{{_M}}}[10m]))", f"{{{{model}}}}@{{{{tier}}}} {word}")
                    for metric, word in (
                        ("lowbit_engine_crashes_total", "crashes"),
                        ("lowbit_engine_hangs_total", "hangs"),
                        ("lowbit_engine_restarts_total", "restarts"),
                        ("lowbit_engine_load_failures_total", "failed loads"),
                    )
                ),
            ),
            Panel(
                "Tiers that changed",
                "short",
                tuple(
                    (f"sum by (model, tier) (increase({metric}{{{_M}}}[10m]))", f"{{{{model}}}}@{{{{tier}}}} {word}")
                    for metric, word in (
                        ("lowbit_fallbacks_total", "fallbacks"),
                        ("lowbit_degradations_total", "steps down"),
                        ("lowbit_recoveries_total", "climbs back"),
                        ("lowbit_circuit_openings_total", "circuits opened"),
                    )
                ),
            ),
            Panel("State of tiers", "short", ((f"lowbit_tier_state{{{_M}}}", "{{model}}@{{tier}} {{state}}"),)),
            Panel("Killed for want of memory", "short", (("increase(lowbit_oom_kills_total[1h])", "{{instance}}"),)),
        ),
    ),
    (
        "Quality",
        (
            Panel(
                "KL divergence from the original",
                "short",
                ((f"lowbit_quantization_kl{{{_M}}}", "{{model}}@{{tier}}"),),
                limit=0.1,
                about="Nats per token on held-out text, from the checkpoint's certificate.",
            ),
            Panel("Weight error", "percentunit", ((f"lowbit_quantization_error{{{_M}}}", "{{model}}@{{tier}}"),)),
            Panel("Bits", "short", ((f"lowbit_tier_bits{{{_M}}}", "{{model}}@{{tier}}"),)),
        ),
    ),
)


def dashboard() -> str:
    """The dashboard as JSON, to be imported or provisioned."""
    return json.dumps(
        {
            "uid": "lowbit",
            "title": "lowbit",
            "tags": ["lowbit"],
            "schemaVersion": SCHEMA,
            "version": 1,
            "editable": True,
            "graphTooltip": 1,
            "refresh": "30s",
            "time": {"from": "now-3h", "to": "now"},
            "templating": {"list": [_datasource(), _models()]},
            "panels": list(_panels()),
        },
        indent=2,
    )


def _panels() -> Iterator[dict[str, Any]]:
    number = y = 0
    for title, panels in PANELS:
        number += 1
        place = {"h": 1, "w": _WIDE, "x": 0, "y": y}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        x, y = 0, y + 1
        for panel in panels:
            if x + panel.width > _WIDE:
                x, y = 0, y + _HEIGHT
            number += 1
            yield _panel(panel, number, {"h": _HEIGHT, "w": panel.width, "x": x, "y": y})
            x += panel.width
        y += _HEIGHT


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.limit is not None:
        steps.append({"color": "red", "value": panel.limit})
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.kind == "timeseries" and panel.limit is not None:
        defaults["custom"] = {"thresholdsStyle": {"mode": "line"}}
    targets = [
        {"refId": chr(ord("A") + index), "datasource": _SOURCE, "expr": checked(expression), "legendFormat": legend}
        for index, (expression, legend) in enumerate(panel.lines)
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": targets,
    }


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _models() -> dict[str, Any]:
    query = f"label_values({checked('lowbit_tier_state')}, model)"
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": query, "refId": "model"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
    }
