"""Figures for people and JSON for programs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lowbit.cli.output import human_bytes, human_seconds, plain, print_table, write_json


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (5 << 20, "5 MiB"),
        (int(1.5 * 2**30), "1.5 GiB"),
        (2**41, "2 TiB"),
    ],
)
def test_bytes(size: int, text: str) -> None:
    assert human_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (42.4, "42 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@dataclass(frozen=True, slots=True)
class Inner:
    path: Path
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Outer:
    inner: Inner
    values: tuple[float, ...]
    table: dict[str, int]


def test_plain_values() -> None:
    value = Outer(Inner(Path("a/b"), torch.float16), (1.5, float("nan"), float("inf")), {"x": 1})
    assert plain(value) == {
        "inner": {"path": "a/b", "dtype": "torch.float16"},
        "values": [1.5, None, None],
        "table": {"x": 1},
    }


def test_json_to_file_and_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "result.json"
    write_json({"文": 1}, str(target))
    assert json.loads(target.read_text(encoding="utf-8")) == {"文": 1}
    assert capsys.readouterr().out == ""
    write_json({"a": [1]})
    assert json.loads(capsys.readouterr().out) == {"a": [1]}


def test_plain_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("model", "bits"), [("demo", "16.00"), ("a longer name", "4.1")])
    assert capsys.readouterr().out.splitlines() == [
        "model           bits",
        "demo           16.00",
        "a longer name    4.1",
    ]
