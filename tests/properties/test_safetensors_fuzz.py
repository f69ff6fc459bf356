"""Whatever the bytes of a file, reading gives CheckpointError or exactly what the reference library reads."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.checkpoint.safetensors import DTYPES, read_header, read_rows, read_tensor, write_safetensors
from lowbit.errors import CheckpointError

REAL = [dtype for dtype in DTYPES.values() if dtype.itemsize <= 8 and not dtype.is_complex]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def seed_file() -> bytes:
    return safetensors.torch.save(
        {
            "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
            "b": torch.arange(4, dtype=torch.bfloat16),
            "c": torch.zeros(0, 5),
            "d": torch.tensor(3, dtype=torch.int64),
            "e": torch.arange(3, dtype=torch.uint8),
        },
        {"format": "pt"},
    )


def compare(path: Path, data: bytes) -> None:
    """Ours refuses with one line naming the file, or agrees with the reference library to the last bit."""
    path.write_bytes(data)
    try:
        tensors, metadata = read_header(path)
        values = {name: read_tensor(info) for name, info in tensors.items()}
    except CheckpointError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert str(path) in message
        assert "\n" not in message
        return
    with safetensors.safe_open(path, "pt") as reference:
        assert set(values) == set(reference.keys())
        assert metadata == (reference.metadata() or {})
        for name, value in values.items():
            expected = reference.get_tensor(name)
            assert value.dtype == expected.dtype
            assert value.shape == expected.shape
            if value.dtype != torch.bool:
                assert bits(value) == bits(expected)


SEED = seed_file()
MUTATION = st.tuples(
    st.sampled_from(["set", "insert", "delete", "cut"]), st.integers(0, len(SEED)), st.integers(0, 255)
)


@settings(max_examples=400, deadline=None)
@given(st.lists(MUTATION, min_size=1, max_size=4))
def test_mutated_bytes(folder: Path, mutations: list[tuple[str, int, int]]) -> None:
    data = bytearray(SEED)
    for kind, position, value in mutations:
        if kind == "set" and position < len(data):
            data[position] = value
        elif kind == "insert":
            data.insert(position, value)
        elif kind == "delete":
            del data[position : position + 1]
        elif kind == "cut":
            del data[position:]
    compare(folder / "mutated.safetensors", bytes(data))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64), st.integers(0, 80))
def test_arbitrary_bytes(folder: Path, data: bytes, length: int) -> None:
    compare(folder / "noise.safetensors", data)
    compare(folder / "noise.safetensors", length.to_bytes(8, "little") + data)


NUMBER = st.one_of(
    st.integers(0, 12), st.sampled_from([-1, 2**31, 2**32, 2**61, 2**63, 2**64, 10**30, 1.5, True, None, "4"])
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F4", "Q8", "", 3, None]),
        "shape": st.one_of(st.lists(NUMBER, max_size=4), st.none(), st.just("ab")),
        "data_offsets": st.one_of(st.lists(NUMBER, min_size=1, max_size=3), st.just({})),
        "extra": st.just(1),
    },
)
HEADER = st.dictionaries(st.sampled_from(["a", "b", "", "é", "\ud800", "x\ny"]), ENTRY, max_size=3)


@settings(max_examples=400, deadline=None)
@given(HEADER, st.integers(0, 24), st.sampled_from([None, {"format": "pt"}, {"n": 1}, [], "x"]))
def test_odd_headers(folder: Path, entries: dict[str, Any], size: int, metadata: object) -> None:
    header = json.dumps(entries | ({} if metadata is None else {"__metadata__": metadata})).encode()
    compare(folder / "odd.safetensors", len(header).to_bytes(8, "little") + header + bytes(range(size)))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["F32", "I8", "BF16"]), st.lists(st.integers(0, 3), max_size=3)), max_size=4),
    st.lists(st.integers(-2, 2), min_size=8, max_size=8),
    st.integers(-3, 3),
)
def test_shifted_offsets(folder: Path, shapes: list[tuple[str, list[int]]], shifts: list[int], tail: int) -> None:
    """Nearly right files: each offset moved by a little, the data a little too short or too long."""
    entries: dict[str, Any] = {}
    position = 0
    for number, (code, shape) in enumerate(shapes):
        end = position + DTYPES[code].itemsize * int(torch.tensor(shape).prod())
        entries[str(number)] = {
            "dtype": code,
            "shape": shape,
            "data_offsets": [position + shifts[2 * number] // 2, end + shifts[2 * number + 1] // 2],
        }
        position = end
    header = json.dumps(entries).encode()
    data = bytes(number % 251 for number in range(max(0, position + (tail if abs(tail) == 3 else 0))))
    compare(folder / "shifted.safetensors", len(header).to_bytes(8, "little") + header + data)


@st.composite
def random_tensor(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(REAL))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    count = dtype.itemsize
    for extent in shape:
        count *= extent
    raw = draw(st.binary(min_size=count, max_size=count))
    if dtype == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    return flat.view(dtype).reshape(shape)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"), random_tensor(), max_size=4
    )
)
def test_what_is_written_is_what_the_reference_writes(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        expected = safetensors.torch.save(tensors, {"format": "pt"})
    except UnicodeEncodeError:
        return
    path = folder / "written.safetensors"
    record = write_safetensors(path, tensors)
    assert record.bytes == path.stat().st_size
    header = int.from_bytes(expected[:8], "little")
    assert path.read_bytes()[8 + header :] == expected[8 + header :]
    assert json.loads(path.read_bytes()[8 : 8 + header]) == json.loads(expected[8 : 8 + header])
    for name, info in read_header(path)[0].items():
        assert bits(read_tensor(info)) == bits(tensors[name])


@settings(max_examples=100, deadline=None)
@given(random_tensor().filter(lambda item: item.dim() > 0 and item.shape[0] > 0), st.data())
def test_rows(folder: Path, tensor: torch.Tensor, data: st.DataObject) -> None:
    path = folder / "rows.safetensors"
    write_safetensors(path, {"before": torch.ones(3), "t": tensor})
    row = st.integers(0, tensor.shape[0] - 1)
    rows = data.draw(st.lists(row, max_size=9) | st.builds(range, row, row, st.sampled_from([1, 2, -1])))
    found = read_rows(read_header(path)[0]["t"], rows)
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).reshape(tensor.shape[0], -1)
    assert found.dtype == tensor.dtype
    assert found.shape == (len(rows), *tensor.shape[1:])
    assert bits(found) == bits(raw[torch.tensor(list(rows), dtype=torch.long)])
