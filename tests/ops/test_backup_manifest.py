"""Whatever the bytes of a snapshot, reading it gives CheckpointError or a snapshot that leads nowhere else."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import CheckpointError
from lowbit.ops.backup.manifest import SavedFile, SavedModel, Snapshot, _digest, is_plain_path, pieces_of

NAME = "20260131T120000.000Z-0123abcd"
SNAPSHOT = Snapshot(
    NAME,
    datetime(2026, 1, 31, 12, tzinfo=timezone.utc),
    "0.1.0",
    "host",
    10,
    {"m": SavedModel("/m", {"a/b": SavedFile(25, "a" * 64, 0o644, ("b" * 64,) * 3, (1, 2, 3)),
                            "e": SavedFile(0, "c" * 64, 0o600, (), (1, 2, 4))})},
)  # fmt: skip


def read(data: bytes) -> Snapshot | None:
    message = ""
    try:
        snapshot = Snapshot.parse(data, NAME, "place/snapshot")
    except CheckpointError as error:
        message = str(error)
    if message:
        assert "place/snapshot" in message
        assert "\n" not in message
        return None
    for model in snapshot.models.values():
        for path, file in model.files.items():
            assert not path.startswith("/")
            assert ".." not in path.split("/")
            assert sum(size for _, size in pieces_of(file, snapshot.chunk_bytes)) == file.bytes
            assert all(0 < size <= snapshot.chunk_bytes for _, size in pieces_of(file, snapshot.chunk_bytes))
    assert Snapshot.parse(snapshot.dump(), NAME, "again") == snapshot
    return snapshot


def signed(value: dict[str, Any]) -> bytes:
    """As somebody would write it who also mends the sha256."""
    body = {key: entry for key, entry in value.items() if key != "sha256"}
    return json.dumps({**body, "sha256": _digest(body)}).encode()


def test_reads_what_it_writes() -> None:
    assert read(SNAPSHOT.dump()) == SNAPSHOT


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    assert read(data) is None


@settings(max_examples=200)
@given(st.integers(0, len(SNAPSHOT.dump()) - 1), st.integers(1, 255), st.integers(0, 3))
def test_changed_bytes(at: int, change: int, cut: int) -> None:
    data = bytearray(SNAPSHOT.dump())
    data[at] ^= change
    found = read(bytes(data[:-cut] if cut > 1 else data))
    assert found in (None, SNAPSHOT)


plain = st.none() | st.booleans() | st.integers(-5, 2**70) | st.text(max_size=8) | st.floats(allow_nan=False)
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)
places = st.sampled_from([
    ("version",), ("id",), ("created",), ("host",), ("lowbit_version",), ("chunk_bytes",), ("models",), ("models", "m"),
    ("models", "m", "source"), ("models", "m", "files"), ("models", "m", "files", "a/b"),
    *(("models", "m", "files", "a/b", key) for key in ("bytes", "sha256", "mode", "chunks", "stamp")),
    ("models", "m", "files", "a/b", "chunks", 1), ("models", "m", "files", "a/b", "stamp", 0),
])  # fmt: skip


@settings(max_examples=300)
@given(places, values, st.booleans())
def test_any_value_anywhere_with_a_right_hash(place: tuple[str | int, ...], value: Any, gone: bool) -> None:
    content = json.loads(SNAPSHOT.dump())
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    if gone:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    read(signed(content))


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "a/../../x", "a//b", ".", "", "a/", "a\\b", "a\nb", "a\0b", "x" * 256, "\ud800"]
)
def test_paths_that_lead_elsewhere(path: str) -> None:
    assert not is_plain_path(path)
    content = json.loads(SNAPSHOT.dump())
    content["models"]["m"]["files"][path] = content["models"]["m"]["files"].pop("e")
    assert read(signed(content)) is None
    content = json.loads(SNAPSHOT.dump())
    content["models"] = {path: content["models"]["m"]}
    assert read(signed(content)) is None


def test_a_file_below_a_file() -> None:
    content = json.loads(SNAPSHOT.dump())
    content["models"]["m"]["files"]["a"] = content["models"]["m"]["files"].pop("e")
    assert read(signed(content)) is None
