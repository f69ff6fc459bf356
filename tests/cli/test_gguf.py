"""GGUF files on the command line: quantize, convert and imatrix, and one line for what cannot work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TEXT = ("--samples", "4", "--seq-len", "64")


def test_from_importance_to_a_certified_file(
    tiny_llama: Path, calibration_file: Path, tmp_path: Path, lowbit: Callable[..., Any]
) -> None:
    data = ("--calibration", calibration_file, *TEXT, "--quiet")
    matrix, out = tmp_path / "m.imatrix.gguf", tmp_path / "m.gguf"
    done = lowbit("imatrix", tiny_llama, matrix, *data, "--json")
    assert done.status == 0
    assert json.loads(done.out)["tensors"] == 14
    done = lowbit("quantize", tiny_llama, out, "--scheme", "Q4_0", "--imatrix", matrix, *data, "--json")
    assert done.status == 0
    result = json.loads(done.out)
    assert (result["format"], result["scheme"], result["out"]) == ("gguf", "Q4_0", str(out))
    assert 0 < result["quality"]["kl_divergence"] < 1
    assert lowbit("verify", out, "--quiet").status == 0
    text = ("--text", calibration_file, "--max-tokens", "256", "--seq-len", "64", "--quiet")
    done = lowbit("eval", out, "--against", tiny_llama, *text)
    assert done.status == 0
    assert f"certificate: {tmp_path / 'm.lowbit.json'}" in done.out


def test_conversion_there_and_back(tiny_llama: Path, tmp_path: Path, lowbit: Callable[..., Any]) -> None:
    done = lowbit("convert", tiny_llama, tmp_path / "m.gguf", "--dtype", "q8_0", "--quiet")
    assert done.status == 0
    assert "15 tensors are rounded to Q8_0" in done.out
    done = lowbit("convert", tmp_path / "m.gguf", tmp_path / "dense", "--format", "dense", "--quiet")
    assert done.status == 0
    assert (tmp_path / "dense" / "config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "{source}", "{out}.gguf", "--scheme", "IQ2_XS"), "--imatrix auto"),
        (("quantize", "{source}", "{out}.gguf", "--scheme", "Q4_KM"), "did you mean 'Q4_K_M'"),
        (("quantize", "{source}", "{out}", "--scheme", "Q4_K_M"), "name it out.gguf"),
        (("quantize", "{source}", "{out}.gguf", "--method", "gptq"), "--method has no meaning"),
        (("quantize", "{source}", "{out}.gguf", "--asym"), "--sym/--asym has no meaning"),
        (("quantize", "{source}", "{out}.gguf", "--resume"), "--resume has no meaning"),
        (("quantize", "{source}", "{out}.gguf", "--format", "awq"), "--format has no meaning"),
        (("quantize", "{source}", "{out}.gguf", "--type", "ffn_(=Q4_K"), "no regular expression"),
        (("quantize", "{source}", "{out}.gguf", "--split-size", "12"), "too many files"),
        (("quantize", "{source}", "{out}", "--type", "ffn_down=Q4_K"), "--type is for GGUF files"),
        (("quantize", "{source}", "{out}.gguf", "--imatrix", "{out}.dat"), "no such file"),
        (("convert", "{source}", "{out}"), "which --format"),
        (("convert", "{source}", "{out}.gguf", "--format", "gptq"), "makes a directory"),
        (("convert", "{source}", "{out}", "--format", "dense", "--dtype", "q8_0"), "unknown dtype"),
        (("imatrix", "{source}", "{source}"), "is a directory"),
    ],
)
def test_what_cannot_work(
    tiny_llama: Path, tmp_path: Path, lowbit: Callable[..., Any], arguments: tuple[str, ...], message: str
) -> None:
    done = lowbit(*(argument.format(source=tiny_llama, out=tmp_path / "out") for argument in arguments), "--quiet")
    assert done.status == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
