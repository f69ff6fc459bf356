"""Reading JSON, hashing, and writing files so that a kill or a full disk never leaves a half-written one behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from lowbit.checkpoint.hashing import HashBeside
from lowbit.errors import CheckpointError, ResourceError

CHUNK = 8 << 20
"""Bytes copied or hashed at a time."""
TEMPORARY = ".tmp"
"""Suffix of a file that is still being written."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file must be: its sha256 (hex) and its length in bytes."""

    sha256: str
    bytes: int


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> FileRecord:
    """The sha256 and length of ``path``, read in pieces; ``progress`` is told the bytes of each piece.

    Raises :class:`CheckpointError` if the file cannot be read.
    """
    digest = hashlib.sha256()
    total = 0
    buffer = memoryview(bytearray(CHUNK))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                total += count
                if progress is not None:
                    progress(count)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return FileRecord(digest.hexdigest(), total)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` that refuses an object naming a key twice (ValueError)."""
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} appears twice")
    return result


def parse_json_object(data: bytes, where: str, *, unique: bool = False) -> dict[str, Any]:
    """Parse UTF-8 JSON whose top level is an object; :class:`CheckpointError` naming ``where`` otherwise.

    ``unique`` refuses an object that names a key twice, which JSON readers resolve differently.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique_keys if unique else None)
    except RecursionError as error:
        raise CheckpointError(f"{where}: JSON nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json_object(path: Path, *, unique: bool = False) -> dict[str, Any]:
    """The JSON object in ``path``; :class:`CheckpointError` if missing, unreadable or not an object."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_json_object(data, str(path), unique=unique)


def dump_json(value: object, *, allow_nan: bool = True) -> bytes:
    """``value`` as indented UTF-8 JSON with a final newline, keys in the order given."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=allow_nan) + "\n").encode("utf-8")


def sync_directory(path: Path) -> None:
    """Make renames and new entries of a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def disk_errors(path: Path, needed: int, way_out: str) -> Iterator[None]:
    """Turn an OSError while writing ``path`` into a :class:`ResourceError`.

    ``needed`` is the full size in bytes of what is being written; where the disk is full, the message says how much of
    it does not fit and ends with ``way_out``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ResourceError(f"{path}: {_shortage(path, needed)}; {way_out}") from error
        raise ResourceError(f"{path}: cannot be written: {error.strerror or error}") from error


def _shortage(path: Path, needed: int) -> str:
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:
        return f"disk full ({needed:,} bytes were needed)"
    if free < needed:
        return f"disk full: {needed - free:,} bytes missing ({needed:,} needed, {free:,} free)"
    return f"disk, quota or file size limit reached: {needed:,} bytes were needed"


class HashedFile:
    """A new file that is hashed while it is written, and sent to the disk as it grows: less is left for the end.

    Both happen in other threads. To be used with ``with``; :meth:`finish` ends it.
    """

    _SYNC = 64 << 20

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._hash = HashBeside()
        self._disk = ThreadPoolExecutor(1, "lowbit-fsync")
        self._size = self._synced = 0
        self._syncing: Future[None] | None = None

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hash.__exit__(kind, error, trace)
        self._disk.shutdown()
        self._file.close()

    def write(self, view: memoryview) -> None:
        """Append bytes (a view of format "B"); they may be changed afterwards."""
        self._hash.update(view)
        self._size += len(view)
        while len(view):
            view = view[self._file.write(view) :]
        self._hash.wait()
        if self._size - self._synced >= self._SYNC and (self._syncing is None or self._syncing.done()):
            self._wait()
            self._synced = self._size
            self._syncing = self._disk.submit(os.fsync, self._file.fileno())

    def finish(self) -> FileRecord:
        """Its record, once all of it is on the disk."""
        self._wait()
        os.fsync(self._file.fileno())
        return FileRecord(self._hash.hexdigest(), self._size)

    def _wait(self) -> None:
        if self._syncing is not None:
            self._syncing.result()


def write_atomically(path: Path, pieces: Iterable[bytes | memoryview], size: int, way_out: str) -> FileRecord:
    """Write ``pieces`` to ``path`` (temporary file, fsync, rename, fsync of the directory) and return its record.

    ``size`` is the number of bytes the pieces add up to. Raises :class:`ResourceError` ending in ``way_out`` when
    the disk is full; the temporary file is then gone and an older ``path`` untouched.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    with disk_errors(path, size, way_out):
        try:
            with HashedFile(temporary) as file:
                for piece in pieces:
                    file.write(memoryview(piece).cast("B"))
                record = file.finish()
            temporary.replace(path)
            sync_directory(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return record


def write_json(path: Path, value: object, way_out: str, *, allow_nan: bool = True) -> FileRecord:
    """Write ``value`` as JSON atomically; see :func:`write_atomically`."""
    data = dump_json(value, allow_nan=allow_nan)
    return write_atomically(path, [data], len(data), way_out)


def file_pieces(path: Path, start: int, end: int) -> Iterator[memoryview]:
    """The bytes ``start`` to ``end`` of ``path`` in pieces that share one buffer.

    Raises :class:`CheckpointError` if the file ends before ``end``.
    """
    buffer = memoryview(bytearray(max(1, min(CHUNK, end - start))))
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            left = end - start
            while left:
                count = file.readinto(buffer[: min(left, CHUNK)])
                if not count:
                    raise CheckpointError(f"{path}: truncated: {left:,} bytes are missing")
                left -= count
                yield buffer[:count]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def records_to_json(files: Mapping[str, FileRecord]) -> dict[str, dict[str, Any]]:
    """File records as plain JSON, sorted by name."""
    return {name: {"sha256": files[name].sha256, "bytes": files[name].bytes} for name in sorted(files)}
