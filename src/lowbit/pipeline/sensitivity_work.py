"""What a sweep of measurements has done, kept in a folder so that one that was interrupted goes on where it was."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowbit.checkpoint import Journal
from lowbit.errors import ResourceError
from lowbit.pipeline.choices import GroupSensitivity, group_from_json

__all__ = ["SweepWork"]

_WAY_OUT = "free some space, or name another file"


class SweepWork:
    """A folder for a sweep's files, and in it a journal of the steps that are done, each with what it measured.

    ``key`` stands for everything that decides the figures: work of another key is thrown away. Raises
    :class:`ResourceError` where the folder cannot be written.
    """

    def __init__(self, folder: Path, key: str = "") -> None:
        self.folder = folder
        self._journal = Journal(folder / "journal.jsonl", _WAY_OUT)
        self._done: dict[str, list[GroupSensitivity]] = {}
        if self._journal.path.exists():
            self._journal.take_up(self._holds)
        if self._journal.entries[:1] != [{"key": key}]:
            shutil.rmtree(folder, ignore_errors=True)
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                raise ResourceError(f"{folder}: cannot be written ({error.strerror}): name another file") from error
            self._journal, self._done = Journal(self._journal.path, _WAY_OUT), {}
            self._journal.append({"key": key})

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
        self._journal.append({"step": step, "groups": [asdict(group) for group in groups]})
        self._done[step] = list(groups)
        return self._done[step]

    def _holds(self, entry: dict[str, Any]) -> bool:
        """Take up what an entry says; False for one that says nothing."""
        try:
            if "key" not in entry:
                self._done[entry["step"]] = [group_from_json(group) for group in entry["groups"]]
        except (KeyError, TypeError, ValueError):
            return False
        return True
