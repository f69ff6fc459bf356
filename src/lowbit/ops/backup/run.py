"""Backups of models: incremental, content-addressed, and going on where a killed one stopped.

Files are cut into chunks of a fixed length; each chunk is a blob named by its sha256 (:mod:`lowbit.ops.backup.store`),
so what is there already, from an earlier snapshot, another model or an interrupted run, is not written again. The
snapshot that makes blobs count comes last.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from lowbit import __version__
from lowbit.checkpoint.hashing import HashBeside
from lowbit.errors import CheckpointError, LowbitError, UsageError
from lowbit.ops.backup.lock import Lock, locked
from lowbit.ops.backup.manifest import SavedFile, SavedModel, Snapshot, pieces_of
from lowbit.ops.backup.sources import Source, check_against_manifest, find_sources
from lowbit.ops.backup.store import Store
from lowbit.pipeline.progress import Progress, Silent

__all__ = ["BackupResult", "back_up"]


@dataclass(frozen=True, slots=True)
class BackupResult:
    """What a backup did: ``bytes`` are kept by the snapshot, ``new_bytes`` in ``new_blobs`` had to be written.

    ``unread`` files were as the last snapshot knew them and were not read again.
    """

    snapshot: str
    models: tuple[str, ...]
    files: int
    bytes: int
    new_blobs: int
    new_bytes: int
    unread: int


@dataclass(slots=True)
class _Run:
    """One backup under way: ``known`` is every blob of the place with its length, ``earlier`` the files known best."""

    store: Store
    lock: Lock
    known: dict[str, int]
    earlier: Mapping[tuple[str, str], SavedFile]
    new_blobs: int = 0
    new_bytes: int = 0
    unread: int = 0

    def keep(self, source: Source, relative: str) -> SavedFile:
        """See that all of a file is in the place."""
        path = source.files[relative]
        before = os.stat(path)
        old = self.earlier.get((str(source.path), relative))
        if old is not None and (old.stamp, old.bytes) == (_stamp(before), before.st_size) and self._has(old):
            self.unread += 1
            return old
        chunks, total = [], 0
        try:
            with path.open("rb", buffering=0) as file, HashBeside() as whole:
                while data := _read(file.fileno(), self.store.chunk_bytes):
                    whole.update(data)
                    chunks.append(self._keep_chunk(data))
                    total += len(data)
                digest = whole.hexdigest()
            after = os.stat(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        if total != before.st_size or _stamp(before) != _stamp(after):
            raise CheckpointError(f"{path}: changed while it was read: run the backup again when nothing writes it")
        return SavedFile(total, digest, before.st_mode & 0o777, tuple(chunks), _stamp(before))

    def _has(self, file: SavedFile) -> bool:
        """Whether the place has all blobs of a file, by their lengths."""
        return all(self.known.get(digest) == size for digest, size in pieces_of(file, self.store.chunk_bytes))

    def _keep_chunk(self, data: bytes) -> str:
        self.lock.renew()
        digest = hashlib.sha256(data).hexdigest()
        if self.known.get(digest) != len(data):
            self.store.write_blob(digest, data)
            self.known[digest] = len(data)
            self.new_blobs += 1
            self.new_bytes += len(data)
        return digest


def back_up(
    models: Sequence[str | Path],
    store: Store,
    *,
    chunk_bytes: int | None = None,
    unverified: bool = False,
    read_all: bool = False,
    progress: Progress | None = None,
) -> BackupResult:
    """Keep ``models`` in ``store`` as one snapshot; what is there already is not written again.

    A file whose length, times and inode are those of the last snapshot is not read again, unless ``read_all``. A model
    that differs from its own ``lowbit.json`` is refused, unless ``unverified``. ``chunk_bytes`` is fixed by the first
    backup. Raises :class:`UsageError`, :class:`CheckpointError` for files that cannot be kept, and
    :class:`ResourceError` where the place fails; then there is no snapshot, and the next run goes on.
    """
    progress = progress or Silent()
    sources = find_sources(models)
    _refuse_inside(sources, store)
    store.create(chunk_bytes)
    with locked(store, "backup") as lock:
        run = _Run(store, lock, store.blobs(), {} if read_all else _earlier(store))
        saved = {}
        progress.start("Backing up", sum(len(source.files) for source in sources))
        for source in sources:
            files = {}
            for relative in source.files:
                progress.at(relative)
                files[relative] = run.keep(source, relative)
                progress.advance(relative)
            saved[source.name] = SavedModel(str(source.path), files)
            if not unverified:
                check_against_manifest(source, saved[source.name])
        snapshot = _snapshot(store, saved)
        lock.renew(now=True)
        store.write(f"snapshots/{snapshot.id}.json", snapshot.dump())
    progress.close()
    return BackupResult(
        snapshot.id,
        tuple(saved),
        sum(len(model.files) for model in saved.values()),
        snapshot.total_bytes,
        run.new_blobs,
        run.new_bytes,
        run.unread,
    )


def _snapshot(store: Store, saved: Mapping[str, SavedModel]) -> Snapshot:
    now = datetime.now(timezone.utc)
    name = f"{now:%Y%m%dT%H%M%S}.{now.microsecond // 1000:03d}Z-{secrets.token_hex(4)}"
    return Snapshot(name, now.replace(microsecond=0), __version__, socket.gethostname(), store.chunk_bytes, saved)


def _earlier(store: Store) -> dict[tuple[str, str], SavedFile]:
    """Files of the snapshots of this machine by source and path, of the newest that knows them."""
    found: dict[tuple[str, str], SavedFile] = {}
    for name in store.snapshot_ids():
        try:
            snapshot = store.snapshot(name)
        except LowbitError:
            continue  # a damaged one spares no reading; backup-verify tells of it
        if snapshot.host == socket.gethostname() and snapshot.chunk_bytes == store.chunk_bytes:
            for model in snapshot.models.values():
                found.update({(model.source, path): file for path, file in model.files.items()})
    return found


def _refuse_inside(sources: Sequence[Source], store: Store) -> None:
    if not store.local:
        return
    root = Path(store.root).resolve()
    for source in sources:
        path = source.path.resolve()
        if path.is_dir() and (root == path or path in root.parents):
            raise UsageError(f"{store.shown}: lies inside {source.path}, which is to be backed up: name another place")


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _read(descriptor: int, length: int) -> bytes:
    """Up to ``length`` bytes; fewer only at the end of the file."""
    first = os.read(descriptor, length)
    if len(first) == length or not first:
        return first
    pieces, missing = [first], length - len(first)
    while missing and (data := os.read(descriptor, missing)):
        pieces.append(data)
        missing -= len(data)
    return b"".join(pieces)
