"""Small models to back up, and stores to keep them in."""

from __future__ import annotations

import os
import random
from pathlib import Path

from lowbit.ops.backup.store import Store, open_store

CHUNK = 1000


def make_model(path: Path, seed: int = 0, shards: int = 2, size: int = 2500) -> Path:
    """A directory with files of all awkward lengths."""
    generator = random.Random(seed)
    (path / "nested" / "deep").mkdir(parents=True)
    for index in range(shards):
        (path / f"model-{index}.safetensors").write_bytes(generator.randbytes(size + index))
    (path / "config.json").write_text(f'{{"model_type": "llama", "seed": {seed}}}')
    (path / "empty").touch()
    (path / "nested" / "exactly").write_bytes(generator.randbytes(2 * CHUNK))
    (path / "nested" / "deep" / "run.sh").write_text("#!/bin/sh\n")
    (path / "nested" / "deep" / "run.sh").chmod(0o755)
    return path


def contents(path: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below ``path`` with its bytes and permissions."""
    return {
        file.relative_to(path).as_posix(): (file.read_bytes(), file.stat().st_mode & 0o777)
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def local_store(path: Path) -> Store:
    """A store in a directory."""
    return open_store(str(path))


def blob_files(path: Path) -> list[Path]:
    """All blobs of a local store, the largest first."""
    return sorted((path / "blobs").glob("*/*"), key=lambda file: (-file.stat().st_size, file.name))


def flip(path: Path, bit: int = 100) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    times = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
