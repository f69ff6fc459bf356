"""What a snapshot of a backup says: which files a model had, and by which blobs each is made up again.

A snapshot is one JSON file. It vouches for itself: ``sha256`` is the hash of everything else in it, ``id`` its name,
so that a changed character or a file under another's name is found before anything is restored from it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from lowbit.checkpoint.files import parse_json_object
from lowbit.errors import CheckpointError

__all__ = ["MAX_CHUNK", "SNAPSHOT_ID", "SavedFile", "SavedModel", "Snapshot", "is_plain_path", "pieces_of"]

SNAPSHOT_VERSION = 1
MAX_CHUNK = 1 << 30
"""Bytes of the largest chunk: one is held in memory at a time."""
SNAPSHOT_ID = re.compile(r"\d{8}T\d{6}\.\d{3}Z-[0-9a-f]{8}")

_DIGEST = re.compile(r"[0-9a-f]{64}")
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_KEYS = {"version", "id", "created", "lowbit_version", "host", "chunk_bytes", "models", "sha256"}
_FILE_KEYS = {"bytes", "sha256", "mode", "chunks", "stamp"}


@dataclass(frozen=True, slots=True)
class SavedFile:
    """One file: its length, the sha256 of all of it and of each chunk in order, its permission bits.

    ``stamp`` is ``(mtime_ns, ctime_ns, inode)`` of the file that was read: the next backup need not read it again
    while these and the length are as they were.
    """

    bytes: int
    sha256: str
    mode: int
    chunks: tuple[str, ...]
    stamp: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class SavedModel:
    """A directory, or a file with what belongs to it: where it lay, and its files by their path below that."""

    source: str
    files: Mapping[str, SavedFile]

    @property
    def total_bytes(self) -> int:
        """Length of all files."""
        return sum(file.bytes for file in self.files.values())


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one run of ``lowbit backup`` kept; ``created`` is UTC in whole seconds."""

    id: str
    created: datetime
    lowbit_version: str
    host: str
    chunk_bytes: int
    models: Mapping[str, SavedModel]

    @property
    def total_bytes(self) -> int:
        """Length of all files of all models, as if nothing were shared."""
        return sum(model.total_bytes for model in self.models.values())

    def blobs(self) -> dict[str, int]:
        """The length of every blob that this snapshot needs, by its sha256."""
        found: dict[str, int] = {}
        for model in self.models.values():
            for file in model.files.values():
                found.update(pieces_of(file, self.chunk_bytes))
        return found

    def dump(self) -> bytes:
        """The snapshot as its file holds it."""
        body = self._body()
        return (json.dumps({**body, "sha256": _digest(body)}, indent=1, sort_keys=True) + "\n").encode()

    def _body(self) -> dict[str, Any]:
        models = {
            name: {
                "source": model.source,
                "files": {
                    path: {
                        "bytes": file.bytes,
                        "sha256": file.sha256,
                        "mode": file.mode,
                        "chunks": list(file.chunks),
                        "stamp": list(file.stamp),
                    }
                    for path, file in model.files.items()
                },
            }
            for name, model in self.models.items()
        }
        return {
            "version": SNAPSHOT_VERSION,
            "id": self.id,
            "created": self.created.strftime(_TIME),
            "lowbit_version": self.lowbit_version,
            "host": self.host,
            "chunk_bytes": self.chunk_bytes,
            "models": models,
        }

    @classmethod
    def parse(cls, data: bytes, name: str, where: str) -> Snapshot:
        """Inverse of :meth:`dump` for the snapshot called ``name``.

        Raises :class:`CheckpointError` naming ``where`` for anything that :meth:`dump` would not have written.
        """
        value = parse_json_object(data, where, unique=True)
        if value.get("version") != SNAPSHOT_VERSION:
            raise CheckpointError(
                f"{where}: version {value.get('version')!r} is not {SNAPSHOT_VERSION}: a newer lowbit?"
            )
        if set(value) != _KEYS:
            raise CheckpointError(f"{where}: fields {sorted(set(value) ^ _KEYS)} are missing or unknown")
        digest = value.pop("sha256")
        if digest != _digest(value):
            raise CheckpointError(f"{where}: its content does not match its sha256: it was changed or damaged")
        if value["id"] != name or not SNAPSHOT_ID.fullmatch(name):
            raise CheckpointError(f"{where}: is the snapshot {value['id']!r} under another name")
        chunk = value["chunk_bytes"]
        if type(chunk) is not int or not 1 <= chunk <= MAX_CHUNK:
            raise CheckpointError(f"{where}: chunk_bytes {chunk!r} is not a length from 1 to {MAX_CHUNK}")
        if not isinstance(value["lowbit_version"], str) or not isinstance(value["host"], str):
            raise CheckpointError(f"{where}: lowbit_version and host must be text")
        try:
            created = datetime.strptime(value["created"], _TIME).replace(tzinfo=timezone.utc)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: created {value['created']!r} is not a time") from error
        models = {
            key: _model(model, chunk, f"{where}: {key!r}") for key, model in _object(value["models"], where).items()
        }
        if not models:
            raise CheckpointError(f"{where}: holds no model")
        for key in models:
            if "/" in key or not is_plain_path(key):
                raise CheckpointError(f"{where}: {key!r} is not a plain name")
        return cls(name, created, value["lowbit_version"], value["host"], chunk, models)


def pieces_of(file: SavedFile, chunk_bytes: int) -> Iterator[tuple[str, int]]:
    """``(sha256, length)`` of each chunk of a file."""
    for index, digest in enumerate(file.chunks):
        yield digest, min(chunk_bytes, file.bytes - index * chunk_bytes)


def is_plain_path(path: str) -> bool:
    """Whether ``path`` leads downwards only: relative, ``/`` between names, no ``.``, ``..``, empty or unprintable one.

    Also within the lengths that file systems take.
    """
    names = path.split("/")
    return (
        len(path) <= 4096
        and "\\" not in path
        and all(name not in ("", ".", "..") and len(name.encode("utf-8", "replace")) <= 255 for name in names)
        and all(character.isprintable() for character in path)
    )


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected an object, found {type(value).__name__}")
    return value


def _model(value: object, chunk: int, where: str) -> SavedModel:
    model = _object(value, where)
    if set(model) != {"source", "files"} or not isinstance(model["source"], str):
        raise CheckpointError(f"{where}: must hold source and files")
    files = {path: _file(file, chunk, f"{where}: {path!r}") for path, file in _object(model["files"], where).items()}
    for path in files:
        if not is_plain_path(path):
            raise CheckpointError(f"{where}: {path!r} is not a path below the model")
        parts = path.split("/")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in files:
                raise CheckpointError(f"{where}: {path!r} lies below a file")
    return SavedModel(model["source"], files)


def _file(value: object, chunk: int, where: str) -> SavedFile:
    file = _object(value, where)
    if set(file) != _FILE_KEYS:
        raise CheckpointError(f"{where}: must hold {', '.join(sorted(_FILE_KEYS))}")
    size, mode, chunks, stamp = file["bytes"], file["mode"], file["chunks"], file["stamp"]
    if type(size) is not int or not 0 <= size < 1 << 63:
        raise CheckpointError(f"{where}: bytes {size!r} is not a length")
    if type(mode) is not int or not 0 <= mode <= 0o777:
        raise CheckpointError(f"{where}: mode {mode!r} is not permission bits")
    if not isinstance(chunks, list) or len(chunks) != -(-size // chunk):
        raise CheckpointError(f"{where}: {size:,} bytes do not make the chunks that are listed")
    for digest in (file["sha256"], *chunks):
        if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
            raise CheckpointError(f"{where}: {digest!r} is not a sha256")
    if not isinstance(stamp, list) or len(stamp) != 3 or any(type(number) is not int for number in stamp):
        raise CheckpointError(f"{where}: stamp must be three numbers")
    return SavedFile(size, file["sha256"], mode, tuple(chunks), (stamp[0], stamp[1], stamp[2]))
