"""The container: what is written is what the gguf package reads, and the other way round."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from lowbit.codecs.gguf import writing
from lowbit.codecs.gguf.container import (
    TensorHeader,
    Typed,
    is_gguf,
    open_gguf,
    read_blocks,
    read_gguf,
    write_gguf,
)
from lowbit.errors import CheckpointError, ResourceError, UnsupportedError, UsageError
from lowbit.formats.ggml import GGML_TYPES

F32, F16, Q8 = GGML_TYPES["F32"], GGML_TYPES["F16"], GGML_TYPES["Q8_0"]
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "a.count": 7,
    "a.large": 2**40,
    "a.negative": -3,
    "a.ratio": 0.5,
    "a.flag": True,
    "a.text": "héllo\n☃",
    "a.empty": "",
    "a.words": ["a", "", "ö"],
    "a.numbers": [1, -2, 3],
    "a.unsigned": [2**32 - 1],
    "a.ratios": [0.5, 1.5],
    "a.flags": [True, False],
    "a.byte": Typed("u8", 255),
    "a.short": Typed("i16", -5),
    "a.double": Typed("f64", 0.1),
    "a.bytes": Typed("u8", [0, 255]),
    "a.none": Typed("str", []),
}
HEADERS = [TensorHeader("a.weight", F32, (4, 64)), TensorHeader("b", Q8, (2, 3, 64)), TensorHeader("c", F16, (3,))]


def tensors() -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return [
        rng.standard_normal((4, 64)).astype(np.float32),
        rng.integers(0, 255, (2, 3, 68)).astype(np.uint8),
        rng.standard_normal(3).astype(np.float16),
    ]


def plain(value: Any) -> Any:
    return value.value if isinstance(value, Typed) else value


def test_the_gguf_package_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    (written,) = write_gguf(path, METADATA, HEADERS, tensors())
    reader = gguf.GGUFReader(path)
    for key, value in METADATA.items():
        assert reader.fields[key].contents() == plain(value), key
    for found, header, data in zip(reader.tensors, HEADERS, tensors(), strict=True):
        assert found.name == header.name
        assert tuple(reversed(found.shape.tolist())) == header.shape
        assert found.tensor_type == header.type.id
        assert np.array_equal(found.data, data)
        assert found.data_offset % 32 == 0
    assert written.record.bytes == path.stat().st_size
    assert written.record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_it_reads_what_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, METADATA | {"general.alignment": 128}, HEADERS, tensors())
    file = open_gguf(path)
    assert {key: file.metadata[key] for key in METADATA} == {key: plain(value) for key, value in METADATA.items()}
    assert (file.version, file.alignment, file.files) == (3, 128, (path,))
    for header, data in zip(HEADERS, tensors(), strict=True):
        found = file.tensors[header.name]
        assert (found.type, found.shape, found.nbytes) == (header.type, header.shape, data.nbytes)
        assert found.start % 128 == 0
        blocks = read_blocks(found)
        assert blocks.tobytes() == data.tobytes()
        assert blocks.shape == (found.rows, found.row_bytes)
        assert np.array_equal(read_blocks(found, 1, found.rows), blocks[1:])
    with pytest.raises(CheckpointError, match="has 4 rows, not 2 to 5"):
        read_blocks(file.tensors["a.weight"], 2, 5)


def test_it_reads_what_the_gguf_package_wrote(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_uint8("x.u8", 3)
    writer.add_int16("x.i16", -3)
    writer.add_float64("x.f64", 0.1)
    writer.add_bool("x.flag", True)
    writer.add_array("x.words", ["a", "bc"])
    writer.add_array("x.numbers", [1, 2])
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    writer.add_tensor("first", values)
    writer.add_tensor("second", gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_0), raw_dtype=2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(path)
    assert file.metadata["general.architecture"] == "qwen2"
    assert [file.metadata[f"x.{key}"] for key in ("u8", "i16", "flag", "words", "numbers")] == [
        3,
        -3,
        True,
        ["a", "bc"],
        [1, 2],
    ]
    assert file.tensors["second"].type == GGML_TYPES["Q4_0"]
    assert np.array_equal(read_blocks(file.tensors["first"]).view(np.float32), values)


def test_pieces_make_the_same_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", METADATA, HEADERS, tensors())

    def pieces() -> Iterator[bytes]:
        for data in tensors():
            raw = data.tobytes()
            for first in range(0, len(raw), 100):
                yield raw[first : first + 100]

    write_gguf(tmp_path / "pieces.gguf", METADATA, HEADERS, pieces())
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()


def test_split_files(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf", METADATA, HEADERS, tensors())
    files = write_gguf(tmp_path / "model.gguf", METADATA, HEADERS, tensors(), split_bytes=1100)
    names = ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"]
    assert [file.path.name for file in files] == names
    whole = open_gguf(tmp_path / "whole.gguf")
    for named in files:
        found = open_gguf(named.path)
        assert [path.name for path in found.files] == names
        assert found.metadata.items() >= whole.metadata.items()
        for name, tensor in whole.tensors.items():
            assert np.array_equal(read_blocks(found.tensors[name]), read_blocks(tensor))
    assert gguf.GGUFReader(files[1].path).fields["split.no"].contents() == 1
    assert len(read_gguf(files[0].path).tensors) == 1
    files[1].path.rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(CheckpointError, match="part of the model is missing"):
        open_gguf(files[0].path)
    with pytest.raises(CheckpointError, match="must be called"):
        open_gguf(tmp_path / "elsewhere.gguf")


def test_contradicting_parts(tmp_path: Path) -> None:
    ours = write_gguf(tmp_path / "model.gguf", METADATA, HEADERS, tensors(), split_bytes=1100)
    theirs = write_gguf(tmp_path / "other.gguf", METADATA, HEADERS[:2], tensors()[:2], split_bytes=1100)
    ours[1].path.write_bytes(ours[0].path.read_bytes())
    with pytest.raises(CheckpointError, match="contradict its name"):
        open_gguf(ours[0].path)
    ours[1].path.write_bytes(theirs[1].path.read_bytes())
    with pytest.raises(CheckpointError, match="says 3 tensors, the files hold 2"):
        open_gguf(ours[0].path)


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"precious")
    with pytest.raises(UsageError, match="--overwrite"):
        write_gguf(path, METADATA, HEADERS, tensors())
    assert path.read_bytes() == b"precious"
    write_gguf(path, METADATA, HEADERS, tensors(), overwrite=True)
    assert is_gguf(path)


@pytest.mark.parametrize("split", [None, 1100])
def test_nothing_half_written_stays(tmp_path: Path, split: int | None) -> None:
    def broken() -> Iterator[np.ndarray[Any, Any]]:
        yield from tensors()[:2]
        raise CheckpointError("source gone")

    with pytest.raises(CheckpointError, match="source gone"):
        write_gguf(tmp_path / "model.gguf", METADATA, HEADERS, broken(), split_bytes=split)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", [1, 2, 3, 5])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"precious")
    calls = 0

    def full(self: Any, view: memoryview) -> None:
        nonlocal calls
        calls += 1
        if calls == moment:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing.HashedFile, "write", full)
    with pytest.raises(ResourceError, match=r"model\.gguf.*free some disk space"):
        write_gguf(path, METADATA, HEADERS, tensors(), overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize("data", [tensors()[:2], [*tensors(), b"x"], [tensors()[0][:2], tensors()[1]]])
def test_data_that_does_not_add_up(tmp_path: Path, data: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"piece|more data"):
        write_gguf(tmp_path / "model.gguf", METADATA, HEADERS, data)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (TensorHeader("x" * 64, F32, (2,)), "1 to 63 bytes"),
        (TensorHeader("a", F32, (1, 1, 1, 1, 1)), "1 to 4 dimensions"),
        (TensorHeader("a", F32, (2, 0)), "1 to 4 dimensions"),
        (TensorHeader("a", Q8, (2, 33)), "no whole blocks of 32"),
    ],
)
def test_tensors_that_cannot_be(tmp_path: Path, header: TensorHeader, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        write_gguf(tmp_path / "model.gguf", METADATA, [header], [])


@pytest.mark.parametrize(
    "value", [[], [1, "a"], [True, 1], Typed("u8", 256), Typed("u8", "a"), Typed("x", 1), "\ud800"]
)
def test_values_that_cannot_be(tmp_path: Path, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"a\.key"):
        write_gguf(tmp_path / "model.gguf", {"a.key": value}, [], [])


def test_is_gguf(tmp_path: Path) -> None:
    assert not is_gguf(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"GGUF")
    (tmp_path / "b.bin").write_bytes(b"else")
    (tmp_path / "c.gguf").write_bytes(b"else")
    assert [is_gguf(tmp_path / name) for name in ("a.bin", "b.bin", "c.gguf", "d.gguf")] == [True, False, True, False]
