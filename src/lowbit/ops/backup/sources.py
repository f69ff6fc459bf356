"""What a backup of a model consists of: the files, where they lie, and whether they are what its manifest says."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowbit.checkpoint.files import TEMPORARY
from lowbit.checkpoint.location import locate
from lowbit.checkpoint.manifest import manifest_path, read_manifest
from lowbit.errors import CheckpointError, UsageError
from lowbit.ops.backup.manifest import SavedModel, is_plain_path

__all__ = ["Source", "check_against_manifest", "find_sources"]

_PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<total>\d{5})\.gguf")
_UNFINISHED = (".partial", ".restoring")


@dataclass(frozen=True, slots=True)
class Source:
    """A model to be kept: its name in the backup, where it lies, and its files by their path below that."""

    name: str
    path: Path
    files: Mapping[str, Path]


def find_sources(given: Sequence[str | Path]) -> list[Source]:
    """The models that the user names: directories, files (GGUF with all parts and manifest), hub ids, ``demo``.

    Raises :class:`UsageError` for one that holds nothing, is still being made, or has the name of another;
    :class:`CheckpointError` for one that is not there or has an entry that is neither file nor directory.
    """
    sources: dict[str, Source] = {}
    for entry in given:
        path = Path(entry).expanduser()
        path = Path(os.path.abspath(path if path.exists() else locate(entry)))
        name = "demo" if str(entry) == "demo" else _name(str(entry), path)
        if path.name.endswith(_UNFINISHED):
            raise UsageError(f"{path}: is still being made: finish that run first")
        files = dict(sorted(_files(path)))
        if not files:
            raise UsageError(f"{path}: holds no file to back up")
        if name in sources:
            raise UsageError(f"{path} and {sources[name].path} have the same name: back them up one after the other")
        sources[name] = Source(name, path, files)
    return list(sources.values())


def check_against_manifest(source: Source, saved: SavedModel) -> None:
    """Refuse a model that has strayed from its own ``lowbit.json``: :class:`CheckpointError` naming the file."""
    manifest = read_manifest(source.path)
    listed = manifest.files if manifest is not None else {}
    for name in sorted(set(listed) - set(saved.files)):
        raise CheckpointError(f"{source.path}: {name} is missing though lowbit.json lists it; --unverified keeps it so")
    for name, record in listed.items():
        file = saved.files[name]
        if (file.sha256, file.bytes) != (record.sha256, record.bytes):
            raise CheckpointError(
                f"{source.path / name if source.path.is_dir() else source.path}: is not what lowbit.json says (lowbit "
                "verify tells more): restore or quantize it again; --unverified keeps it as it is"
            )


def _name(given: str, path: Path) -> str:
    """The last part of the path; of a hub id, whose directory is named by a revision, its own last part."""
    name = path.name if Path(given).expanduser().exists() else given.rstrip("/").rpartition("/")[2]
    return name if is_plain_path(name) else "model"


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    if not path.is_dir():
        parts = _parts(path)
        manifest = manifest_path(path)
        yield from ((part.name, part) for part in parts)
        if path.suffix == ".gguf" and manifest.is_file():
            yield manifest.name, manifest
        return
    for directory, folders, names in os.walk(path, onerror=_unreadable):
        folders.sort()
        for name in (*folders, *names):
            file = Path(directory, name)
            if name in folders and not file.is_symlink():
                continue
            relative = file.relative_to(path).as_posix()
            if not is_plain_path(relative):
                raise CheckpointError(f"{path}: the name {relative!r} has characters that not every store can keep")
            if not file.exists():
                raise CheckpointError(f"{file}: is a link to something that is not there: mend or remove it")
            if not stat.S_ISREG(file.stat().st_mode):
                kind = "a link to a directory" if file.is_dir() else "neither a file nor a directory"
                raise CheckpointError(f"{file}: is {kind}, which a backup cannot keep: name what it holds by itself")
            if not name.endswith(TEMPORARY):
                yield relative, file


def _parts(path: Path) -> list[Path]:
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    parts = sorted(path.parent.glob(f"{_escaped(match['stem'])}-?????-of-{match['total']}.gguf"))
    if len(parts) != int(match["total"]):
        raise CheckpointError(f"{path}: {len(parts)} of its {int(match['total'])} parts are here: a part is missing")
    return parts


def _escaped(stem: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", stem)


def _unreadable(error: OSError) -> None:
    raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror or error}") from error
