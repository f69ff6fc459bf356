"""The demo: its parts on a tiny model, and what it promises on the embedded one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.cli import demo
from lowbit.cli.progress import create_progress
from lowbit.errors import LowbitError, ResourceError


def test_demo_on_a_tiny_model(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowbit: Callable[..., Any]
) -> None:
    monkeypatch.setattr(demo, "SOURCE", str(tiny_llama))
    monkeypatch.setattr(demo, "METHODS", ("rtn", "gptq"))
    monkeypatch.setattr(demo, "BITS", (4,))
    monkeypatch.setattr(demo, "QUICK", demo.Effort(samples=2, seq_len=64, max_tokens=256))
    figures = tmp_path / "figures.json"
    done = lowbit("demo", "--quick", "--out", tmp_path / "out", "--json", figures)
    assert done.status == 0
    table = [line for line in done.out.splitlines() if line]
    assert table[0].split()[:2] == ["model", "bits/weight"]
    assert [line.split()[0] for line in table[2:4]] == ["RTN", "GPTQ"]
    assert table[-1] == f"report: {tmp_path / 'out' / 'report' / 'index.html'}"
    assert (tmp_path / "out" / "report" / "divergence-by-method.png").exists()
    candidates = json.loads(figures.read_text())["candidates"]
    for candidate in candidates:
        assert candidate["spec"] == "int4-g128-sym"
        assert candidate["seconds"] > 0
        assert 100 << 20 < candidate["peak_memory_bytes"] < 8 << 30
        assert candidate["evaluation"]["kl_divergence"] > 0
    manifest = json.loads((tmp_path / "out" / "gptq-int4-g128" / "lowbit.json").read_text())
    assert manifest["quality"]["kl_divergence"] == candidates[1]["evaluation"]["kl_divergence"]

    again = lowbit("demo", "--quick", "--out", tmp_path / "out", "--quiet")
    assert again.status == 2
    assert "--overwrite" in again.err


@pytest.mark.slow
def test_calibrated_methods_beat_rounding_on_the_embedded_model(tmp_path: Path) -> None:
    effort = demo.Effort(samples=16, seq_len=256, max_tokens=4096)
    silent = create_progress(quiet=True)
    comparison = demo.compare(demo.quantize_all(tmp_path, effort, silent, overwrite=False), effort, silent)
    found = {candidate.name: candidate.evaluation for candidate in comparison.candidates}
    divergence = {name: figures.kl_divergence or 0.0 for name, figures in found.items()}
    for bits in (4, 3):
        for method in ("GPTQ", "AWQ"):
            assert 0 < divergence[f"{method} {bits} bit"] < 0.8 * divergence[f"RTN {bits} bit"]
    for figures in found.values():
        assert figures.reference_perplexity is not None
        assert figures.perplexity < 2 * figures.reference_perplexity


def test_demo_passes_an_error_on(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match="nothing"):
        demo.run_lowbit(["inspect", str(tmp_path / "nothing")])


def test_demo_says_when_a_process_was_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.sys, "executable", "/bin/sh")
    monkeypatch.setattr(demo, "LOWBIT", ("-c", "kill -9 $$"))
    with pytest.raises(ResourceError, match="signal 9"):
        demo.run_lowbit(["inspect"])


def test_demo_refuses_a_file(tmp_path: Path, lowbit: Callable[..., Any]) -> None:
    (tmp_path / "file").write_text("")
    done = lowbit("demo", "--out", tmp_path / "file")
    assert done.status == 2
    assert "is a file" in done.err
