"""``lowbit compare``: its table, its files and its complaints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.cli.compare import widths
from lowbit.errors import UsageError


def test_the_verb(tiny_llama: Path, calibration_file: Path, tmp_path: Path, lowbit: Callable[..., Any]) -> None:
    figures = tmp_path / "figures.json"
    done = lowbit(
        "compare", tiny_llama, "--methods", "rtn,nf4,hqq", "--bits", "4,3", "--calibration", calibration_file,
        "--samples", 2, "--seq-len", 64, "--max-tokens", 128, "--report", tmp_path / "report", "--json", figures,
        "--quiet", "--group-size", 32,
    )  # fmt: skip
    assert done.status == 0, done.err
    assert "* " in done.out
    data = json.loads(figures.read_text())
    names = {candidate["name"] for candidate in data["candidates"]}
    assert names == {"RTN 4 bit", "RTN 3 bit", "NF4", "HQQ 4 bit", "HQQ 3 bit"}
    assert set(data["frontier"]) <= names
    assert (tmp_path / "report" / "divergence-by-bits.png").exists()
    assert lowbit("compare", tiny_llama, "--methods", "gptk").status == 2


@pytest.mark.parametrize("text", ["", "4,9", "1", "four", "4;3"])
def test_widths(text: str) -> None:
    with pytest.raises(UsageError, match="2 to 8"):
        widths(text)
    assert widths(" 4, 3,2 ") == [4, 3, 2]
