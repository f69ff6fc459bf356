"""Hashes that are remembered: true whatever happens to the file or to the memory of it."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lowbit.checkpoint import known_hashes, source_hashes
from lowbit.errors import CheckpointError


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file worth remembering, changed long ago as far as the module can tell."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known_hashes, "_WORTH", 1000)
    monkeypatch.setattr(known_hashes, "_SETTLED", -(10**9))
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(5000))
    return path


def looked_up(path: Path) -> tuple[str, int]:
    """The hash, and how many bytes were read for it."""
    read: list[int] = []
    found = source_hashes([path], read.append)
    assert list(found) == [path.name]
    return found[path.name], sum(read)


def test_a_file_is_read_once(source: Path) -> None:
    true = hashlib.sha256(source.read_bytes()).hexdigest()
    assert looked_up(source) == (true, 5000)
    assert looked_up(source) == (true, 0)


def rewrite(path: Path) -> None:
    path.write_bytes(os.urandom(5000))


def rewrite_behind_its_back(path: Path) -> None:
    """Same size, and the time of its last change set back."""
    before = path.stat()
    path.write_bytes(os.urandom(5000))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace(path: Path) -> None:
    """Another file of the same size and time under its name."""
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(os.urandom(5000))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


@pytest.mark.parametrize("change", [rewrite, rewrite_behind_its_back, replace, append])
def test_a_changed_file_is_read_again(source: Path, change: Callable[[Path], None]) -> None:
    looked_up(source)
    time.sleep(0.05)  # lets the clock of the file system go on
    change(source)
    assert looked_up(source) == (hashlib.sha256(source.read_bytes()).hexdigest(), source.stat().st_size)


def test_a_file_that_was_just_written_is_not_trusted(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_hashes, "_SETTLED", 2 * 10**9)
    assert looked_up(source)[1] == looked_up(source)[1] == 5000


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"stamp": 3}', b"\xff\xfe", b'{"sha256": "0"}'])
def test_a_damaged_memory_is_made_anew(source: Path, tmp_path: Path, content: bytes) -> None:
    true, _ = looked_up(source)
    (entry,) = (tmp_path / "cache" / "sha256").iterdir()
    entry.write_bytes(content)
    assert looked_up(source) == (true, 5000)
    assert looked_up(source) == (true, 0)


def test_without_a_place_to_remember(source: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    (tmp_path / "cache").write_text("a file where the directory would be")
    assert looked_up(source) == looked_up(source)


def test_a_user_without_a_home(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    for name in ("LOWBIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert looked_up(source) == looked_up(source) == (hashlib.sha256(source.read_bytes()).hexdigest(), 5000)


def test_small_files_and_absent_ones(source: Path, tmp_path: Path) -> None:
    small = tmp_path / "config.json"
    small.write_bytes(b"{}")
    assert looked_up(small) == looked_up(small) == (hashlib.sha256(b"{}").hexdigest(), 2)
    with pytest.raises(CheckpointError, match="absent: cannot be read"):
        source_hashes([tmp_path / "absent"])
