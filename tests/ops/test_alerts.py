"""Rules, their tests, dashboard and runbook: all made from one table, and none about a metric that is not there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from lowbit.cli.main import main
from lowbit.gateway.config import LimitsConfig
from lowbit.gateway.engine_metrics import EngineFigures
from lowbit.gateway.gate import Gate
from lowbit.gateway.metrics import Metrics
from lowbit.gateway.policy import Snapshot, TierHealth
from lowbit.gateway.protocol import EngineInfo, ModelInfo, PoolProtocol, TierInfo
from lowbit.ops.alerts.dashboard import PANELS, dashboard
from lowbit.ops.alerts.rules import checked, declared_metrics, rule_tests, rules, runbook
from lowbit.ops.alerts.table import ALERTS, RECORDED, THRESHOLDS

DOCS = Path(__file__).parents[2] / "docs"


class OneTier:
    """A pool with one of everything, so that every series appears."""

    def snapshot(self) -> Snapshot:
        health = TierHealth("ready", gpu_memory=(50,))
        return Snapshot(0.0, {"chat@int4": health}, {}, 100, gpu_budgets=(80,))

    def models(self) -> Sequence[ModelInfo]:
        return (ModelInfo("chat", (TierInfo("chat@int4", "int4", "llama.cpp", 4, 10, 0.02, 512, 0.1),)),)

    def engines(self) -> Sequence[EngineInfo]:
        return (EngineInfo("chat@int4", "llama.cpp", "http://127.0.0.1:1", 1, 0, 10),)


def exposed() -> dict[str, set[str]]:
    """Every series of a gateway's ``/metrics`` with its labels, as Prometheus' own format says it."""
    metrics = Metrics(cast(PoolProtocol, OneTier()), Gate(LimitsConfig(), lambda model: 1))
    metrics.answered("chat", "int4", "/v1/completions", 200, 1.0)
    metrics.left("chat")
    metrics.queued("chat", 0.1)
    metrics.first_token("chat", "int4", 0.1)
    metrics.tokens("chat", "int4", 3, 4)
    metrics.gaps.series("chat", "int4")
    text = metrics.render({"chat@int4": EngineFigures(1, 2, 0.5, 10, 20)}).decode()
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_what_is_declared_is_what_a_gateway_exposes() -> None:
    exposed_names = {name for name in exposed() if not name.endswith("_created")}
    assert declared_metrics() == exposed_names


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_cases_speak_of_series_that_exist(alert: Any) -> None:
    series = exposed()
    for text in (*alert.case.series, *alert.case.quiet):
        name, _, labels = text.partition("{")
        if name != "up":
            assert set(re.findall(r"(\w+)=", labels)) <= series[name] | {"instance", "job"}, text
    assert set(re.findall(r"\$labels\.(\w+)", alert.summary)) <= set(alert.case.labels)


def test_a_metric_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no metric lowbit_request_total"):
        checked("rate(lowbit_request_total[5m])")
    with pytest.raises(ValueError, match="no metric lowbit:errors:ratio_2h"):
        checked("lowbit:errors:ratio_2h > 1")
    for each in RECORDED:
        assert checked(each.name) == each.name


def test_every_alert_is_whole() -> None:
    assert len({alert.name for alert in ALERTS}) == len(ALERTS)
    used = {name for alert in ALERTS for name in re.findall(r"\$(\w+)", alert.expression)}
    assert used == set(THRESHOLDS)
    for alert in ALERTS:
        assert alert.look
        assert alert.mend
        assert f"## {alert.name}\n" in runbook()
        assert re.fullmatch(r"\d+[mh]", alert.wait)


def test_the_required_alerts_are_there() -> None:
    names = {alert.name for alert in ALERTS}
    assert names >= {
        "LowbitQuantizationErrorHigh", "LowbitSlowerThanBaseline", "LowbitMemoryAboveBudget", "LowbitOutOfMemoryKill",
        "LowbitQueueFilling", "LowbitErrorBudgetBurnFast", "LowbitErrorBudgetBurn", "LowbitErrorBudgetBurnSlow",
        "LowbitEngineRestarts", "LowbitKvCacheFull", "LowbitCertificateMissing", "LowbitCertificateFailing",
    }  # fmt: skip


def test_the_runbook_in_the_documentation_is_this_one() -> None:
    assert (DOCS / "runbooks.md").read_text() == runbook(), "lowbit alerts -o DIR writes it: copy it to docs"


def test_rules_and_tests_are_yaml_of_each_other() -> None:
    groups = yaml.safe_load(rules())["groups"]
    assert [rule["alert"] for rule in groups[1]["rules"]] == [alert.name for alert in ALERTS]
    assert [rule["record"] for rule in groups[0]["rules"]] == [each.name for each in RECORDED]
    assert "$" not in "".join(rule["expr"] for rule in groups[1]["rules"])
    tested = {test["alert_rule_test"][0]["alertname"] for test in yaml.safe_load(rule_tests())["tests"]}
    assert tested == {alert.name for alert in ALERTS}


def test_the_dashboard_shows_only_what_is_there() -> None:
    board = json.loads(dashboard())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel.get("targets", ()):
            checked(target["expr"])
    shown = json.dumps(panels)
    labels = exposed()
    for _, row in PANELS:
        for panel in row:
            for expression, legend in panel.lines:
                names = [name for name in re.findall(r"lowbit_[a-z_]+", expression) if name in labels]
                wanted = set(re.findall(r"\{\{(\w+)\}\}", legend)) - {"instance"}
                assert not names or all(wanted <= labels[name] for name in names), panel.title
    assert "lowbit_tier_state" in shown


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "monitoring"
    assert main(["alerts", "-o", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {"rules.yaml", "tests.yaml", "dashboard.json", "runbooks.md"}
    assert main(["alerts", "-o", str(out)]) == 2
    assert main(["alerts", "-o", str(out), "--set", "kl=0.3", "--overwrite"]) == 0
    assert "lowbit_quantization_kl > 0.3" in (out / "rules.yaml").read_text()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "kl"], "'' is not a number"),
        (["--set", "kl=-1"], "'-1' is not a number"),
        (["--set", "nothing=1"], "no threshold 'nothing'"),
        (["--set", "objective=1"], "between 0 and 1"),
    ],
)
def test_bad_input(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["alerts", "-o", str(tmp_path / "x"), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_nothing_is_half_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["alerts", "-o", str(tmp_path / "file")]) == 2
    (tmp_path / "out" / "tests.yaml").mkdir(parents=True)
    assert main(["alerts", "-o", str(tmp_path / "out"), "--overwrite"]) == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tests.yaml"]
    assert "tests.yaml: exists" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is not installed")
def test_promtool_takes_rules_and_panels(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(rules())
    lines = [line for _, row in PANELS for panel in row for line in panel.lines]
    panels = [
        {"record": f"panel:{index}", "expr": expression.replace("$__rate_interval", "5m")}
        for index, (expression, _) in enumerate(lines)
    ]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": panels}]}))
    for name in ("rules.yaml", "panels.yaml"):
        done = subprocess.run(["promtool", "check", "rules", str(tmp_path / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
