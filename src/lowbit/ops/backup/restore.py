"""Restoring a snapshot: each chunk checked before it is written, each file again afterwards, one rename at the end."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lowbit.checkpoint.files import disk_errors, hash_file, sync_directory
from lowbit.checkpoint.hashing import HashBeside
from lowbit.errors import CheckpointError, ResourceError, UsageError
from lowbit.ops.backup.manifest import SavedFile, Snapshot, pieces_of
from lowbit.ops.backup.store import Store
from lowbit.pipeline.progress import Progress, Silent

__all__ = ["Restored", "restore"]

_WAY_OUT = "free some space and run it again, it goes on"


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did: ``fetched_bytes`` came from the backup, the rest of ``bytes`` was there from an earlier try.

    ``proofs`` are sentences on what was done to show that it is whole.
    """

    snapshot: str
    out: str
    models: tuple[str, ...]
    files: int
    bytes: int
    fetched_bytes: int
    proofs: tuple[str, ...]


def restore(
    store: Store,
    out: Path,
    *,
    snapshot: str | None = None,
    model: str | None = None,
    overwrite: bool = False,
    smoke: Callable[[Path], str] | None = None,
    progress: Progress | None = None,
) -> Restored:
    """Bring a snapshot (default: the newest) back as the directory ``out``.

    ``out`` holds the model's files where there is one (or ``model`` names one), else a directory for each. It appears
    under its name when every file has its sha256 and ``smoke``, called with each model's directory, has not raised;
    until then the work lies in ``OUT.restoring``, from which the next try goes on.

    Raises :class:`UsageError` where ``out`` exists (``overwrite`` replaces it) or names do not fit,
    :class:`CheckpointError` for damage in the backup, :class:`ResourceError` where disk or backup fail.
    """
    progress = progress or Silent()
    store.check()
    found = store.snapshot(snapshot or _newest(store, model))
    places = _places(found, model)
    out = Path(os.path.abspath(out.expanduser()))
    working = out.with_name(f"{out.name}.restoring")
    replaced = out.with_name(f"{out.name}.replaced")
    _refuse(out, working, overwrite)
    _refuse_incomplete(store, found, places)
    with disk_errors(working, sum(file.bytes for _, file in places), _WAY_OUT), _working(working):
        if replaced.exists() and not out.exists():
            replaced.rename(out)  # a kill fell between the two renames below
            _refuse(out, working, overwrite)
        content = working / "content"
        _make_room(content, places)
        progress.start("Restoring", len(places))
        fetched = 0
        for relative, file in places:
            progress.at(relative)
            fetched += _fetch(store, found, content / relative, file)
            progress.advance(relative)
        for relative, file in places:
            record = hash_file(content / relative)
            if (record.sha256, record.bytes) != (file.sha256, file.bytes):
                raise CheckpointError(f"{content / relative}: what was written reads back as something else: bad disk?")
        proofs = [f"{len(places)} files have the sha256 that the snapshot says, read back after writing"]
        names = [model] if model is not None else sorted(found.models)
        if smoke is not None:
            proofs += [f"{name}: {smoke(content if len(names) == 1 else content / name)}" for name in names]
        _commit(content, out, replaced)
    progress.close()
    shutil.rmtree(replaced, ignore_errors=True)
    size = sum(file.bytes for _, file in places)
    return Restored(found.id, str(out), tuple(names), len(places), size, fetched, tuple(proofs))


def _newest(store: Store, model: str | None) -> str:
    """The id of the newest snapshot (that has ``model``); a damaged one is not passed over in silence."""
    names = store.snapshot_ids()
    if not names:
        raise UsageError(f"{store.shown}: has no finished snapshot")
    for name in reversed(names):
        if model is None or model in store.snapshot(name).models:
            return name
    raise UsageError(f"{store.shown}: no snapshot has a model {model!r}")


def _places(snapshot: Snapshot, model: str | None) -> list[tuple[str, SavedFile]]:
    """Each file and its path below ``out``."""
    if model is not None and model not in snapshot.models:
        raise UsageError(f"snapshot {snapshot.id} has no model {model!r}: it has {', '.join(sorted(snapshot.models))}")
    chosen = snapshot.models if model is None else {model: snapshot.models[model]}
    prefix = "{}/" if len(chosen) > 1 else ""
    return [
        (prefix.format(name) + path, file) for name, each in sorted(chosen.items()) for path, file in each.files.items()
    ]


def _refuse(out: Path, working: Path, overwrite: bool) -> None:
    if out.is_mount():
        raise UsageError(f"{out}: is a mount point, which no rename can replace: name a directory inside it")
    if (out.exists() or out.is_symlink()) and not (overwrite and out.is_dir() and not out.is_symlink()):
        raise UsageError(f"{out}: exists: restore to a new path, or replace a directory with --overwrite")
    ours = {"content", "lock"}
    if working.exists() and (not working.is_dir() or not {entry.name for entry in working.iterdir()} <= ours):
        raise UsageError(f"{working}: exists and is no unfinished restore: move it away or name another output")


def _refuse_incomplete(store: Store, snapshot: Snapshot, places: list[tuple[str, SavedFile]]) -> None:
    """Find blobs that are missing or have the wrong length before anything is written."""
    known = store.blobs()
    for relative, file in places:
        for digest, size in pieces_of(file, snapshot.chunk_bytes):
            if known.get(digest) != size:
                there = "is missing" if digest not in known else f"has {known[digest]:,} bytes instead of {size:,}"
                raise CheckpointError(
                    f"{store.shown}: snapshot {snapshot.id}: {relative}: its blob {digest[:16]}… {there}; lowbit "
                    "backup-verify lists all damage, --snapshot names an older snapshot"
                )


@contextmanager
def _working(working: Path) -> Iterator[None]:
    """The directory of an unfinished restore, for one process at a time; it goes when all went well."""
    working.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(working / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{working}: another lowbit restores here: wait for it, or end it") from error
        try:
            yield
        except CheckpointError:
            shutil.rmtree(working)  # what a damaged backup gave is of no use; after a full disk or a kill it is
            raise
        shutil.rmtree(working)
    finally:
        os.close(descriptor)


def _make_room(content: Path, places: list[tuple[str, SavedFile]]) -> None:
    """Remove what does not belong to the snapshot, and refuse what will not fit."""
    content.mkdir(exist_ok=True)
    wanted = {relative for relative, _ in places}
    for directory, folders, names in os.walk(content, topdown=False):
        for name in (*names, *folders):
            path = Path(directory, name)
            if path.is_symlink() or (path.is_file() and path.relative_to(content).as_posix() not in wanted):
                path.unlink()
            elif path.is_dir() and (not any(path.iterdir()) or path.relative_to(content).as_posix() in wanted):
                shutil.rmtree(path)
    missing = 0
    for relative, file in places:
        path = content / relative
        missing += file.bytes - min(file.bytes, path.stat().st_size if path.exists() else 0)
    free = shutil.disk_usage(content).free
    if missing > free:
        raise ResourceError(f"{content}: disk full: {missing:,} bytes are needed, {free:,} are free; {_WAY_OUT}")


def _fetch(store: Store, snapshot: Snapshot, path: Path, file: SavedFile) -> int:
    """Make ``path`` the file: chunks that it holds already stay. Returns the bytes that came from the backup."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.chmod(0o600)  # an earlier try may have made it read-only
    fetched = offset = 0
    with (
        os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as target,
        HashBeside() as whole,
    ):
        for digest, size in pieces_of(file, snapshot.chunk_bytes):
            target.seek(offset)
            data = target.read(size) or b""
            if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
                data = store.read_blob(digest, size)
                target.seek(offset)
                view = memoryview(data)
                while len(view):
                    view = view[target.write(view) :]
                fetched += size
            whole.update(data)
            offset += size
        if whole.hexdigest() != file.sha256:
            raise CheckpointError(
                f"{store.shown}: snapshot {snapshot.id}: the chunks of {path.name} are not its sha256"
            )
        target.truncate(file.bytes)
        os.fchmod(target.fileno(), file.mode)
        os.fsync(target.fileno())
    return fetched


def _commit(content: Path, out: Path, replaced: Path) -> None:
    for directory, _, _ in os.walk(content):
        sync_directory(Path(directory))
    if out.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        out.rename(replaced)
    content.rename(out)
    sync_directory(out.parent)
