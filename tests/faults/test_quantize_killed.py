"""A quantization killed outright goes on with --resume and ends with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def _command(source: Path, out: Path, text: Path, *extra: str) -> list[str]:
    settings = ["--calibration", str(text), "--samples", "8", "--seq-len", "64", "--group-size", "64"]
    settings += ["--certify-tokens", "0", *extra]
    return [sys.executable, "-m", "lowbit", "quantize", str(source), str(out), *settings]


def _steps(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def _kill_after(command: list[str], out: Path, steps: int) -> None:
    """Run ``command`` and SIGKILL it as soon as the journal has ``steps`` lines."""
    journal = out.with_name(out.name + ".partial") / "journal.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while _steps(journal) < steps and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"


def _contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_killed_and_resumed_is_byte_identical(
    new_checkpoint: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    source = new_checkpoint(tmp_path / "source", num_hidden_layers=6)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(_command(source, whole, calibration_file), check=True, capture_output=True)
    _kill_after(_command(source, killed, calibration_file), killed, 2)
    assert not killed.exists(), "nothing half-written may look like a checkpoint"
    _kill_after(_command(source, killed, calibration_file, "--resume"), killed, 5)
    refused = subprocess.run(_command(source, killed, calibration_file), capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    subprocess.run(_command(source, killed, calibration_file, "--resume"), check=True, capture_output=True)
    assert _contents(whole) == _contents(killed)
    assert not killed.with_name("killed.partial").exists()
