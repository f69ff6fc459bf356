"""lowbit bench on the real engine: the embedded model, alone and under load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowbit.cli.main import main

pytest.importorskip("xllamacpp")


@pytest.mark.slow
def test_the_demo_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    command = ["bench", "demo", "--quantize", "none,Q8_0", "--repeats", "2", "--output-tokens", "12", "--threads", "1"]
    assert main([*command, "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert "demo@Q8_0" in capsys.readouterr().out
    runs = json.loads((tmp_path / "out" / "bench.json").read_text())["runs"]
    whole, small = (run["figures"] for run in runs)
    assert all(
        len(figure["values"]) == 2 and min(figure["values"]) > 0 for figure in (*whole.values(), *small.values())
    )
    facts = [run["facts"] for run in runs]
    assert facts[0]["bits_per_weight"] > facts[1]["bits_per_weight"]
    assert facts[0]["kl_divergence"] == 0.0
    assert facts[1]["kl_divergence"] > 0
    assert facts[0]["bytes"] > facts[1]["bytes"]
    # the weights are read by the engine's process: it holds at least most of them
    assert whole["memory"]["median"] > facts[0]["bytes"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "bench.json",
        "bench.csv",
        "bench-precision.png",
        "bench-tradeoff.png",
    }


@pytest.mark.slow
def test_the_demo_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "bench.json"
    command = ["bench", "demo", "--concurrency", "1,3", "--requests", "6", "--repeats", "1", "--threads", "1"]
    assert main([*command, "--prompt-tokens", "20-30", "--output-tokens", "8", "--json", str(out), "--quiet"]) == 0
    for run in json.loads(out.read_text())["runs"]:
        assert run["failures"] == {}
        assert {row[6] for row in run["requests"]} == {8}
        assert all(20 <= row[5] <= 30 for row in run["requests"])
