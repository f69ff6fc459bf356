"""Bad input: each gives one clear line and exit status 2, without a traceback, and nothing is written."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SETTINGS = ("--quiet", "--samples", "4", "--seq-len", "32", "--group-size", "64", "--device", "cpu")


@pytest.fixture
def source(tiny_llama: Path, tmp_path: Path) -> Path:
    """A sharded copy of the tiny model, to be damaged."""
    path = tmp_path / "source"
    shutil.copytree(tiny_llama, path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    for shard, half in zip(SHARDS, halves, strict=True):
        save_file({name: tensors[name] for name in half}, path / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, half in zip(SHARDS, halves, strict=True) for name in half}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def missing_shard(path: Path) -> None:
    (path / SHARDS[1]).unlink()


def truncated_shard(path: Path) -> None:
    os.truncate(path / SHARDS[1], (path / SHARDS[1]).stat().st_size - 100)


def corrupt_header(path: Path) -> None:
    file = path / SHARDS[0]
    data = bytearray(file.read_bytes())
    data[8:12] = b"\xff\xfe{{"
    file.write_bytes(data)


def gigantic_header(path: Path) -> None:
    file = path / SHARDS[0]
    file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])


def absent_tensor(path: Path) -> None:
    edit_json(
        path / "model.safetensors.index.json",
        lambda index: index["weight_map"].update({"model.layers.7.mlp.up_proj.weight": SHARDS[0]}),
    )


def unknown_architecture(path: Path) -> None:
    edit_json(
        path / "config.json", lambda c: c.update(model_type="frobnicator", architectures=["FrobnicatorForCausalLM"])
    )


def nan_weights(path: Path) -> None:
    file = path / SHARDS[1]
    tensors = load_file(file)
    name = next(name for name in tensors if tensors[name].dim() == 2)
    tensors[name][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


def no_tokenizer(path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).unlink(missing_ok=True)


def broken_config(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "llama",')


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def pickle_only(path: Path) -> None:
    for name in (*SHARDS, "model.safetensors.index.json"):
        (path / name).unlink()
    torch.save({"x": torch.zeros(1)}, path / "pytorch_model.bin")


DAMAGE: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "missing shard": (missing_shard, [SHARDS[1]]),
    "truncated shard": (truncated_shard, [SHARDS[1]]),
    "corrupt header": (corrupt_header, [SHARDS[0], "header"]),
    "gigantic header": (gigantic_header, [SHARDS[0], "header"]),
    "absent tensor": (absent_tensor, ["model.layers.7.mlp.up_proj.weight"]),
    "unknown architecture": (unknown_architecture, ["frobnicator"]),
    "NaN weights": (nan_weights, [SHARDS[1], "finite"]),
    "no tokenizer": (no_tokenizer, ["tokenizer"]),
    "broken config": (broken_config, ["config.json"]),
    "no config": (no_config, ["config.json"]),
    "pickle only": (pickle_only, ["--allow-pickle"]),
}


def assert_refused(outcome: Any, expected: list[str]) -> None:
    assert outcome.status == 2
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("lowbit: error: ")
    for piece in expected:
        assert piece in lines[0]
    assert outcome.out == ""


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_source(
    name: str, source: Path, calibration_file: Path, tmp_path: Path, lowbit: Callable[..., Any]
) -> None:
    damage, expected = DAMAGE[name]
    damage(source)
    before = sorted(path.name for path in tmp_path.iterdir())
    outcome = lowbit("quantize", source, tmp_path / "out", "--calibration", calibration_file, *SETTINGS)
    assert_refused(outcome, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--bits", "9"), ["bits", "9", "8"]),
        (("--bits", "1"), ["bits", "1"]),
        (("--group-size", "100"), ["model.layers.0", "100", "use group size 128"]),
        (("--group-size", "-7"), ["group", "-7"]),
        (("--format", "awq", "--bits", "3"), ["AWQ", "not 3", "use 4 bits"]),
        (("--format", "gptq", "--asym"), ["GPTQ", "use --sym"]),
        (("--scheme", "W4A17"), ["W4A17", "W4A16"]),
        (("--skip", "("), ["("]),
        (("--target", "frobnicator==1"), ["frobnicator"]),
        (("--recipe", "no-such-recipe.yaml"), ["no-such-recipe.yaml"]),
        (("--method", "gtpq"), ["gtpq", "gptq"]),
        (("--memory", "4 bananas"), ["4 bananas", "4GiB"]),
        (("--samples", "0"), ["--samples"]),
        (("--calibration", "no-such-file.txt"), ["no-such-file.txt"]),
        (("--sym", "--asym"), ["--asym"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_settings_that_cannot_work(
    arguments: tuple[str, ...],
    expected: list[str],
    tiny_llama: Path,
    calibration_file: Path,
    tmp_path: Path,
    lowbit: Callable[..., Any],
) -> None:
    out = tmp_path / "out"
    outcome = lowbit("quantize", tiny_llama, out, "--calibration", calibration_file, *SETTINGS, *arguments)
    assert_refused(outcome, expected)
    assert list(tmp_path.iterdir()) == []


def test_unknown_recipe_key(tiny_llama: Path, tmp_path: Path, lowbit: Callable[..., Any]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("bits: 4\ngroupsize: 64\n")
    outcome = lowbit("quantize", tiny_llama, tmp_path / "out", "--recipe", recipe, "--quiet")
    assert_refused(outcome, ["recipe.yaml", "groupsize", "group_size"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "expected"), [("", "empty"), ("  \n\n ", "empty"), ("def f(): pass", "short")])
def test_calibration_without_text(
    text: str, expected: str, tiny_llama: Path, tmp_path: Path, lowbit: Callable[..., Any]
) -> None:
    file = tmp_path / "calibration.txt"
    file.write_text(text)
    outcome = lowbit("quantize", tiny_llama, tmp_path / "out", "--calibration", file, *SETTINGS)
    assert_refused(outcome, ["calibration.txt", expected])
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.txt"]


def test_output_directory_not_empty(
    tiny_llama: Path, calibration_file: Path, tmp_path: Path, lowbit: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    outcome = lowbit("quantize", tiny_llama, out, "--calibration", calibration_file, *SETTINGS)
    assert_refused(outcome, [str(out), "--overwrite"])
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("verb", ["quantize", "convert", "eval", "inspect", "verify"])
def test_source_that_is_not_there(verb: str, tmp_path: Path, lowbit: Callable[..., Any]) -> None:
    more = {"quantize": (tmp_path / "out",), "convert": (tmp_path / "out", "--format", "dense")}.get(verb, ())
    outcome = lowbit(verb, tmp_path / "nothing", *more)
    assert_refused(outcome, ["nothing"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["missing shard", "truncated shard", "corrupt header", "absent tensor"])
@pytest.mark.parametrize("verb", ["eval", "convert"])
def test_other_verbs_refuse_damage(
    verb: str, name: str, source: Path, calibration_file: Path, tmp_path: Path, lowbit: Callable[..., Any]
) -> None:
    damage, expected = DAMAGE[name]
    damage(source)
    more = {"eval": ("--text", calibration_file), "convert": (tmp_path / "out", "--format", "dense")}[verb]
    assert_refused(lowbit(verb, source, *more, "--quiet"), expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["missing shard", "truncated shard", "corrupt header", "absent tensor"])
@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_looking_verbs_report_damage(verb: str, name: str, source: Path, lowbit: Callable[..., Any]) -> None:
    damage, expected = DAMAGE[name]
    damage(source)
    quiet = ("--quiet",) if verb == "verify" else ()
    outcome = lowbit(verb, source, *quiet)
    assert outcome.status == 2
    errors = [line for line in outcome.out.splitlines() if line.startswith("error: ")]
    assert any(all(piece in line for piece in expected) for line in errors)
    assert outcome.err == ""


def test_dense_cannot_be_converted_to_a_quantized_format(
    tiny_llama: Path, tmp_path: Path, lowbit: Callable[..., Any]
) -> None:
    outcome = lowbit("convert", tiny_llama, tmp_path / "out", "--format", "gptq", "--quiet")
    assert_refused(outcome, ["lowbit quantize"])
    assert not (tmp_path / "out").exists()


def test_eval_needs_a_text(tiny_llama: Path, lowbit: Callable[..., Any]) -> None:
    assert_refused(lowbit("eval", tiny_llama, "--quiet"), ["--text"])


def test_eval_against_another_vocabulary(
    tiny_llama: Path,
    calibration_file: Path,
    tmp_path: Path,
    new_checkpoint: Callable[..., Path],
    lowbit: Callable[..., Any],
) -> None:
    other = new_checkpoint(tmp_path / "other", "llama", vocab_size=512)
    outcome = lowbit("eval", other, "--against", tiny_llama, "--text", calibration_file, "--quiet")
    assert_refused(outcome, ["--against", "512"])


def quantize_command(source: Path, out: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "lowbit", "quantize", str(source), str(out)]
    return [*command, "--method", "rtn", "--bits", "8", *SETTINGS, *more]


@pytest.mark.slow
def test_disk_full_midway_can_be_resumed(tiny_llama: Path, tmp_path: Path) -> None:
    """A limit on the size of files stops the run when it assembles the checkpoint from its finished parts."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    out = tmp_path / "out"
    done = subprocess.run(
        quantize_command(tiny_llama, out), capture_output=True, text=True, check=False, preexec_fn=limit
    )
    assert done.returncode == 2
    assert done.stderr.startswith("lowbit: error: ")
    assert len(done.stderr.splitlines()) == 1
    assert "--resume" in done.stderr
    assert not out.exists()
    subprocess.run(quantize_command(tiny_llama, out, "--resume"), capture_output=True, check=True)
    subprocess.run(quantize_command(tiny_llama, tmp_path / "whole"), capture_output=True, check=True)
    files = sorted(path.name for path in out.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "whole").iterdir())
    for name in files:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not (tmp_path / "out.partial").exists()


def test_other_os_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, lowbit: Callable[..., Any]
) -> None:
    def fail(*arguments: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/file")

    monkeypatch.setattr("lowbit.evaluation.inspect.inspect_checkpoint", fail)
    assert_refused(lowbit("inspect", tiny_llama), ["/some/file", "No space left"])


def test_interrupt_hints_at_resume(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path, lowbit: Callable[..., Any]
) -> None:
    def interrupt(*arguments: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lowbit.evaluation.certify.quantize", interrupt)
    outcome = lowbit("quantize", tiny_llama, tmp_path / "out")
    assert outcome.status == 130
    assert "--resume" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "expected"), [((), "VERB"), (("frobnicate",), "frobnicate"), (("eval",), "MODEL")]
)
def test_incomplete_commands(arguments: tuple[str, ...], expected: str, lowbit: Callable[..., Any]) -> None:
    assert_refused(lowbit(*arguments), [expected, "--help"])
