"""``lowbit estimate`` and ``lowbit recommend`` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
LLAMA = CONFIGS / "llama-3.1-8b.json"


def test_a_table_a_picture_and_advice(lowbit: Callable[..., Any]) -> None:
    done = lowbit("estimate", LLAMA, "--gpus", 1, "--gpu-memory", "24GiB", "--concurrency", 16)
    assert done.status == 0
    for expected in ("8,030,261,248", "0.125 / 1.953 / 15.625 GiB", "int4-g128-sym", "KKKK", "24 GiB of one device"):
        assert expected in done.out
    for expected in ("--max-model-len 8192", "--shm-size", "tensor parallel works", "to quantize it", "to make it fit"):
        assert expected in done.out


def test_json(lowbit: Callable[..., Any], tmp_path: Path) -> None:
    picture = tmp_path / "memory.png"
    done = lowbit("estimate", "demo", "--gpus", 0, "--scheme", "int4", "--json", "--png", picture)
    assert done.status == 0
    found = json.loads(done.out)
    (precision,) = found["precisions"]
    assert precision["exact"] is True
    assert precision["total"] == sum(precision["parts"].values())
    assert picture.exists()


def test_llama_cpp(lowbit: Callable[..., Any]) -> None:
    done = lowbit("estimate", "demo", "--engine", "llama.cpp", "--gpus", 0, "--context", 512, "--kv-dtype", "q8_0")
    assert done.status == 0
    assert "Q4_K_M" in done.out
    assert "-c 512 -np 1" in done.out
    assert "-ctk q8_0" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu-memory", "0GiB"), "--gpu-memory 0GiB: nothing fits in that"),
        (("--context", "4096"), "beyond the model's maximum of 1024: use at most 1024"),
        (("--scheme", "int44"), "did you mean"),
        (("--kv-dtype", "fp88"), "did you mean 'fp8'"),
        (("--context", "0"), "whole number above zero"),
    ],
)
def test_nonsense_is_one_line_and_exit_2(lowbit: Callable[..., Any], arguments: tuple[str, ...], message: str) -> None:
    done = lowbit("estimate", "demo", *arguments)
    assert done.status == 2
    assert message in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_recommend(lowbit: Callable[..., Any]) -> None:
    done = lowbit("recommend", LLAMA, "--gpus", 1, "--memory", "24GiB", "--context", 8192, "--concurrency", 16)
    assert done.status == 0
    for expected in ("precision", "method", "kv cache", "engine", "runner-up", "rule of thumb", "vllm serve"):
        assert expected in done.out
    found = json.loads(lowbit("recommend", "demo", "--gpus", 0, "--json").out)
    assert found["engine"] == "llama.cpp"
    assert found["reasons"]["engine"]


def test_recommend_with_nothing_that_fits(lowbit: Callable[..., Any]) -> None:
    done = lowbit("recommend", LLAMA, "--gpus", 1, "--memory", "4GiB")
    assert done.status == 2
    assert "nothing fits in 4.0 GiB" in done.err
    assert "this would do" in done.err
    assert len(done.err.strip().splitlines()) == 1
