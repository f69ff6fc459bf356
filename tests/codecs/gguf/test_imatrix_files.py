"""Importance matrices: both forms against the gguf package and bytes put together by hand, and damaged files."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from lowbit.codecs.gguf.imatrix import FORMS, Form, ImportanceMatrix, read_imatrix, write_imatrix
from lowbit.errors import CheckpointError, LowbitError, UsageError


@pytest.fixture
def matrix() -> ImportanceMatrix:
    random = np.random.default_rng(0)
    values = {
        "blk.0.attn_q.weight": random.random((1, 64), np.float32) * 100,
        "blk.0.ffn_down_exps.weight": random.random((4, 96), np.float32) * 10,
    }
    values["blk.0.ffn_down_exps.weight"][2] = 0
    counts = {
        "blk.0.attn_q.weight": np.array([1024], np.int64),
        "blk.0.ffn_down_exps.weight": np.array([500, 24, 0, 1100], np.int64),
    }
    return ImportanceMatrix(values, counts, ("code.txt",), 2, 512)


def test_the_gguf_form_is_what_the_gguf_package_reads(matrix: ImportanceMatrix, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "m.gguf", matrix)
    reader = GGUFReader(tmp_path / "m.gguf")
    assert reader.get_field("general.type").contents() == "imatrix"  # type: ignore[union-attr]
    assert reader.get_field("imatrix.datasets").contents() == ["code.txt"]  # type: ignore[union-attr]
    assert reader.get_field("imatrix.chunk_count").contents() == 2  # type: ignore[union-attr]
    assert reader.get_field("imatrix.chunk_size").contents() == 512  # type: ignore[union-attr]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, values in matrix.values.items():
        assert np.array_equal(tensors[f"{name}.in_sum2"].data, values)
        assert tensors[f"{name}.in_sum2"].shape.tolist() == [values.shape[1], values.shape[0]]
        assert tensors[f"{name}.counts"].data.reshape(-1).tolist() == matrix.counts[name].tolist()
        assert tensors[f"{name}.counts"].shape.tolist() == [1, len(values)]


def test_a_file_of_the_gguf_package_is_read(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "unused")
    writer.add_type("imatrix")
    sums = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("a.weight.in_sum2", sums)
    writer.add_tensor("a.weight.counts", np.array([[2], [0], [4]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    importance = read_imatrix(tmp_path / "m.gguf").importance("a.weight", 3, 4)
    assert importance is not None
    assert np.array_equal(importance, np.stack([sums[0] / 2, np.ones(4), sums[2] / 4]))


@pytest.mark.parametrize("form", FORMS)
def test_importance_survives_both_forms(matrix: ImportanceMatrix, form: Form, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "m.bin", matrix, form)
    again = read_imatrix(tmp_path / "m.bin")
    assert (again.datasets, again.chunks, len(again)) == (("code.txt",), 2, 2)
    for name, shape in (("blk.0.attn_q.weight", (1, 64)), ("blk.0.ffn_down_exps.weight", (4, 96))):
        expected = matrix.values[name].astype(np.float64) / np.maximum(1, matrix.counts[name])[:, None]
        expected[matrix.counts[name] == 0] = 1
        np.testing.assert_allclose(again.importance(name, *shape), expected, rtol=1e-6)
    assert again.importance("output.weight", 1, 64) is None


def test_the_legacy_form_byte_by_byte(tmp_path: Path) -> None:
    name = b"blk.0.attn_q.weight"
    body = struct.pack("<i", len(name)) + name + struct.pack("<ii", 3, 2) + struct.pack("<2f", 6.0, 12.0)
    data = struct.pack("<i", 1) + body + struct.pack("<ii", 5, 4) + b"text"
    (tmp_path / "m.dat").write_bytes(data)
    read = read_imatrix(tmp_path / "m.dat")
    assert read.importance(name.decode(), 1, 2) == pytest.approx(np.array([[2.0, 4.0]]))
    assert (read.chunks, read.datasets) == (5, ("text",))
    matrix = ImportanceMatrix(
        {name.decode(): np.array([[2048.0, 4096.0]], np.float32)},
        {name.decode(): np.array([1024], np.int64)},
        ("text",),
        5,
        512,
    )
    write_imatrix(tmp_path / "n.dat", matrix, "dat")
    expected = struct.pack("<i", len(name)) + name + struct.pack("<ii", 2, 2) + struct.pack("<2f", 4.0, 8.0)
    assert (tmp_path / "n.dat").read_bytes() == struct.pack("<i", 1) + expected + struct.pack("<ii", 5, 4) + b"text"


def test_the_same_matrix_gives_the_same_bytes(matrix: ImportanceMatrix, tmp_path: Path) -> None:
    backwards = ImportanceMatrix(
        dict(reversed(matrix.values.items())), matrix.counts, matrix.datasets, matrix.chunks, matrix.chunk_size
    )
    for form in FORMS:
        write_imatrix(tmp_path / "a", matrix, form, overwrite=True)
        write_imatrix(tmp_path / "b", backwards, form, overwrite=True)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        write_imatrix(tmp_path / "a", matrix)


def test_another_models_matrix_is_refused(matrix: ImportanceMatrix) -> None:
    with pytest.raises(CheckpointError, match=r"attn_q.weight has 64 values .* another model"):
        matrix.importance("blk.0.attn_q.weight", 1, 128)
    with pytest.raises(CheckpointError, match="another model"):
        matrix.importance("blk.0.ffn_down_exps.weight", 8, 48)


@pytest.mark.parametrize("form", FORMS)
def test_damaged_files_give_typed_errors(matrix: ImportanceMatrix, form: Form, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "good", matrix, form)
    good = (tmp_path / "good").read_bytes()
    random = np.random.default_rng(1)
    path = tmp_path / "bad"
    for _ in range(150):
        data = bytearray(good[: random.integers(0, len(good))] if random.random() < 0.5 else good)
        for position in random.integers(0, min(200, len(data) + 1), 3) if data else ():
            if position < len(data):
                data[position] = random.integers(0, 256)
        path.write_bytes(data)
        with contextlib.suppress(LowbitError):
            read_imatrix(path)


def test_values_that_cannot_be_are_refused(matrix: ImportanceMatrix, tmp_path: Path) -> None:
    matrix.values["blk.0.attn_q.weight"][0, 3] = np.nan
    write_imatrix(tmp_path / "m.gguf", matrix)
    with pytest.raises(CheckpointError, match=r"blk.0.attn_q.weight: a value is negative or not finite"):
        read_imatrix(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="no such file"):
        read_imatrix(tmp_path / "absent.gguf")
