"""Where backups lie: blobs named by their sha256 and snapshots that list them, at any place that fsspec reaches.

::

    lowbit-backup.json       what this place is, and the length of chunks
    blobs/3f/3f9a…           bytes whose sha256 is the name
    snapshots/ID.json        see :mod:`lowbit.ops.backup.manifest`
    locks/ID.json            see :mod:`lowbit.ops.backup.lock`
    damaged/                 blobs that failed a check and were set aside

A file appears under its name only when it is complete: stores of objects publish an upload as a whole when it ends,
everywhere else a temporary name is written (and synced, on a local disk) and moved.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowbit.checkpoint.files import TEMPORARY, parse_json_object, sync_directory
from lowbit.errors import CheckpointError, ResourceError, UnsupportedError, UsageError
from lowbit.ops.backup.manifest import MAX_CHUNK, SNAPSHOT_ID, Snapshot

__all__ = ["CHUNK_BYTES", "Store", "open_store"]

CHUNK_BYTES = 64 << 20
"""Length of chunks unless another is asked for when the first backup is made."""

ABOUT = "lowbit-backup.json"
_VERSION = 1
_LOCAL = frozenset({"file", "local"})
_WHOLE_UPLOADS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "memory", "hf", "oss", "oci"})
"""Protocols whose stores show an object only when its upload has ended (Amazon S3, Google, Azure … document it)."""
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs",
             "ssh": "paramiko", "sftp": "paramiko", "smb": "smbprotocol", "webhdfs": "requests"}  # fmt: skip
"""Protocol to the package that fsspec needs for it; for the message only."""
_FOREIGN_ERRORS = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "paramiko.ssh_exception": ("SSHException",),
    "aiohttp": ("ClientError",),
    "requests.exceptions": ("RequestException",),
    "azure.core.exceptions": ("AzureError",),
    "gcsfs.retry": ("HttpError",),
}
"""Errors of the libraries below fsspec that are no OSError: module to names."""
_SECRET = re.compile(r"(?<=://)[^/@\s]+@")
_BLOB = re.compile(r"[0-9a-f]{64}")


def open_store(target: str, options: Mapping[str, str] | None = None) -> Store:
    """The place that ``target`` (a path or an fsspec url such as ``s3://bucket/backups``) names; nothing is written.

    ``options`` go to the filesystem of the protocol. Raises :class:`UnsupportedError` for a protocol that is unknown
    or whose package is not installed, :class:`UsageError` for a url or option that it refuses.
    """
    from fsspec.core import url_to_fs

    shown = _SECRET.sub("", target)
    if not target.strip():
        raise UsageError("the destination of the backup is empty: give a directory or a url")
    protocol = target.partition("://")[0] if "://" in target else "file"
    if protocol in _LOCAL:
        target = str(Path(target.removeprefix(f"{protocol}://")).expanduser().absolute())
    fresh: dict[str, Any] = {"use_listings_cache": False} if protocol in _WHOLE_UPLOADS - {"memory"} else {}
    try:
        filesystem, path = url_to_fs(target, **fresh, **(options or {}))
    except ImportError as error:
        package = _PACKAGES.get(protocol, str(error))
        raise UnsupportedError(f"{shown}: {protocol}:// needs another package: pip install {package}") from error
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(f"{shown}: cannot be opened: {_line(error)}") from error
    return Store(filesystem, path.rstrip("/"), shown, protocol)


class Store:
    """One place of backups. Methods raise :class:`ResourceError` where it cannot be reached or written.

    ``chunk_bytes`` is known after :meth:`check` or :meth:`create`.
    """

    def __init__(self, filesystem: Any, root: str, shown: str, protocol: str) -> None:
        self.filesystem = filesystem
        self.root = root
        self.shown = shown
        self.local = protocol in _LOCAL
        self.whole_uploads = protocol in _WHOLE_UPLOADS
        self.chunk_bytes = CHUNK_BYTES
        self._made: set[str] = set()

    def path(self, *names: str) -> str:
        """A path inside the place, for the filesystem."""
        return "/".join((self.root, *names))

    def check(self) -> None:
        """Read what the place says of itself. Raises :class:`CheckpointError` where no backup is there."""
        try:
            about = parse_json_object(self.read(ABOUT), f"{self.shown}/{ABOUT}", unique=True)
        except FileNotFoundError:
            raise CheckpointError(f"{self.shown}: holds no backup of lowbit (it has no {ABOUT})") from None
        if about.get("version") != _VERSION:
            raise CheckpointError(f"{self.shown}/{ABOUT}: version {about.get('version')!r} is not {_VERSION}")
        chunk = about.get("chunk_bytes")
        if type(chunk) is not int or not 1 <= chunk <= MAX_CHUNK:
            raise CheckpointError(f"{self.shown}/{ABOUT}: chunk_bytes {chunk!r} is not a length from 1 to {MAX_CHUNK}")
        self.chunk_bytes = chunk

    def create(self, chunk_bytes: int | None) -> None:
        """Open the place, or make it one where there is nothing yet.

        Raises :class:`UsageError` where other files are, or where it has chunks of another length than asked for.
        """
        with self.errors("look into it"):
            there = self.filesystem.exists(self.path(ABOUT))
            if not there and not self.filesystem.isdir(self.root) and self.filesystem.exists(self.root):
                raise UsageError(f"{self.shown}: is a file; name a directory for the backup")
            others = [] if there else self._names(self.root)
        if there:
            self.check()
            if chunk_bytes not in (None, self.chunk_bytes):
                raise UsageError(f"{self.shown}: has chunks of {self.chunk_bytes} bytes already: leave --chunk out")
            return
        if [name for name in others if not name.endswith(TEMPORARY)]:
            raise UsageError(f"{self.shown}: holds other files ({others[0]}): name a new or an empty place")
        self.chunk_bytes = chunk_bytes or CHUNK_BYTES
        self.write(ABOUT, json.dumps({"version": _VERSION, "chunk_bytes": self.chunk_bytes}).encode() + b"\n")

    def read(self, name: str) -> bytes:
        """The bytes of a file of the place; FileNotFoundError where it is not there."""
        with self.errors(f"read {name}"):
            data = self.filesystem.cat_file(self.path(name))
            return bytes(data)

    def write(self, name: str, data: bytes) -> None:
        """Write a file so that its name never stands for a part of it."""
        final = self.path(name)
        with self.errors(f"write {name}"):
            self._make_parent(final)
            if self.local:
                self._write_local(Path(final), data)
            elif self.whole_uploads:
                self.filesystem.pipe_file(final, data)
            else:
                temporary = f"{final}.{secrets.token_hex(8)}{TEMPORARY}"
                self.filesystem.pipe_file(temporary, data)
                self.filesystem.mv(temporary, final)
            if not self.local and self.filesystem.size(final) != len(data):
                raise OSError(f"has {self.filesystem.size(final)} bytes after {len(data)} were written")

    def delete(self, name: str) -> None:
        """Remove a file; it may be gone already."""
        with self.errors(f"delete {name}"):
            try:
                self.filesystem.rm_file(self.path(name))
            except FileNotFoundError:
                return

    def blobs(self) -> dict[str, int]:
        """Length of every blob by its name."""
        return {name: size for name, size in self.find("blobs") if _BLOB.fullmatch(name)}

    def leftovers(self) -> list[str]:
        """Temporary files that killed processes left behind, as seen by one that excludes all others at work.

        Those of locks are not among them: somebody may be asking for a lock at this moment.
        """
        return [f"{kind}/{name}" for kind in ("blobs", "snapshots") for name in self._leftovers(kind)]

    def write_blob(self, digest: str, data: bytes) -> None:
        """Keep ``data``, whose sha256 is ``digest``."""
        self.write(_blob(digest), data)

    def read_blob(self, digest: str, size: int) -> bytes:
        """The bytes of a blob, checked. Raises :class:`CheckpointError` if it is missing, cut short or changed."""
        try:
            data = self.read(_blob(digest))
        except FileNotFoundError:
            raise CheckpointError(f"{self.shown}: blob {digest[:16]}… is missing") from None
        if len(data) != size:
            raise CheckpointError(f"{self.shown}: blob {digest[:16]}… has {len(data):,} bytes instead of {size:,}")
        if hashlib.sha256(data).hexdigest() != digest:
            raise CheckpointError(f"{self.shown}: blob {digest[:16]}… has changed: its sha256 is another")
        return data

    def delete_blob(self, digest: str) -> None:
        """Remove a blob."""
        self.delete(_blob(digest))

    def set_aside(self, digest: str) -> None:
        """Move a damaged blob out of the way, so that the next backup writes it anew."""
        target = self.path("damaged", f"{digest}.{secrets.token_hex(4)}")
        with self.errors(f"set blob {digest[:16]}… aside"):
            self._make_parent(target)
            self.filesystem.mv(self.path(_blob(digest)), target)

    def snapshot_ids(self) -> list[str]:
        """Names of all snapshots, oldest first, readable or not."""
        names = (name.removesuffix(".json") for name, _ in self.find("snapshots") if name.endswith(".json"))
        return sorted(names)

    def snapshot(self, name: str) -> Snapshot:
        """A snapshot. Raises :class:`CheckpointError` if it is damaged, :class:`UsageError` if there is none such."""
        if not SNAPSHOT_ID.fullmatch(name):
            raise UsageError(f"{name!r} is no id of a snapshot, which reads like 20260131T120000.000Z-0123abcd")
        try:
            data = self.read(f"snapshots/{name}.json")
        except FileNotFoundError:
            raise UsageError(f"{self.shown}: has no snapshot {name}: lowbit backup-verify --quick lists them") from None
        return Snapshot.parse(data, name, f"{self.shown}/snapshots/{name}.json")

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Turn what the filesystem raises into a :class:`ResourceError`, FileNotFoundError excepted."""
        try:
            yield
        except FileNotFoundError:
            raise
        except _errors_of_stores() as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            way_out = "free some space and run it again" if full else "run it again"
            raise ResourceError(f"{self.shown}: cannot {doing}: {_line(error)}; {way_out}, it goes on") from error

    def _make_parent(self, path: str) -> None:
        parent = path.rpartition("/")[0]
        if parent not in self._made and not (self.whole_uploads and parent):
            self.filesystem.makedirs(parent, exist_ok=True)
        self._made.add(parent)

    def _write_local(self, final: Path, data: bytes) -> None:
        temporary = final.with_name(f"{final.name}.{secrets.token_hex(8)}{TEMPORARY}")
        try:
            with temporary.open("wb", buffering=0) as file:
                view = memoryview(data)
                while len(view):
                    view = view[file.write(view) :]
                os.fsync(file.fileno())
            temporary.replace(final)
            sync_directory(final.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _names(self, path: str) -> list[str]:
        try:
            entries: Iterable[str] = self.filesystem.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(str(entry).rstrip("/").rpartition("/")[2] for entry in entries)

    def find(self, kind: str) -> list[tuple[str, int]]:
        """``(name, length)`` of all files below one of the directories."""
        with self.errors(f"list its {kind}"):
            self.filesystem.invalidate_cache()
            try:
                found: Mapping[str, Mapping[str, Any]] = self.filesystem.find(self.path(kind), detail=True)
            except FileNotFoundError:
                return []
        return [(path.rpartition("/")[2], int(info.get("size") or 0)) for path, info in found.items()]

    def _leftovers(self, kind: str) -> list[str]:
        names = [name for name, _ in self.find(kind) if name.endswith(TEMPORARY)]
        return [f"{name[:2]}/{name}" if kind == "blobs" else name for name in names]


def _blob(digest: str) -> str:
    return f"blobs/{digest[:2]}/{digest}"


def _errors_of_stores() -> tuple[type[Exception], ...]:
    """OSError, and those of :data:`_FOREIGN_ERRORS` whose libraries are loaded."""
    return OSError, *(
        getattr(sys.modules[module], name)
        for module, names in _FOREIGN_ERRORS.items()
        if module in sys.modules
        for name in names
    )


def _line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return _SECRET.sub("", " ".join(text.split())) or type(error).__name__
