"""A run killed at any instant leaves no half-written checkpoint, and ends byte-identical when resumed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import writer_run
from writer_run import DONE, KILLED, in_child, kill_at, run

from lowbit.checkpoint import open_checkpoint, partial_path
from lowbit.errors import UsageError


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def new_home(root: Path, name: str) -> Path:
    home = root / name
    home.mkdir()
    (home / "tokenizer.json").write_text("{}")
    return home / "out"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = new_home(tmp_path_factory.mktemp("expected"), "home")
    run(out)
    assert not partial_path(out).exists()
    return contents(out)


def test_an_uninterrupted_run_is_a_checkpoint(tmp_path: Path) -> None:
    out = new_home(tmp_path, "home")
    run(out)
    checkpoint = open_checkpoint(out)
    assert len(checkpoint.files) > 1
    assert {path.name for path in out.iterdir()} >= {
        "config.json",
        "lowbit.json",
        "tokenizer.json",
        "quantize_config.json",
    }
    for index in range(writer_run.PARTS):
        for name, tensor in writer_run.part(index).items():
            assert torch.equal(checkpoint.read(name), tensor)


@pytest.mark.slow
def test_killed_at_every_file_operation(tmp_path: Path, expected: dict[str, bytes]) -> None:
    moment = 0
    while True:
        moment += 1
        out = new_home(tmp_path, f"kill{moment}")
        status = in_child(partial(run, out), kill_at(moment, out.parent))
        if out.exists():
            assert contents(out) == expected, moment
        if status == DONE:
            break
        assert status == KILLED, moment
        assert in_child(partial(run, out, resume=True)) == DONE, moment
        assert contents(out) == expected, moment
        assert not partial_path(out).exists(), moment
    assert moment > 80


def test_killed_again_and_again(tmp_path: Path, expected: dict[str, bytes]) -> None:
    """Each attempt dies a few operations further on than it takes to get going; the run still ends."""
    out = new_home(tmp_path, "home")
    status, attempts = in_child(partial(run, out), kill_at(20, out.parent)), 1
    while status == KILLED:
        attempts += 1
        status = in_child(partial(run, out, resume=True), kill_at(20 + attempts, out.parent))
        assert attempts < 200
    assert status == DONE
    assert attempts > 3
    assert contents(out) == expected


def test_overwriting_never_loses_both(tmp_path: Path, expected: dict[str, bytes]) -> None:
    """While OUT is being replaced there is, at OUT or one rename away, the old checkpoint or the complete new one."""
    moment = 0
    while True:
        moment += 3
        out = new_home(tmp_path, f"over{moment}")
        out.mkdir()
        (out / "config.json").write_text("old")
        status = in_child(partial(run, out, overwrite=True), kill_at(moment, out.parent))
        old, new = {"config.json": b"old"}, expected
        if out.exists():
            assert contents(out) in (old, new), moment
        else:
            assert contents(partial_path(out) / "replaced") == old, moment
            assert contents(partial_path(out) / "final") == new, moment
        if status == DONE:
            break
        if not (partial_path(out) / "run.json").exists() and contents(out) == old:
            with pytest.raises(UsageError, match="--overwrite"):
                run(out, resume=True)
            continue
        assert in_child(partial(run, out, resume=True)) == DONE, moment
        assert contents(out) == new, moment
        assert not partial_path(out).exists(), moment
    assert moment > 60


@pytest.mark.slow
def test_killed_from_outside_at_random_times(tmp_path: Path) -> None:
    reference = new_home(tmp_path, "reference")
    run(reference, size=60_000, max_shard_bytes=400_000)
    out = new_home(tmp_path, "home")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(writer_run.__file__)), str(out)]
    generator = random.Random(7)
    for _ in range(3):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        while process.poll() is None and not partial_path(out).exists():
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            assert contents(out) == contents(reference)
    subprocess.run(command, env=environment, check=True)
    assert contents(out) == contents(reference)
    assert not partial_path(out).exists()
