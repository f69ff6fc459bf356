"""What a sweep of measurements has done, kept in a folder so that one that was interrupted goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from lowbit.errors import ResourceError
from lowbit.pipeline.choices import GroupSensitivity, group_from_json

__all__ = ["SweepWork"]


class SweepWork:
    """A folder for a sweep's files, and in it a journal of the steps that are done, each with what it measured.

    ``key`` stands for everything that decides the figures: work of another key is thrown away. Raises
    :class:`ResourceError` where the folder cannot be written.
    """

    def __init__(self, folder: Path, key: str = "") -> None:
        self.folder = folder
        self._journal = folder / "journal.jsonl"
        self._done: dict[str, list[GroupSensitivity]] = {}
        if not self._read(key):
            shutil.rmtree(folder, ignore_errors=True)
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                raise ResourceError(f"{folder}: cannot be written ({error.strerror}): name another file") from error
            self._append({"key": key})

    @classmethod
    @contextmanager
    def kept(cls, folder: Path, key: str) -> Iterator[SweepWork]:
        """Work in ``folder``, which is deleted when the context ends without an error."""
        yield cls(folder, key)
        shutil.rmtree(folder)

    def measured(self, step: str) -> list[GroupSensitivity] | None:
        """What a step measured that is done; None for one that is not."""
        return self._done.get(step)

    def finish(self, step: str, groups: Sequence[GroupSensitivity] = ()) -> list[GroupSensitivity]:
        """Note that ``step`` is done, its files synced; returns ``groups``."""
        self._append({"step": step, "groups": [asdict(group) for group in groups]})
        self._done[step] = list(groups)
        return self._done[step]

    def _append(self, entry: dict[str, object]) -> None:
        try:
            with open(self._journal, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ResourceError(f"{self._journal}: cannot be written ({error.strerror}): free some space") from error

    def _read(self, key: str) -> bool:
        """Take up the journal; False if there is none of this ``key``. A line that was cut off ends it."""
        try:
            first, *lines = self._journal.read_text(encoding="utf-8").splitlines()
            if json.loads(first) != {"key": key}:
                return False
        except (OSError, ValueError):
            return False
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            self._done[entry["step"]] = [group_from_json(group) for group in entry["groups"]]
        return True
