"""YAML as people read it, and several text files written into a directory, all or none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lowbit.checkpoint.files import TEMPORARY, disk_errors, sync_directory
from lowbit.errors import UsageError

__all__ = ["as_yaml", "write_files"]


def write_files(directory: Path, files: Mapping[str, str], *, overwrite: bool = False) -> list[Path]:
    """Write ``files`` (path below ``directory`` to text); each first under a temporary name, then all are renamed.

    Raises :class:`UsageError` where one is there already, unless ``overwrite``, and
    :class:`lowbit.errors.ResourceError` where the disk refuses; then nothing was written.
    """
    targets = [directory / name for name in files]
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory}: is a file; name a directory to write into")
    for path in targets:
        if path.exists() and not (overwrite and path.is_file()):
            raise UsageError(f"{path}: exists: use --overwrite to replace it, or name another directory")
    made: list[Path] = []
    new = [path for path in (directory, *directory.parents) if not path.exists()]
    with disk_errors(directory, sum(len(text.encode()) for text in files.values()), "free some space and run it again"):
        try:
            for path, text in zip(targets, files.values(), strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                draft = path.with_name(path.name + TEMPORARY)
                made.append(draft)
                draft.write_text(text, encoding="utf-8")
            for draft, path in zip(made, targets, strict=True):
                draft.replace(path)
            sync_directory(directory)
        except BaseException:
            for draft in made:
                draft.unlink(missing_ok=True)
            for path in new:
                if path.is_dir() and not any(path.rglob("*")):
                    path.rmdir()
            raise
    return targets


def as_yaml(value: Any) -> str:
    """``value`` as YAML, keys in the order given, no line broken."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=10_000)
