"""The journal against what a kill or a full disk can leave behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.checkpoint import Journal
from lowbit.errors import ResourceError

ENTRIES = [{"step": name, "figures": [1.5, None, "ü"]} for name in ("one", "two", "three")]


def opened(path: Path) -> Journal:
    journal = Journal(path, "free some space")
    journal.take_up(lambda entry: entry["step"] != "bad")
    return journal


@given(cut=st.integers(0, 200), twice=st.booleans())
def test_a_torn_line_costs_itself_and_nothing_that_is_written_later(
    tmp_path_factory: pytest.TempPathFactory, cut: int, twice: bool
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    for entry in ENTRIES:
        opened(path).append(entry)
    data = path.read_bytes()
    whole = data[:cut].count(b"\n")
    path.write_bytes(data[:cut])
    for _ in range(1 + twice):
        assert opened(path).entries == ENTRIES[: min(whole, 3)]
    opened(path).append({"step": "later"})
    assert opened(path).entries == [*ENTRIES[: min(whole, 3)], {"step": "later"}]


def test_what_follows_an_entry_that_does_not_hold_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    first = Journal(path, "")
    for name in ("one", "bad", "three"):
        first.append({"step": name})
    assert [entry["step"] for entry in opened(path).entries] == ["one"]
    assert path.read_text().count("\n") == 1


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    journal = opened(path)
    journal.append(ENTRIES[0])
    before = path.read_bytes()
    real = os.write

    def full(descriptor: int, data: memoryview) -> int:
        if len(data) <= 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[: len(data) // 2])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ResourceError, match="free some space"):
        journal.append(ENTRIES[1])
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert journal.entries == [ENTRIES[0]]
