"""The verbs on a tiny model: what they print, and the JSON that they give to programs."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.cli.main import VERBS, build_parser, main
from lowbit.cli.options import FORMATS, METHODS, PRUNERS, TRANSFORMS, parse_bytes
from lowbit.codecs import CODECS
from lowbit.errors import UsageError
from lowbit.quant import METHODS as METHOD_TABLE
from lowbit.quant.sparse import PRUNERS as PRUNER_TABLE
from lowbit.quant.transforms import NO_TRANSFORM
from lowbit.quant.transforms import TRANSFORMS as TRANSFORM_TABLE

SETTINGS = ("--samples", "4", "--seq-len", "64", "--group-size", "64", "--device", "cpu")


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, calibration_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model at 4 bits, with a certificate. Read only."""
    out = tmp_path_factory.mktemp("quantized") / "out"
    arguments = ["quantize", str(tiny_llama), str(out), "--calibration", str(calibration_file), *SETTINGS, "--quiet"]
    assert main([*arguments, "--method", "rtn"]) == 0
    return out


def test_help_names_match_the_registries() -> None:
    assert set(METHODS) == set(METHOD_TABLE)
    assert set(TRANSFORMS) == {*TRANSFORM_TABLE, NO_TRANSFORM}
    assert set(PRUNERS) == set(PRUNER_TABLE)
    assert set(FORMATS) == set(CODECS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb: str, lowbit: Callable[..., Any]) -> None:
    outcome = lowbit(verb, "--help")
    assert outcome.status == 0
    assert "examples:" in outcome.out
    assert f"lowbit {verb}" in outcome.out


@pytest.mark.parametrize("verb", VERBS)
def test_examples_parse(verb: str) -> None:
    """What ``--help`` shows is accepted by the parser; other verbs and programs may stand beside this one."""
    commands = [shlex.split(line, comments=True) for line in VERBS[verb].EXAMPLES.splitlines()]
    shown = [build_parser().parse_args(command[1:]).verb for command in commands if command[0] == "lowbit"]
    assert verb in shown


def test_version(lowbit: Callable[..., Any]) -> None:
    outcome = lowbit("--version")
    assert outcome.status == 0
    assert outcome.out.startswith("lowbit ")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("4g", 4 << 30),
        ("1.5 GiB", 3 << 29),
        ("2GB", 2 * 10**9),
        ("800MiB", 800 << 20),
        ("12", 12),
        ("12B", 12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1G", "4 GiBs", "0"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="4GiB"):
        parse_bytes(text)


def test_quantize_then_eval(
    tiny_llama: Path, calibration_file: Path, tmp_path: Path, lowbit: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    done = lowbit(
        "quantize", tiny_llama, out, "--calibration", calibration_file, *SETTINGS, "--method", "gptq", "--json"
    )
    assert done.status == 0
    result = json.loads(done.out)
    assert result["format"] == "compressed-tensors"
    assert result["scheme"] == "int4-g64-sym"
    assert len(result["modules"]) == 14
    assert result["seconds"] > 0
    assert result["peak_memory_bytes"] > 1 << 20
    assert "held_out" not in result
    assert "[2/2]" in done.err

    figures = tmp_path / "figures.json"
    text = ("--text", calibration_file, "--max-tokens", "512", "--seq-len", "64")
    written = ("--json", figures, "--report", tmp_path / "report", "--quiet")
    done = lowbit("eval", out, "--against", tiny_llama, *text, *written)
    assert done.status == 0
    assert done.err == ""
    assert "perplexity" in done.out
    values = json.loads(figures.read_text())
    for name in ("perplexity", "reference_perplexity", "kl_divergence", "top1_agreement", "tokens", "bits_per_weight"):
        assert math.isfinite(values[name]), name
    assert 0 < values["kl_divergence"] < 1
    assert (tmp_path / "report" / "index.html").stat().st_size > 10_000
    certificate = json.loads((out / "lowbit.json").read_text())["quality"]
    assert certificate["kl_divergence"] == values["kl_divergence"]
    assert "top-1 agreement" in lowbit("inspect", out).out
    assert lowbit("verify", out, "--quiet").status == 0


def test_eval_to_stdout_is_only_json(tiny_llama: Path, calibration_file: Path, lowbit: Callable[..., Any]) -> None:
    done = lowbit(
        "eval", tiny_llama, "--text", calibration_file, "--max-tokens", "200", "--seq-len", "64", "--json", "-"
    )
    assert done.status == 0
    assert json.loads(done.out)["reference"] is None


def test_inspect(quantized: Path, lowbit: Callable[..., Any]) -> None:
    done = lowbit("inspect", quantized)
    assert done.status == 0
    for piece in ("compressed-tensors", "LlamaForCausalLM", "int4-g64-sym × 14", "attention", "rtn"):
        assert piece in done.out
    values = json.loads(lowbit("inspect", quantized, "--json").out)
    assert values["specs"] == {"int4-g64-sym": 14}
    assert values["kinds"]["mlp"]["bits_per_weight"] == pytest.approx(4.25, abs=0.05)


def test_convert_there_and_back(quantized: Path, tmp_path: Path, lowbit: Callable[..., Any]) -> None:
    done = lowbit("convert", quantized, tmp_path / "gptq", "--format", "gptq", "--quiet")
    assert done.status == 0
    assert "same number" in done.out
    done = lowbit(
        "convert", tmp_path / "gptq", tmp_path / "back", "--format", "compressed-tensors", "--quiet", "--json"
    )
    assert json.loads(done.out)["exact"] is True
    assert lowbit("verify", tmp_path / "back", "--quiet").status == 0


def test_verify_finds_a_changed_bit(quantized: Path, tmp_path: Path, lowbit: Callable[..., Any]) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in quantized.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-20] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    done = lowbit("verify", copy, "--quiet")
    assert done.status == 2
    assert "error: model.safetensors: sha256" in done.out
    assert "DAMAGED" in done.out
    values = json.loads(lowbit("verify", copy, "--quiet", "--json").out)
    assert values["ok"] is False
