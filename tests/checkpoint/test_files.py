"""Hashing files, and writing them so that what is told of them is true."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from lowbit.checkpoint.files import FileRecord, HashedFile, hash_file, write_atomically
from lowbit.errors import CheckpointError, ResourceError

MIB = 1 << 20


def test_hash_file(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000
    (tmp_path / "a").write_bytes(data)
    told: list[int] = []
    assert hash_file(tmp_path / "a", told.append) == FileRecord(hashlib.sha256(data).hexdigest(), len(data))
    assert sum(told) == len(data)
    with pytest.raises(CheckpointError, match="cannot be read"):
        hash_file(tmp_path / "absent")


@pytest.mark.parametrize("sizes", [[], [5], [MIB, 3, 2 * MIB + 1], [MIB] * 130])
def test_record_of_what_is_on_the_disk(tmp_path: Path, sizes: list[int]) -> None:
    buffer = bytearray(max(sizes, default=0))
    with HashedFile(tmp_path / "a") as file:
        for number, size in enumerate(sizes):
            buffer[:size] = bytes([number % 256]) * size  # one buffer for all: it must not be read after `write`
            file.write(memoryview(buffer)[:size])
        record = file.finish()
    data = (tmp_path / "a").read_bytes()
    assert data == b"".join(bytes([number % 256]) * size for number, size in enumerate(sizes))
    assert record == FileRecord(hashlib.sha256(data).hexdigest(), len(data))


@pytest.mark.parametrize("failing", [0, 1])
def test_a_disk_that_fails_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    (tmp_path / "a").write_bytes(b"precious")
    synced = 0
    genuine = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal synced
        synced += 1
        if synced == failing + 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        genuine(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    piece = bytes(64 * MIB)
    with pytest.raises(ResourceError, match="cannot be written: Input/output error"):
        write_atomically(tmp_path / "a", [piece, piece], 2 * len(piece), "buy another disk")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"precious"
