"""Importance matrices: how strongly each input column of each matrix is driven, in the two forms that llama.cpp knows.

The GGUF form holds sums of squared activations and token counts per matrix (``X.in_sum2``, ``X.counts``), the legacy
``.dat`` form means multiplied by a number of calls (``tools/imatrix/imatrix.cpp``). Names are those of GGUF tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from lowbit.checkpoint.files import write_atomically
from lowbit.codecs.gguf.container import GgufFile, GgufTensor, is_gguf, read_blocks, read_gguf
from lowbit.codecs.gguf.metadata import MetadataValue, Typed
from lowbit.codecs.gguf.writing import TensorHeader, write_gguf
from lowbit.errors import CheckpointError, UsageError
from lowbit.formats.ggml.types import GGML_TYPES

__all__ = ["FORMS", "Form", "ImportanceMatrix", "read_imatrix", "write_imatrix"]

Form: TypeAlias = Literal["gguf", "dat"]
FORMS: tuple[Form, ...] = get_args(Form)
"""The forms of a file: ``gguf``, and the legacy ``dat``."""

_SUMS, _COUNTS = ".in_sum2", ".counts"
_WAY_OUT = "collect it again with lowbit imatrix"
_FULL = "free some disk space and run again"


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """Squared activations of the inputs of matrices.

    ``values``      GGUF tensor name to float32 ``[matrices, in_features]``: sums of squares of the inputs (one row per
                    expert; a legacy file has all experts in one row)
    ``counts``      tensor name to int64 ``[matrices]``, how many inputs each row sums (in a legacy file: the factor
                    that its means are multiplied by); 0 for an expert that was never chosen
    ``datasets``    where the text came from
    ``chunks``      how many pieces of text of ``chunk_size`` tokens were run
    """

    values: Mapping[str, npt.NDArray[np.float32]]
    counts: Mapping[str, npt.NDArray[np.int64]]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_size: int = 0

    def __len__(self) -> int:
        return len(self.values)

    def importance(self, name: str, matrices: int, columns: int) -> npt.NDArray[np.float32] | None:
        """Mean squared input float32 ``[matrices, columns]`` of tensor ``name``, or None where there is no entry.

        A matrix without a single input gets ones, as in llama.cpp. Raises :class:`CheckpointError` when the entry is
        for a tensor of another shape, which means that it was made for another model.
        """
        values = self.values.get(name)
        if values is None:
            return None
        counts = self.counts[name].astype(np.float32)
        if values.size != matrices * columns or len(counts) not in (1, matrices):
            raise CheckpointError(
                f"importance matrix: {name} has {values.size} values in {len(counts)} rows, the model needs "
                f"{matrices} x {columns}: it was made for another model: {_WAY_OUT}"
            )
        means = np.ones((len(counts), values.size // len(counts)), np.float32)
        np.divide(values.reshape(means.shape), counts[:, None], out=means, where=counts[:, None] > 0)
        return means.reshape(matrices, columns)


def read_imatrix(path: str | Path) -> ImportanceMatrix:
    """Read an importance matrix in either form, told apart by its first bytes.

    Raises :class:`CheckpointError` naming file and entry for one that is damaged or holds values that cannot be.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file: collect an importance matrix with lowbit imatrix, or --imatrix auto"
        )
    matrix = _from_gguf(read_gguf(path)) if is_gguf(path) else _from_dat(path)
    if not matrix.values:
        raise CheckpointError(f"{path}: an importance matrix without entries: {_WAY_OUT}")
    for name, values in matrix.values.items():
        if not (np.isfinite(values).all() and (values >= 0).all() and (matrix.counts[name] >= 0).all()):
            raise CheckpointError(f"{path}: {name}: a value is negative or not finite: {_WAY_OUT}")
    return matrix


def write_imatrix(path: str | Path, matrix: ImportanceMatrix, form: Form = "gguf", *, overwrite: bool = False) -> None:
    """Write ``matrix`` to ``path``, sorted by name, so that the same matrix gives the same bytes.

    The legacy form loses the counts of experts: one without input becomes all ones. Raises :class:`UsageError` if the
    file exists and ``overwrite`` is false, :class:`ResourceError` when the disk is full.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise UsageError(f"{path}: exists already: name another file, or --overwrite")
    if form == "gguf":
        _write_gguf(path, matrix)
        return
    data = _dat(matrix)
    write_atomically(path, [data], len(data), _FULL)


def _from_gguf(file: GgufFile) -> ImportanceMatrix:
    if file.metadata.get("general.type") != "imatrix" and not any(name.endswith(_SUMS) for name in file.tensors):
        raise CheckpointError(f"{file.path}: a GGUF file, but no importance matrix: {_WAY_OUT}")
    values, counts = {}, {}
    for stored, tensor in file.tensors.items():
        name = stored.removesuffix(_SUMS)
        if name == stored:
            continue
        if (beside := file.tensors.get(name + _COUNTS)) is None:
            raise CheckpointError(f"{file.path}: {name}: {stored} has no {_COUNTS} beside it: {_WAY_OUT}")
        values[name] = _floats(file, tensor)
        counts[name] = np.rint(_floats(file, beside)).astype(np.int64).reshape(-1)
        if len(values[name]) != len(counts[name]):
            raise CheckpointError(
                f"{file.path}: {name}: {len(values[name])} rows of sums and {len(counts[name])} counts: {_WAY_OUT}"
            )
    datasets = file.metadata.get("imatrix.datasets", ())
    return ImportanceMatrix(
        values,
        counts,
        tuple(map(str, datasets)) if isinstance(datasets, Sequence) and not isinstance(datasets, str) else (),
        _count(file, "imatrix.chunk_count"),
        _count(file, "imatrix.chunk_size"),
    )


def _floats(file: GgufFile, tensor: GgufTensor) -> npt.NDArray[np.float32]:
    """The numbers of an F32 tensor, ``[rows, columns]``."""
    if tensor.type.name != "F32":
        raise CheckpointError(
            f"{file.path}: {tensor.name} is {tensor.type}, an importance matrix holds F32: {_WAY_OUT}"
        )
    return read_blocks(tensor).view("<f4")


def _count(file: GgufFile, key: str) -> int:
    value = file.metadata.get(key, 0)
    return value if isinstance(value, int) else 0


def _write_gguf(path: Path, matrix: ImportanceMatrix) -> None:
    single = GGML_TYPES["F32"]
    headers, data = [], []
    for name in sorted(matrix.values):
        values = matrix.values[name]
        headers += [
            TensorHeader(f"{name}{_SUMS}", single, values.shape),
            TensorHeader(f"{name}{_COUNTS}", single, (len(matrix.counts[name]), 1)),
        ]
        data += [values.astype("<f4"), matrix.counts[name].astype("<f4")]
    metadata: dict[str, MetadataValue] = {
        "general.type": "imatrix",
        "imatrix.datasets": Typed("str", list(matrix.datasets)),
        "imatrix.chunk_count": matrix.chunks,
        "imatrix.chunk_size": matrix.chunk_size,
    }
    write_gguf(path, metadata, headers, data, overwrite=True)


def _dat(matrix: ImportanceMatrix) -> bytes:
    seen = [name for name in sorted(matrix.values) if matrix.counts[name].any()]
    parts = [struct.pack("<i", len(seen))]
    for name in seen:
        values, counts = matrix.values[name], matrix.counts[name]
        calls = -(-int(counts.max()) // max(1, matrix.chunk_size))
        rows = values.reshape(len(counts), -1)
        means = matrix.importance(name, *rows.shape)
        encoded = name.encode("utf-8")
        parts += [struct.pack("<i", len(encoded)), encoded, struct.pack("<ii", calls, values.size)]
        parts += [] if means is None else [(means * np.float32(calls)).astype("<f4").tobytes()]
    dataset = (matrix.datasets[-1] if matrix.datasets else "").encode("utf-8")
    parts += [struct.pack("<ii", matrix.chunks, len(dataset)), dataset]
    return b"".join(parts)


def _from_dat(path: Path) -> ImportanceMatrix:
    try:
        reader = _DatReader(path, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    entries = reader.integer("number of entries")
    if not 0 < entries <= len(reader.data) // 16:
        raise CheckpointError(f"{path}: neither a GGUF file nor a legacy importance matrix: {_WAY_OUT}")
    values, counts = {}, {}
    for index in range(entries):
        name = reader.text(f"name of entry {index}")
        counts[name] = np.array([reader.integer(f"calls of {name}") or 1], np.int64)
        length = reader.integer(f"length of {name}")
        values[name] = np.frombuffer(reader.take(4 * length, f"values of {name}"), "<f4").reshape(1, -1).copy()
    chunks, datasets = 0, []
    if reader.left:
        chunks = reader.integer("number of chunks")
    if reader.left:
        datasets.append(reader.text("data set"))
    return ImportanceMatrix(values, counts, tuple(name for name in datasets if name), chunks)


class _DatReader:
    """A cursor over a legacy file; every length is checked against what is left."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path = path
        self.data = data
        self._position = 0

    @property
    def left(self) -> int:
        """Bytes that lie ahead."""
        return len(self.data) - self._position

    def take(self, count: int, what: str) -> bytes:
        """The next ``count`` bytes."""
        if not 0 <= count <= self.left:
            raise CheckpointError(f"{self.path}: truncated or no importance matrix ({what}): {_WAY_OUT}")
        self._position += count
        return self.data[self._position - count : self._position]

    def integer(self, what: str) -> int:
        """A signed 32-bit integer."""
        return int(struct.unpack("<i", self.take(4, what))[0])

    def text(self, what: str) -> str:
        """A string after its length."""
        try:
            return self.take(self.integer(f"length of {what}"), what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} is not valid UTF-8: {_WAY_OUT}") from error
