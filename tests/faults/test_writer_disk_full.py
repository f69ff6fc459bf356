"""A full disk is one clear error, leaves the run resumable and OUT untouched."""

from __future__ import annotations

import resource
from functools import partial
from pathlib import Path

import pytest
import writer_run
from writer_run import DONE, FAILED, full_at, in_child, run

from lowbit.checkpoint import PartialCheckpoint, partial_path, write_safetensors
from lowbit.errors import ResourceError


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def new_home(root: Path, name: str) -> Path:
    home = root / name
    home.mkdir()
    (home / "tokenizer.json").write_text("{}")
    return home / "out"


def test_full_at_every_sync(tmp_path: Path) -> None:
    reference = new_home(tmp_path, "reference")
    run(reference)
    moment = 0
    while True:
        moment += 1
        out = new_home(tmp_path, f"full{moment}")
        status = in_child(partial(run, out), full_at(moment))
        if status == DONE:
            break
        assert status == FAILED, moment
        assert not out.exists() or contents(out) == contents(reference), moment
        assert not list(out.parent.rglob("*.tmp")), moment
        assert in_child(partial(run, out, resume=True)) == DONE, moment
        assert contents(out) == contents(reference), moment
    assert moment > 20


@pytest.mark.parametrize("limit", [500, 1200, 1500, 2500])
def test_a_real_limit_on_file_size(tmp_path: Path, limit: int) -> None:
    """RLIMIT_FSIZE cuts writes short in the kernel, as a full disk or a quota does."""
    reference = new_home(tmp_path, "reference")
    run(reference)
    out = new_home(tmp_path, "home")

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    assert in_child(partial(run, out), restrict) == FAILED
    assert not out.exists()
    assert in_child(partial(run, out, resume=True)) == DONE
    assert contents(out) == contents(reference)


def test_the_message_says_what_is_missing_and_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = PartialCheckpoint.create(tmp_path / "out", "f")
    monkeypatch.setattr("lowbit.checkpoint.files.shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with monkeypatch.context() as patched:
        patched.setattr("lowbit.checkpoint.files.os.fsync", _full)
        with pytest.raises(
            ResourceError, match=r"00000\.safetensors: disk full: [\d,]+ bytes missing .*--resume"
        ) as caught:
            checkpoint.commit_part(0, writer_run.part(0), {})
    assert "\n" not in str(caught.value)
    assert checkpoint.journal == []
    checkpoint.commit_part(0, writer_run.part(0), {})
    checkpoint.close()
    assert not list(partial_path(tmp_path / "out").rglob("*.tmp"))


def test_an_older_file_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, writer_run.part(0))
    before = path.read_bytes()
    monkeypatch.setattr("lowbit.checkpoint.files.os.fsync", _full)
    with pytest.raises(ResourceError):
        write_safetensors(path, writer_run.part(1))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def _full(descriptor: int) -> None:
    raise OSError(28, "No space left on device")
