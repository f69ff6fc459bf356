"""Prometheus rules, their tests, and the runbook, made from :mod:`lowbit.ops.alerts.table`.

Every name of a metric in an expression is looked up among those that the gateway declares, so that no rule can watch
something that is not there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from string import Template
from typing import Any, cast

from lowbit.errors import UsageError
from lowbit.gateway.config import LimitsConfig
from lowbit.gateway.gate import Gate
from lowbit.gateway.metrics import Metrics
from lowbit.gateway.policy import Snapshot
from lowbit.gateway.protocol import EngineInfo, ModelInfo, PoolProtocol
from lowbit.ops.alerts.table import ALERTS, RECORDED, THRESHOLDS
from lowbit.ops.alerts.types import Alert, Case
from lowbit.ops.text_files import as_yaml

__all__ = ["checked", "declared_metrics", "rule_tests", "rules", "runbook", "thresholds"]

RUNBOOK = "runbooks.md"
"""Where alerts send people unless told otherwise: the file beside the rules."""

_NAME = re.compile(r"\blowbit[_:][a-zA-Z0-9_:]+")
_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
_LABEL = re.compile(r"\{\{ \$labels\.(\w+) \}\}")


class _NoModels:
    """A pool of nothing: all it takes to ask the gateway which metrics it has."""

    def snapshot(self) -> Snapshot:
        return Snapshot(0.0, {}, {}, 0)

    def models(self) -> Sequence[ModelInfo]:
        return ()

    def engines(self) -> Sequence[EngineInfo]:
        return ()


@cache
def declared_metrics() -> frozenset[str]:
    """Names of all series that a gateway's ``/metrics`` can have, as an expression names them."""
    metrics = Metrics(cast(PoolProtocol, _NoModels()), Gate(LimitsConfig(), lambda model: 0))
    return frozenset(
        family.name + suffix for family in metrics.registry.collect() for suffix in _SUFFIXES.get(family.type, ())
    )


def checked(expression: str) -> str:
    """``expression``. Raises :class:`ValueError` if it names a metric that neither gateway nor rules have."""
    known = declared_metrics() | {each.name for each in RECORDED}
    for name in _NAME.findall(expression):
        if name not in known:
            raise ValueError(f"{expression}: there is no metric {name}")
    return expression


def thresholds(settings: Sequence[str] = ()) -> dict[str, float]:
    """The numbers of :data:`THRESHOLDS`, changed by ``NAME=VALUE``. Raises :class:`UsageError` for another name."""
    numbers = {name: each.value for name, each in THRESHOLDS.items()}
    for text in settings:
        name, _, value = text.partition("=")
        if name not in numbers:
            raise UsageError(f"--set {text!r}: there is no threshold {name!r}; there are {', '.join(numbers)}")
        if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
            raise UsageError(f"--set {text!r}: {value!r} is not a number of zero or more")
        numbers[name] = float(value)
    if not 0 < numbers["objective"] < 1:
        raise UsageError(f"--set objective={numbers['objective']:g}: is not between 0 and 1: write e.g. 0.999")
    return numbers


def rules(numbers: Mapping[str, float] | None = None, runbook_url: str = RUNBOOK) -> str:
    """The rule file for Prometheus."""
    filled = {name: f"{value:g}" for name, value in (numbers or thresholds()).items()}
    recorded = [{"record": each.name, "expr": checked(each.expression)} for each in RECORDED]
    alerts = []
    for alert in ALERTS:
        rule: dict[str, Any] = {"alert": alert.name, "expr": checked(Template(alert.expression).substitute(filled))}
        if alert.wait != "0m":
            rule["for"] = alert.wait
        rule["labels"] = {"severity": alert.severity}
        rule["annotations"] = _annotations(alert, runbook_url)
        alerts.append(rule)
    groups = [{"name": "lowbit-recorded", "rules": recorded}, {"name": "lowbit", "rules": alerts}]
    return "# Made by lowbit alerts.\n" + as_yaml({"groups": groups})


def rule_tests(rule_file: str = "rules.yaml", runbook_url: str = RUNBOOK) -> str:
    """Tests of the rules for ``promtool test rules``: each alert fires in its case, and is silent in the quiet one.

    They hold for the thresholds as they come.
    """
    tests = []
    for alert in ALERTS:
        case = alert.case
        tests.append(_test(alert, case, case.series, [_expected(alert, runbook_url)]))
        if case.quiet:
            tests.append(_test(alert, case, case.quiet, []))
    return "# Made by lowbit alerts.\n" + as_yaml(
        {"rule_files": [rule_file], "evaluation_interval": "1m", "tests": tests}
    )


def runbook() -> str:
    """What each alert means, where to look and what mends it, as Markdown."""
    parts = [
        "# Runbooks",
        "One section for each alert of `lowbit alerts`, made from the same table as the rules. `PATH` is a checkpoint, "
        "`ORIGINAL` the one it was made from, `URL` the gateway's address, `DEST` a backup.",
    ]
    for alert in ALERTS:
        wait = "at once" if alert.wait == "0m" else f"after {alert.wait}"
        parts += [
            f"## {alert.name}",
            f"{alert.severity}, {wait}: {_LABEL.sub(_word, alert.summary)}.",
            alert.means,
            f"```\n{alert.expression}\n```",
            *(f"`${name}` is {each.value:g}: {each.origin}." for name, each in _used(alert)),
            "Look at:\n\n" + "\n".join(f"- {_command(text)}" for text in alert.look),
            "What mends it:\n\n" + "\n".join(f"- {_command(text)}" for text in alert.mend),
        ]
    return "\n\n".join(parts) + "\n"


def _annotations(alert: Alert, runbook_url: str) -> dict[str, str]:
    return {
        "summary": alert.summary,
        "value": alert.figure,
        "description": alert.means,
        "runbook": f"{runbook_url}#{alert.name.lower()}",
    }


def _test(alert: Alert, case: Case, series: Mapping[str, str], expected: list[Any]) -> dict[str, Any]:
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": f"{case.minute}m", "alertname": alert.name, "exp_alerts": expected}],
    }


def _expected(alert: Alert, runbook_url: str) -> dict[str, Any]:
    case = alert.case
    annotations = _annotations(alert, runbook_url)
    annotations["summary"] = _LABEL.sub(lambda match: case.labels[match[1]], annotations["summary"])
    annotations["value"] = case.shown
    return {"exp_labels": {"severity": alert.severity, **case.labels}, "exp_annotations": annotations}


def _used(alert: Alert) -> Iterator[tuple[str, Any]]:
    names = re.findall(r"\$(\w+)", alert.expression)
    return ((name, THRESHOLDS[name]) for name in dict.fromkeys(names))


def _word(match: re.Match[str]) -> str:
    return {"instance": "an instance", "model": "a model", "tier": "tier"}[match[1]]


def _command(text: str) -> str:
    """A line of the runbook: what is a command alone is set as code."""
    return f"`{text}`" if re.fullmatch(r"lowbit [a-z-]+( [A-Za-z0-9.\-…]+)*", text) else text
