"""A file of JSON lines that only grows: the steps that are done, each safe on the disk before the next begins."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lowbit.checkpoint.files import disk_errors, parse_json_object, write_atomically
from lowbit.errors import CheckpointError

__all__ = ["Journal"]


class Journal:
    """The entries of the file ``path``, in order; :class:`lowbit.errors.ResourceError` ends in ``way_out``."""

    def __init__(self, path: Path, way_out: str) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._way_out = way_out

    def take_up(self, holds: Callable[[dict[str, Any]], bool]) -> None:
        """Read the entries up to the first that is torn or no longer ``holds``.

        What follows such an entry is dropped from the file, too, for each step builds on the ones before it.
        """
        data = self.path.read_bytes() if self.path.exists() else b""
        lines = list(self._whole(data, holds))
        if b"".join(lines) != data or not self.path.exists():
            write_atomically(self.path, [b"".join(lines)], sum(map(len, lines)), self._way_out)
        self.entries = [json.loads(line) for line in lines]

    def _whole(self, data: bytes, holds: Callable[[dict[str, Any]], bool]) -> Iterator[bytes]:
        for line in data.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                return
            try:
                if not holds(parse_json_object(line, self.path.name)):
                    return
            except CheckpointError:
                return
            yield line

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add an entry of plain JSON; where the disk is full, the file stays what it was."""
        line = json.dumps(entry, ensure_ascii=False)
        with disk_errors(self.path, len(line) + 1, self._way_out), self.path.open("ab", buffering=0) as file:
            position = file.seek(0, os.SEEK_END)
            try:
                _write_all(file.fileno(), line.encode("utf-8") + b"\n")
                os.fsync(file.fileno())
            except OSError:
                file.truncate(position)
                raise
        self.entries.append(json.loads(line))


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view) :]
