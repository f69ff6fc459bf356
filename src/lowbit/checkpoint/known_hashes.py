"""The sha256 of a source's files, remembered while they do not change: the second run over a model need not read it
twice.

A file is taken for unchanged when device, inode, size and the times of its last change of content and of status are the
same, as version control systems do. What proves files (``lowbit verify``, backup, restore) hashes them anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from lowbit.cache import cache_directory
from lowbit.checkpoint.files import TEMPORARY, hash_file
from lowbit.errors import UsageError

__all__ = ["source_hashes"]

_WORTH = 16 << 20
"""Bytes from which a hash is remembered."""
_SETTLED = 2 * 10**9
"""Nanoseconds after which a further change is sure to get another time, on any file system."""


def source_hashes(paths: Iterable[Path], progress: Callable[[int], None] | None = None) -> dict[str, str]:
    """The sha256 of files by name; ``progress`` is told the bytes of each piece that is read.

    Raises :class:`CheckpointError` for a file that cannot be read.
    """
    return {path.name: _hash(path, progress) for path in paths}


def _hash(path: Path, progress: Callable[[int], None] | None) -> str:
    stamp, entry = _stamp(path), _entry(path)
    if stamp is None or entry is None:
        return hash_file(path, progress).sha256
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(entry.read_bytes())
        if known["stamp"] == stamp and isinstance(known["sha256"], str):
            return known["sha256"]
    now = time.time_ns()
    found = hash_file(path, progress).sha256
    if _stamp(path) == stamp and max(stamp[-2:]) < now - _SETTLED:
        _remember(entry, stamp, found)
    return found


def _entry(path: Path) -> Path | None:
    """Where the hash of a file is remembered; None where nothing can be."""
    try:
        return cache_directory() / "sha256" / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()}.json"
    except UsageError:
        return None


def _stamp(path: Path) -> list[int] | None:
    """What changes with the content of a file; None for a small one, and for one that cannot be read."""
    try:
        status = path.stat()
    except OSError:
        return None
    if status.st_size < _WORTH:
        return None
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _remember(entry: Path, stamp: list[int], sha256: str) -> None:
    """Keep a hash for the next run; a cache that cannot be written costs time only."""
    temporary = entry.with_name(f"{entry.name}.{os.getpid()}{TEMPORARY}")
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"stamp": stamp, "sha256": sha256}))
        temporary.replace(entry)
