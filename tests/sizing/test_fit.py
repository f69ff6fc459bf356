"""Fitting a tiny model to a budget: the budget holds, the measurement serves twice, bad budgets are said."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import lowbit
from lowbit.checkpoint import hash_file, open_checkpoint
from lowbit.cli.main import main
from lowbit.codecs import module_plan, open_model
from lowbit.errors import CheckpointError, ResourceError, UsageError
from lowbit.pipeline.fit import Fit, Measurement, choose, measure
from lowbit.pipeline.fit_candidates import split_choice
from lowbit.pipeline.progress import Silent
from lowbit.sizing.fit import curve, fit

CANDIDATES = ("int3-g64-sym", "int4-g64-sym", "int6-g64-sym", "int8-g64-sym")


@pytest.fixture(scope="module")
def measurement(tiny_llama: Path, calibration_file: Path) -> Measurement:
    return measure(tiny_llama, candidates=CANDIDATES, calibration=calibration_file, samples=8, seq_len=32)


def test_budgets_hold_and_more_room_is_never_worse(measurement: Measurement) -> None:
    divergences = []
    for bits in (3.3, 4.0, 5.0, 6.5):
        found = choose(measurement, bits_per_weight=bits)
        assert 0.97 * bits < found.bits_per_weight <= bits
        divergences.append(found.divergence)
    assert divergences == sorted(divergences, reverse=True)
    assert [one.divergence for one in curve(measurement)] == sorted(
        (one.divergence for one in curve(measurement)), reverse=True
    )


def test_fused_shards_agree(measurement: Measurement) -> None:
    choices = choose(measurement, bits_per_weight=4.6).choices
    for block in range(2):
        prefix = f"model.layers.{block}"
        assert len({choices[f"{prefix}.self_attn.{n}_proj"] for n in "qkv"}) == 1
        assert len({choices[f"{prefix}.mlp.{n}_proj"] for n in ("gate", "up")}) == 1


def test_too_small_a_budget_says_by_how_much(measurement: Measurement) -> None:
    with pytest.raises(ResourceError, match=r"2.5 is below the smallest choice, 3\.\d+.*int3-g64-sym"):
        choose(measurement, bits_per_weight=2.5)
    with pytest.raises(ResourceError, match=r"MiB too large: give at least \d+KiB.*int3-g64-sym") as found:
        choose(measurement, total_bytes=1000)
    # What is advised does fit, and no less.
    enough = int(str(found.value).partition("at least ")[2].partition("KiB")[0]) * 1024
    fitting = choose(measurement, total_bytes=enough).choices.values()
    assert {split_choice(choice)[0] for choice in fitting} == {"int3-g64-sym"}
    with pytest.raises(ResourceError):
        choose(measurement, total_bytes=enough - 2048)
    with pytest.raises(UsageError):
        choose(measurement)


def test_saved_and_read_back(measurement: Measurement, tmp_path: Path) -> None:
    measurement.save(tmp_path / "m.json")
    assert Measurement.load(tmp_path / "m.json") == measurement
    (tmp_path / "bad.json").write_text(json.dumps({"kind": "something else"}))
    with pytest.raises(CheckpointError, match=r"bad\.json"):
        Measurement.load(tmp_path / "bad.json")


class _Interrupting(Silent):
    """Ends the run after so many units."""

    def __init__(self, units: int) -> None:
        self.left = units

    def advance(self, module: str, **fields: float | str) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_writes_what_was_chosen(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "candidates": CANDIDATES, "calibration": calibration_file, "samples": 8, "seq_len": 32,
        "measurements": tmp_path / "m.json",
    }  # fmt: skip
    found = fit(tiny_llama, tmp_path / "out", bits_per_weight=4.5, report=tmp_path / "report", **settings)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        stored = {module: str(entry.spec) for module, entry in module_plan(checkpoint).items()}
    chosen = {module: split_choice(choice)[0] for module, choice in found.fit.choices.items() if choice != "dense"}
    assert stored == chosen
    assert found.result.linear_bits_per_weight == pytest.approx(found.fit.bits_per_weight, abs=0.02)
    assert [path.name for path in found.plots] == ["fit-pareto.png", "fit-bits.png"]
    # A size on disk, from the same measurement.
    again = fit(tiny_llama, tmp_path / "sized", size=found.fit.bytes, **settings)
    assert again.result.size_bytes <= found.fit.bytes
    # Fewer candidates of it, but none that it lacks, and no other methods.
    few = fit(tiny_llama, tmp_path / "few", bits_per_weight=5, **settings | {"candidates": CANDIDATES[1:3]})
    assert {split_choice(choice)[0] for choice in few.fit.choices.values()} <= {*CANDIDATES[1:3], "dense"}
    with pytest.raises(UsageError, match="int5-g64-sym is not among those measured"):
        fit(tiny_llama, tmp_path / "no", bits_per_weight=5, **settings | {"candidates": ["int5-g64-sym"]})
    with pytest.raises(UsageError, match=r"measured for compressed-tensors by gptq, awq\+gptq: name another file"):
        fit(tiny_llama, tmp_path / "no", bits_per_weight=5, methods=["rtn"], **settings)
    (tmp_path / "other.txt").write_text("another text altogether " * 400)
    with pytest.raises(UsageError, match=r"was made on calibration.txt with seed 42, not on .*other.txt"):
        fit(tiny_llama, tmp_path / "no", bits_per_weight=5, **settings | {"calibration": tmp_path / "other.txt"})
    # A measurement that was interrupted goes on, and comes to the same; one of other candidates begins anew.
    fresh = settings | {"measurements": tmp_path / "fresh.json", "bits_per_weight": 5}
    for blocks, candidates in ((3, CANDIDATES), (3, CANDIDATES), (4, CANDIDATES[1:])):
        with pytest.raises(KeyboardInterrupt):
            fit(tiny_llama, tmp_path / "no", **fresh | {"candidates": candidates}, progress=_Interrupting(blocks))
        assert (tmp_path / "fresh.json.partial" / "journal.jsonl").read_text().count("block") == blocks - 2
    found = fit(tiny_llama, tmp_path / "fresh", **fresh | {"candidates": CANDIDATES[1:]})
    assert found.measurement == measure(tiny_llama, candidates=CANDIDATES[1:], calibration=calibration_file)
    assert not (tmp_path / "fresh.json.partial").exists()
    # A run that was interrupted while it quantized ends as one that was not.
    whole = hash_file(tmp_path / "few" / "model.safetensors")
    interrupted: dict[str, Any] = {**settings, "candidates": CANDIDATES[1:3], "bits_per_weight": 5}
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_llama, tmp_path / "again", **interrupted, progress=_Interrupting(1))
    assert not (tmp_path / "again").exists()
    fit(tiny_llama, tmp_path / "again", **interrupted, resume=True)
    assert hash_file(tmp_path / "again" / "model.safetensors") == whole
    with pytest.raises(UsageError, match="--resume has no meaning for a GGUF file"):
        fit(tiny_llama, tmp_path / "no.gguf", bits_per_weight=5, resume=True)
    with pytest.raises(UsageError, match="whose weights are not"):
        fit("demo", tmp_path / "other", bits_per_weight=4.5, measurements=tmp_path / "m.json")


def test_methods_are_chosen_module_by_module(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    """What the recipe says of methods is what the manifest records, and both of a forced mixture of them."""
    data: dict[str, Any] = {"calibration": calibration_file, "samples": 8, "seq_len": 32}
    found = measure(tiny_llama, candidates=["int4-g64-sym", "int8-g64-sym"], methods=["awq+gptq", "rtn"], **data)
    # From 8 bits on one method stands for all.
    assert found.candidates == ("int4-g64-sym by awq+gptq", "int4-g64-sym by rtn", "int8-g64-sym by awq+gptq", "dense")
    names = [*found.candidates]
    choices = {m: names[i % 4] for i, group in enumerate(found.groups) for m in group.modules}
    recipe = Fit(choices, 0, 0.0, 4.5).recipe(found)
    result = lowbit.quantize(tiny_llama, tmp_path / "out", recipe=recipe, **data)
    # Scaling goes into a norm, or into the rows of another linear that is no wider.
    made = {m.name: f"{m.spec} by {'awq+' if m.scaled else ''}{m.method}" for m in result.modules}
    assert made == {module: choice for module, choice in choices.items() if choice != "dense"}


def test_memory_decides_bits_and_cache_and_is_measured_once(tmp_path: Path) -> None:
    """The cache's divergences join the measurement in its file; a budget that 16 bits do not fit takes fewer."""
    settings: dict[str, Any] = {
        "candidates": ("Q3_K", "Q6_K"), "samples": 4, "seq_len": 64, "certify_tokens": 0, "context": 1024,
        "concurrency": 16, "gpus": 0, "measurements": tmp_path / "m.json",
    }  # fmt: skip
    found = fit("demo", tmp_path / "small.gguf", memory=74 << 20, **settings)
    assert found.serving is not None
    assert found.serving.kv_dtype == "q8_0"
    caches = Measurement.load(tmp_path / "m.json").caches
    assert 0 < caches["q8_0"] < caches["q4_0"] < 0.1
    assert found.serving.kv_divergence == caches["q8_0"]
    assert found.result.size_bytes <= found.fit.bytes
    modified = (tmp_path / "m.json").stat().st_mtime_ns
    large = fit("demo", tmp_path / "large.gguf", memory=200 << 20, **settings)
    assert large.serving is not None
    assert large.serving.kv_dtype == "float16"
    assert set(large.fit.choices.values()) == {"F16"} or large.fit.bytes > found.fit.bytes
    assert (tmp_path / "m.json").stat().st_mtime_ns == modified


def test_everything_dense_is_refused(measurement: Measurement) -> None:
    whole = choose(measurement, bits_per_weight=32)
    with pytest.raises(UsageError, match="nothing to quantize"):
        Fit(dict.fromkeys(whole.choices, "dense"), 0, 0.0, 32).recipe(measurement)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--size, --bits-per-weight or --memory"),
        (["--memory", "1MiB"], "MiB more than the 0.92 MiB that may be used"),
        (["--bits-per-weight", "4.5", "--kv-dtype", "fp8"], "belong to --memory"),
        (["--memory", "4GiB", "--gpus", "-1"], "--gpus -1: must be at least 0"),
        (["--memory", "4GiB", "--size", "1GiB"], "one budget"),
        (["--memory", "4GiB", "--context", "999999"], "999,?999"),
        (["--bits-per-weight", "0"], "--bits-per-weight 0"),
        (["--bits-per-weight", "nan"], "--bits-per-weight nan"),
        (["--bits-per-weight", "4.5", "--candidates", ","], "--candidates: names no number format"),
        (["--bits-per-weight", "4.5", "--format", "gguuf"], "did you mean|use one of"),
        (["--bits-per-weight", "4.5", "--method", "gptw"], "cannot measure method 'gptw': did you mean"),
        (["--bits-per-weight", "4.5", "--methods", "gptq,gptaq"], "gptaq mends what other modules lose.*alone"),
        (["--bits-per-weight", "4.5", "--methods", ","], "--methods: names no method"),
        (
            ["--bits-per-weight", "4.5", "--methods", "hqq"],
            "int4-g128-sym: hqq: it solves for zero points",
        ),
        (["--bits-per-weight", "4.5", "--candidates", "int4-x"], "unknown number format"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], message: str, tiny_llama: Path, calibration_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    common = ["fit", str(tiny_llama), str(tmp_path / "out"), "--calibration", str(calibration_file), "--quiet"]
    assert main([*common, "--samples", "4", "--seq-len", "32", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("lowbit: error: ")
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err), captured.err
    assert not (tmp_path / "out").exists()


def test_gguf_file_of_a_given_size(tmp_path: Path) -> None:
    """Every tensor has the type that was chosen, embedding and head among them."""
    settings: dict[str, Any] = {"samples": 4, "seq_len": 64, "certify_tokens": 0}
    candidates = ("Q2_K", "Q4_K", "Q6_K")
    found = fit("demo", tmp_path / "out.gguf", bits_per_weight=4.2, candidates=candidates, **settings)
    with open_model(tmp_path / "out.gguf") as checkpoint:
        stored = {module: str(entry.spec) for module, entry in module_plan(checkpoint).items()}
    assert stored == dict(found.fit.choices)
    assert "model.embed_tokens" in stored
    assert len(set(stored.values())) > 1
    assert found.result.linear_bits_per_weight == pytest.approx(found.fit.bits_per_weight)
    assert found.result.size_bytes <= found.fit.bytes < 1.01 * found.result.size_bytes
    with pytest.raises(UsageError, match="unknown GGUF type 'Q9_K'"):
        fit("demo", tmp_path / "no.gguf", bits_per_weight=4.2, candidates=("Q9_K",), **settings)
    with pytest.raises(UsageError, match="--methods has no meaning for a GGUF file"):
        fit("demo", tmp_path / "no.gguf", bits_per_weight=4.2, methods=["rtn"], **settings)
