"""What --ray says where it cannot work."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lowbit.cli.main import main
from lowbit.errors import UsageError
from lowbit.evaluation.certify import quantize
from lowbit.pipeline.executor import Here


def test_without_ray_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["quantize", "demo", str(tmp_path / "out"), "--ray", "auto"]) == 2
    error = capsys.readouterr().err
    assert error == "lowbit: error: --ray needs Ray: pip install 'lowbit[ray]'\n"
    assert list(tmp_path.iterdir()) == []


def test_gguf_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--ray: a GGUF file is made on this machine"):
        quantize("demo", tmp_path / "out.gguf", executor=Here())
    assert list(tmp_path.iterdir()) == []
