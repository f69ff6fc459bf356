"""Method best through the pipeline: what is chosen, recorded and gone on with, and what happens without time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowbit.checkpoint import read_manifest
from lowbit.cli.inspect import facts
from lowbit.errors import UsageError
from lowbit.evaluation.inspect import inspect_checkpoint
from lowbit.pipeline.progress import Silent
from lowbit.pipeline.quantize import QuantizeResult, quantize
from lowbit.pipeline.recipe import Recipe, Rule

UNSCALED, SCALED = {"rtn", "gptq", "gptaq"}, {"awq+rtn", "awq", "awq+gptq", "awq+gptaq"}


class _StoppedError(Exception):
    """Ends a run as a kill would."""


class _StoppedAfterOneBlock(Silent):
    def advance(self, name: str, **fields: float | str) -> None:
        raise _StoppedError


def _quantize(source: Path, out: Path, text: Path, **settings: Any) -> QuantizeResult:
    defaults = {"calibration": text, "samples": 16, "seq_len": 64, "group_size": 64, "bits": 3, "method": "best"}
    return quantize(source, out, **(defaults | settings))


def _bytes(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in ("model.safetensors", "lowbit.json", "config.json")}


def test_each_module_has_its_best_and_says_so(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = _quantize(tiny_llama, out, calibration_file)
    manifest = read_manifest(out)
    assert manifest is not None
    for name, record in manifest.modules.items():
        # inputs of o_proj and down_proj have no norm before them, or one that is shared
        assert set(record["candidates"]) in (UNSCALED, UNSCALED | SCALED), name
        same = SCALED if record.get("scaled") else UNSCALED
        assert record["method"] in same
        assert record["candidates"][record["method"]] == min(record["candidates"][other] for other in same)
    assert any(set(record["candidates"]) == UNSCALED | SCALED for record in manifest.modules.values())
    groups = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
    for layer in range(2):
        for group in groups:
            records = [manifest.modules[f"model.layers.{layer}.{name}"] for name in group]
            assert len({record.get("scaled") for record in records}) == 1
    assert not any("time ran out" in note for note in result.notes)
    inspection = inspect_checkpoint(out)
    assert inspection.made["choices"] == {report.name: report.method for report in result.modules}
    assert sum(int(part.split("× ")[1]) for part in facts(inspection)["chosen"].split(", ")) == len(result.modules)


def test_a_run_that_was_killed_goes_on_with_what_it_chose(
    tiny_llama: Path, calibration_file: Path, tmp_path: Path
) -> None:
    _quantize(tiny_llama, tmp_path / "whole", calibration_file)
    with pytest.raises(_StoppedError):
        _quantize(tiny_llama, tmp_path / "out", calibration_file, progress=_StoppedAfterOneBlock())
    journal = [json.loads(line) for line in (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines()]
    assert journal[1]["seconds"] > 0
    assert all(record["candidates"] for record in journal[1]["modules"])
    _quantize(tiny_llama, tmp_path / "out", calibration_file, resume=True)
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def test_without_time_the_cheapest_is_taken(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    """No module stays unquantized, and that candidates were left out is said and recorded."""
    result = _quantize(tiny_llama, tmp_path / "out", calibration_file, budget="0.000001s")
    assert {report.method for report in result.modules} == {"rtn"}
    assert any(f"{len(result.modules)} modules were solved with fewer candidates" in note for note in result.notes)
    assert all(set(report.left_out or ()) >= UNSCALED - {"rtn"} for report in result.modules)
    _quantize(tiny_llama, tmp_path / "rtn", calibration_file, method="rtn", recipe=Recipe(rules=()))
    names = [name for name in load_file(tmp_path / "rtn" / "model.safetensors") if "weight_packed" in name]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "rtn"))
    assert names
    assert set(one) == set(other)


def test_a_rule_may_ask_for_it_and_experts_have_it(
    checkpoint_of: Callable[[str], Path], calibration_file: Path, tmp_path: Path
) -> None:
    """Inside experts the two models may route a token differently: GPTAQ would be GPTQ there, and is not tried."""
    rules = (Rule(".*experts.*", method="best"),)
    recipe = Recipe(method="gptq", budget="10m", rules=rules)
    result = _quantize(checkpoint_of("qwen3_moe"), tmp_path / "out", calibration_file, recipe=recipe, method=None)
    for report in result.modules:
        chosen = None if report.candidates is None else set(report.candidates)
        if ".experts." not in report.name:
            assert (chosen, report.method) == (None, "gptq")
        elif not report.starved:
            assert chosen is not None
            assert chosen >= {"rtn", "gptq"}
            assert not chosen & {"gptaq", "awq+gptaq"}
            assert torch.isfinite(torch.tensor(list((report.candidates or {}).values()))).all()


def test_a_budget_that_nothing_uses_is_refused(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    for method, budget, said in (("gptq", "30m", "only method best"), ("best", "soon", "is not a time")):
        with pytest.raises(UsageError, match=said):
            _quantize(tiny_llama, tmp_path / "out", calibration_file, method=method, budget=budget)
    assert not (tmp_path / "out.partial").exists()
