"""The working directory of a run: parts written as they are solved, a journal, and one atomic commit at the end.

``OUT.partial`` stands next to ``OUT``::

    run.json          the run's fingerprint, and whether OUT may be replaced
    lock              held (flock) by the process at work
    parts/00003.safetensors
    journal.jsonl     one line per finished step; a line is only ever written after its part is safe on disk
    scratch/          for the caller; deleted at the end
    final/            the checkpoint being assembled
    committing        final/ is complete
    replaced/         the OUT that is being overwritten

Every file appears by rename after fsync, so a kill at any instant leaves either the state before a step or after it.
``final`` becomes ``OUT`` by one rename: no half-written directory ever has that name.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from lowbit.checkpoint.files import (
    TEMPORARY,
    FileRecord,
    disk_errors,
    file_pieces,
    hash_file,
    read_json_object,
    sync_directory,
    write_atomically,
    write_json,
)
from lowbit.checkpoint.journal import Journal
from lowbit.checkpoint.manifest import MANIFEST_NAME, Manifest, write_manifest
from lowbit.checkpoint.safetensors import TensorInfo, layout, read_header, read_tensor, write_safetensors
from lowbit.errors import CheckpointError, ResourceError, UsageError

__all__ = ["PartialCheckpoint", "check_output", "partial_path"]

SHARD_BYTES = 5_000_000_000
"""Default size at which the weights are split over several files."""

_WAY_OUT = "free some space and run the same command with --resume"
_RESERVED = frozenset({"index", "part", "sha256", "bytes"})
_VERSION = 1


def partial_path(out: Path) -> Path:
    """The working directory that belongs to ``out``."""
    out = out.resolve()
    return out.with_name(out.name + ".partial")


def check_output(out: Path, *, resume: bool, overwrite: bool) -> None:
    """What :meth:`PartialCheckpoint.create` refuses whatever the run is: to be asked before any long work.

    Raises :class:`UsageError`.
    """
    out = out.resolve()
    directory = partial_path(out)
    run = _read_run(directory)
    _check_out(out, allowed=overwrite or resume)
    if run is not None and not (resume or overwrite or _is_committed(out, directory)):
        raise UsageError(_unfinished(directory, resume))


class PartialCheckpoint:
    """A checkpoint being written; see the module's text for its files. Use as a context manager.

    ``journal``   the finished steps in order: the ``record`` of each :meth:`commit_part`, with ``index``, ``part``
                  (file name), ``sha256`` and ``bytes``
    ``finished``  True when an earlier process already committed this very run: there is nothing left to do
    """

    def __init__(self, out: Path, fingerprint: str, lock: int, *, overwrite: bool, finished: bool) -> None:
        self.out = out
        self.directory = partial_path(out)
        self.fingerprint = fingerprint
        self._journal = Journal(self.directory / "journal.jsonl", _WAY_OUT)
        self.finished = finished
        self._lock = lock
        self._overwrite = overwrite

    @classmethod
    def create(cls, out: Path, fingerprint: str, *, resume: bool = False, overwrite: bool = False) -> PartialCheckpoint:
        """Start or, with ``resume``, go on with the run ``fingerprint`` towards ``out``.

        A run that an earlier process committed is recognised by its leavings or by the fingerprint in ``out``'s
        manifest; then ``finished`` is true, the leavings are gone and there is nothing left to do.

        Raises :class:`UsageError` if ``out`` exists and is not empty (``--overwrite``), if an unfinished run is there
        (``--resume``, ``--overwrite``), is another one (``--overwrite``) or is being worked on by another process.
        """
        out = out.resolve()
        if out.is_mount():
            raise UsageError(f"{out}: is a mount point, which no rename can replace: name a directory inside it")
        directory = partial_path(out)
        run = _read_run(directory)
        matches = run is not None and run["fingerprint"] == fingerprint
        committed = run is not None and _is_committed(out, directory)
        if resume and ((committed and matches) or (run is None and _is_result_of(out, fingerprint))):
            with disk_errors(directory, 0, _WAY_OUT):
                lock = _lock(directory) if directory.exists() else -1
            partial = cls(out, fingerprint, lock, overwrite=overwrite, finished=True)
            partial._clean_up()
            return partial
        goes_on = resume and matches
        overwrite = overwrite or (goes_on and run is not None and run.get("overwrite") is True)
        _check_out(out, allowed=overwrite)
        if run is not None and not (goes_on or overwrite or committed):
            raise UsageError(_unfinished(directory, resume))
        with disk_errors(directory / "run.json", 4096, _WAY_OUT):
            directory.mkdir(parents=True, exist_ok=True)
            partial = cls(out, fingerprint, _lock(directory), overwrite=overwrite, finished=False)
            try:
                if _read_run(directory) != run:
                    raise UsageError(f"{directory}: another lowbit process was working here: run again")
                if goes_on:
                    partial._go_on()
                else:
                    partial._start()
            except BaseException:
                partial.close()
                raise
        return partial

    def __enter__(self) -> PartialCheckpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the lock. What is on disk stays for ``--resume``."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def journal(self) -> list[dict[str, Any]]:
        """The finished steps."""
        return self._journal.entries

    @property
    def scratch(self) -> Path:
        """A directory for the caller's own files; kept for ``--resume``, deleted by :meth:`finish`."""
        path = self.directory / "scratch"
        with disk_errors(path, 4096, _WAY_OUT):
            path.mkdir(exist_ok=True)
        return path

    def commit_part(self, index: int, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        """Write ``tensors`` as part ``index``, then the journal's line: the step is done when this returns.

        ``record`` must be plain JSON and not use the keys index, part, sha256, bytes. Raises :class:`ResourceError`
        if the disk is full; the journal then still describes what is there.
        """
        if taken := sorted(_RESERVED & set(record)):
            raise ValueError(f"the record of a part must not use the key {taken[0]!r}")
        if any(entry["index"] == index for entry in self.journal):
            raise ValueError(f"part {index} is already in the journal")
        name = f"{index:05d}.safetensors"
        written = write_safetensors(self._parts / name, tensors, way_out=_WAY_OUT)
        entry = {**record, "index": index, "part": name, "sha256": written.sha256, "bytes": written.bytes}
        self._journal.append(entry)

    def read_part(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a committed part; KeyError if the journal has no such part."""
        for entry in self.journal:
            if entry["index"] == index:
                return {name: read_tensor(info) for name, info in read_header(self._parts / entry["part"])[0].items()}
        raise KeyError(index)

    def finish(
        self,
        config: Mapping[str, Any],
        extra_json: Mapping[str, Any] | None = None,
        copy_files: Iterable[Path] = (),
        max_shard_bytes: int = SHARD_BYTES,
        *,
        manifest: Manifest | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Put the parts together as a checkpoint and give it the name ``out``. Safe to repeat after a kill.

        ``config`` becomes ``config.json``; ``extra_json`` maps further file names to JSON; ``copy_files`` are copied
        under their own names unless one of those has it; ``manifest``, with the hashes of all files filled in, becomes
        ``lowbit.json``. ``progress`` is told the bytes written. Weights go into ``model.safetensors``, or into shards
        of at most ``max_shard_bytes`` (a larger tensor has a shard of its own) with an index. Raises
        :class:`ResourceError` if the disk is full, :class:`UsageError` if ``out`` has come to exist meanwhile.
        """
        if self.finished:
            return
        marker = self.directory / "committing"
        final = self.directory / "final"
        if not marker.exists():
            _remove(final)
            try:
                with disk_errors(final, 4096, _WAY_OUT):
                    final.mkdir()
                self._assemble(final, config, extra_json or {}, copy_files, max_shard_bytes, manifest, progress)
                with disk_errors(final, 0, _WAY_OUT):
                    sync_directory(final)
                write_json(marker, self._run(), _WAY_OUT)
            except ResourceError:
                _remove(final)
                raise
        self._commit(final)
        self.finished = True
        self._clean_up()

    @property
    def _parts(self) -> Path:
        return self.directory / "parts"

    def _run(self) -> dict[str, Any]:
        return {"version": _VERSION, "fingerprint": self.fingerprint, "overwrite": self._overwrite}

    def _start(self) -> None:
        """Make the directory an empty run. The old journal goes first: without it, old parts mean nothing."""
        if not _is_committed(self.out, self.directory):
            self._restore_replaced()
        for name in ("committing", "journal.jsonl"):
            (self.directory / name).unlink(missing_ok=True)
        sync_directory(self.directory)
        write_json(self.directory / "run.json", self._run(), _WAY_OUT)
        for name in ("final", "parts", "scratch", "replaced"):
            _remove(self.directory / name)
        self._parts.mkdir()
        self._journal.path.touch()
        sync_directory(self.directory)
        sync_directory(self.directory.parent)

    def _go_on(self) -> None:
        """Take over the state on disk."""
        self._restore_replaced()
        if not (self.directory / "final").exists():
            (self.directory / "committing").unlink(missing_ok=True)
        self._parts.mkdir(exist_ok=True)
        for path in self._parts.glob(f"*{TEMPORARY}"):
            path.unlink()
        self._journal.take_up(self._part_is_there)

    def _part_is_there(self, entry: Mapping[str, Any]) -> bool:
        """Whether the part that an entry names is what it was."""
        try:
            record = FileRecord(entry["sha256"], entry["bytes"])
            return Path(entry["part"]).name == entry["part"] and hash_file(self._parts / entry["part"]) == record
        except (CheckpointError, KeyError, TypeError):
            return False

    def _assemble(
        self,
        final: Path,
        config: Mapping[str, Any],
        extra_json: Mapping[str, Any],
        copy_files: Iterable[Path],
        max_shard_bytes: int,
        manifest: Manifest | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        files = _write_shards(final, self._tensors(), max_shard_bytes, progress)
        for name, value in {"config.json": config, **extra_json}.items():
            files[name] = write_json(final / name, value, _WAY_OUT)
        for source in copy_files:
            if source.name not in files and source.name != MANIFEST_NAME:
                size = source.stat().st_size if source.exists() else 0
                files[source.name] = write_atomically(final / source.name, file_pieces(source, 0, size), size, _WAY_OUT)
        if manifest is not None:
            write_manifest(final, manifest.with_files(files))

    def _tensors(self) -> list[TensorInfo]:
        """All tensors of all parts, in the order of the parts' indexes, then names."""
        tensors: dict[str, TensorInfo] = {}
        for entry in sorted(self.journal, key=lambda entry: int(entry["index"])):
            header, _ = read_header(self._parts / entry["part"])
            for name in sorted(header):
                if name in tensors:
                    raise CheckpointError(
                        f"tensor {name!r} is in part {tensors[name].file.name} and in {entry['part']}"
                    )
                tensors[name] = header[name]
        return list(tensors.values())

    def _commit(self, final: Path) -> None:
        """Rename ``final`` to ``out``, moving an older one aside where that was allowed."""
        _check_out(self.out, allowed=self._overwrite)
        replaced = self.directory / "replaced"
        with disk_errors(self.out, 4096, _WAY_OUT):
            if self.out.is_dir() and any(self.out.iterdir()):
                _remove(replaced)
                self.out.rename(replaced)
            final.rename(self.out)
            sync_directory(self.directory)
            sync_directory(self.out.parent)

    def _restore_replaced(self) -> None:
        """Give an older ``out`` its name back if a kill fell between its move and the new one's."""
        replaced = self.directory / "replaced"
        if replaced.exists() and not self.out.exists():
            replaced.rename(self.out)

    def _clean_up(self) -> None:
        """Delete the working directory; what marks the run as committed goes last."""
        with disk_errors(self.directory, 0, _WAY_OUT):
            for name in ("replaced", "scratch", "parts", "journal.jsonl", "run.json", "committing", "lock"):
                _remove(self.directory / name)
            _remove(self.directory)
        self.close()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_result_of(out: Path, fingerprint: str) -> bool:
    """Whether ``out`` is the finished result of the run ``fingerprint``."""
    try:
        return read_json_object(out / MANIFEST_NAME).get("fingerprint") == fingerprint
    except CheckpointError:
        return False


def _is_committed(out: Path, directory: Path) -> bool:
    """Whether the run in ``directory`` has become ``out`` and only its cleaning up is left."""
    return (directory / "committing").exists() and not (directory / "final").exists() and out.exists()


def _read_run(directory: Path) -> dict[str, Any] | None:
    """What ``run.json``, or the marker that outlives it, says; None where there is no run.

    UsageError if the directory is not ours.
    """
    for name in ("run.json", "committing"):
        if (directory / name).exists():
            run = read_json_object(directory / name)
            if run.get("version") != _VERSION or not isinstance(run.get("fingerprint"), str):
                raise UsageError(
                    f"{directory}: written by another version of lowbit: delete it, or name another output"
                )
            return run
    ours = {"lock", f"run.json{TEMPORARY}"}
    if directory.exists() and (not directory.is_dir() or any(path.name not in ours for path in directory.iterdir())):
        raise UsageError(f"{directory}: exists and is no unfinished run of lowbit: move it away or name another output")
    return None


def _unfinished(directory: Path, resume: bool) -> str:
    if resume:
        return (
            f"{directory}: holds an unfinished run with other settings, source or calibration: "
            "use the same ones, or --overwrite to start anew"
        )
    return f"{directory}: holds an unfinished run: use --resume to go on with it, or --overwrite to start anew"


def _check_out(out: Path, *, allowed: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UsageError(f"{out}: is a file, the output must be a directory")
    if not allowed and any(out.iterdir()):
        raise UsageError(f"{out}: exists and is not empty: use --overwrite to replace it, or name another output")


def _lock(directory: Path) -> int:
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise UsageError(f"{directory}: another lowbit process is working here: wait for it, or end it") from error
    return descriptor


def _shards(tensors: list[TensorInfo], max_shard_bytes: int) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in tensors:
        if shards[-1] and size + info.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return shards


def _write_shards(
    final: Path, tensors: list[TensorInfo], max_shard_bytes: int, progress: Callable[[int], None] | None
) -> dict[str, FileRecord]:
    """Copy the tensors' byte ranges into shards (and an index if there are several); returns the files' records."""
    shards = _shards(tensors, max_shard_bytes)
    files: dict[str, FileRecord] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        infos = {info.name: info for info in shard}
        header, order = layout({key: (info.dtype, info.shape) for key, info in infos.items()}, None)
        size = len(header) + sum(info.nbytes for info in shard)
        pieces = _shard_pieces(header, [infos[key] for key in order], progress)
        files[name] = write_atomically(final / name, pieces, size, _WAY_OUT)
        weight_map.update(dict.fromkeys(infos, name))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in tensors)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        files["model.safetensors.index.json"] = write_json(final / "model.safetensors.index.json", index, _WAY_OUT)
    return files


def _shard_pieces(
    header: bytes, infos: list[TensorInfo], progress: Callable[[int], None] | None
) -> Iterator[bytes | memoryview]:
    yield header
    for info in infos:
        for piece in file_pieces(info.file, info.start, info.end):
            if progress is not None:
                progress(len(piece))
            yield piece
