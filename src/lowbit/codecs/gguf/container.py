"""The GGUF container: a validated header, blocks read on demand into memory of their own, streaming writing.

Layout (version 3, little endian; ggml's ``docs/gguf.md``): ``GGUF``, u32 version, u64 number of tensors, u64 number of
metadata entries; the entries (key, type, value); the tensors (name, u32 rank, u64 sizes innermost first, u32 type, u64
offset); padding; the tensors' bytes, each begun at a multiple of ``general.alignment``. A model may lie in several
files, ``name-00001-of-00003.gguf``, the first with the metadata of all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from lowbit.codecs.gguf.metadata import Cursor, MetadataValue, Typed, Value
from lowbit.codecs.gguf.writing import MAX_NAME_BYTES, TensorHeader, WrittenFile, write_gguf
from lowbit.errors import CheckpointError
from lowbit.formats.ggml.types import GGML_IDS, GgmlType

__all__ = [
    "GgufFile",
    "GgufTensor",
    "MetadataValue",
    "TensorHeader",
    "Typed",
    "Value",
    "WrittenFile",
    "is_gguf",
    "open_gguf",
    "read_blocks",
    "read_gguf",
    "read_gguf_stream",
    "write_gguf",
]

MAGIC = b"GGUF"
MAX_ALIGNMENT = 1 << 20
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
_MAX_INDEX = 2**63 - 1
_MAX_SHARDS = 65535
_ENTRY_BYTES = 8 + 4 + 1
_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor lies: ``start`` is its byte offset in ``file``; ``shape`` has the outermost extent first."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    @property
    def rows(self) -> int:
        """Number of rows: the product of all extents but the last."""
        return self.nbytes // self.row_bytes

    @property
    def columns(self) -> int:
        """Numbers in a row."""
        return self.shape[-1]

    @property
    def row_bytes(self) -> int:
        """Stored bytes of a row."""
        return self.type.row_bytes(self.shape[-1])


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A validated header; of a split model, the metadata of the first file and the tensors of all.

    ``path`` is the file that was named, or the first of a split model; ``files`` are all of them.
    """

    path: Path
    version: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]
    alignment: int
    files: tuple[Path, ...]


def is_gguf(path: Path) -> bool:
    """Whether ``path`` is a file that begins as a GGUF file does, or is named like one."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Read and validate the header of one GGUF file (of a split model: that file's tensors alone).

    Checked: magic, version, every count and length against the bytes left, UTF-8, repeated keys and tensors, names of
    at most 63 bytes, rank, overflow, types, rows that are whole blocks, alignment, and that tensors lie inside the file
    without overlap. Raises :class:`CheckpointError` naming file and field.
    """
    path = Path(path)
    try:
        with path.open("rb", buffering=0) as file:
            return read_gguf_stream(file, os.fstat(file.fileno()).st_size, path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def open_gguf(
    path: str | os.PathLike[str],
    *,
    read: Callable[[Path], GgufFile] = read_gguf,
    exists: Callable[[Path], bool] = Path.is_file,
) -> GgufFile:
    """:func:`read_gguf`, and where the model is split, of all its files; any of them may be named.

    ``read`` and ``exists`` stand in for the file system where the files are elsewhere. Raises :class:`CheckpointError`
    for a file that is missing or contradicts the others.
    """
    first = read(Path(path))
    count = _count(first, "split.count")
    if count <= 1:
        return first
    path = Path(path)
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(f"{path}: is one of {count} files, which must be called NAME-00001-of-{count:05d}.gguf")
    shards = []
    for number in range(count):
        name = path.with_name(f"{match['stem']}-{number + 1:05d}-of-{count:05d}.gguf")
        if not exists(name):
            raise CheckpointError(f"{name}: this part of the model is missing, there are {count}; download it again")
        shards.append(first if name == path else read(name))
    return _merged(shards)


def _merged(shards: Sequence[GgufFile]) -> GgufFile:
    tensors: dict[str, GgufTensor] = {}
    for number, shard in enumerate(shards):
        if _count(shard, "split.no") != number or _count(shard, "split.count") != len(shards):
            raise CheckpointError(f"{shard.path}: split.no and split.count contradict its name; download it again")
        if twice := next((name for name in shard.tensors if name in tensors), None):
            raise CheckpointError(f"{shard.path}: tensor {twice!r} is also in {tensors[twice].file.name}")
        tensors |= shard.tensors
    promised = _count(shards[0], "split.tensors.count", len(tensors))
    if promised != len(tensors):
        raise CheckpointError(
            f"{shards[0].path}: split.tensors.count says {promised} tensors, the files hold {len(tensors)}"
        )
    files = tuple(shard.path for shard in shards)
    return replace(shards[0], tensors=MappingProxyType(tensors), files=files)


def _count(file: GgufFile, key: str, default: int = 0) -> int:
    value = file.metadata.get(key, default)
    if type(value) is not int or not 0 <= value <= _MAX_INDEX:
        raise CheckpointError(f"{file.path}: {key} must be a count, not {value!r:.80}")
    if key == "split.count" and value > _MAX_SHARDS:
        raise CheckpointError(f"{file.path}: split.count {value} is too large")
    return value


def read_gguf_stream(file: BinaryIO, size: int, path: Path) -> GgufFile:
    """:func:`read_gguf` of ``size`` bytes that are read from ``file``, no more of them than the header and a piece of
    1 MiB; ``path`` is what they are called."""
    cursor = Cursor(file, size, path)
    if size < 24:
        raise cursor.fail(f"{size} bytes are too few for a GGUF file")
    _check_magic(file, path)
    cursor.number("u32", "magic")
    version = cursor.number("u32", "version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        what = "a big-endian file" if swapped else f"version {version}"
        raise CheckpointError(f"{path}: GGUF {what} is not read, only little-endian version 3 (and 2): convert it anew")
    tensor_count = cursor.number("u64", "number of tensors")
    entry_count = cursor.number("u64", "number of metadata entries")
    if tensor_count * _TENSOR_BYTES + entry_count * _ENTRY_BYTES > cursor.left:
        raise cursor.fail(
            f"truncated or corrupt: {tensor_count:,} tensors and {entry_count:,} metadata entries do not fit in "
            f"{size:,} bytes"
        )
    metadata: dict[str, Value] = {}
    for _ in range(entry_count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise cursor.fail(f"corrupt: metadata key {key!r:.80} appears twice")
        metadata[key] = cursor.value(f"metadata key {key!r:.80}")
    alignment = _alignment(metadata, cursor)
    found = [_read_tensor(cursor, path) for _ in range(tensor_count)]
    base = cursor.position + -cursor.position % alignment
    return GgufFile(
        path, version, MappingProxyType(metadata), _placed(found, base, alignment, size, cursor), alignment, (path,)
    )


def _check_magic(file: BinaryIO, path: Path) -> None:
    start = file.read(len(_LFS_POINTER))
    file.seek(0)
    if start == _LFS_POINTER:
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
    if start[: len(MAGIC)] != MAGIC:
        raise CheckpointError(f"{path}: not a GGUF file (it begins with {start[:4]!r}, not {MAGIC!r})")


def _alignment(metadata: Mapping[str, Value], cursor: Cursor) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise cursor.fail(f"corrupt: general.alignment {value!r:.80} is not a power of two up to {MAX_ALIGNMENT:,}")
    return value


def _read_tensor(cursor: Cursor, path: Path) -> GgufTensor:
    """One tensor's entry, with the offset as stored."""
    name = cursor.string("a tensor's name")
    where = f"tensor {name!r:.80}"
    if not 0 < len(name.encode("utf-8")) <= MAX_NAME_BYTES:
        raise cursor.fail(f"corrupt: {where}: a name has 1 to {MAX_NAME_BYTES} bytes")
    rank = cursor.number("u32", f"rank of {where}")
    if not 1 <= rank <= _MAX_DIMENSIONS:
        raise cursor.fail(f"corrupt: {where} has {rank} dimensions, 1 to {_MAX_DIMENSIONS} are possible")
    shape = tuple(reversed(cursor.numbers(rank, f"shape of {where}")))
    code = cursor.number("u32", f"type of {where}")
    offset = cursor.number("u64", f"offset of {where}")
    kind = GGML_IDS.get(code)
    if kind is None:
        known = ", ".join(found.name for found in GGML_IDS.values())
        raise CheckpointError(f"{path}: {where} has tensor type {code}, which is none of {known}")
    rows = 1
    for extent in shape[:-1]:
        rows *= extent
    if not 0 < rows * shape[-1] * 8 <= _MAX_INDEX or not offset <= _MAX_INDEX:
        raise cursor.fail(f"corrupt: shape {list(shape)} or offset {offset} of {where} is empty or overflows")
    if shape[-1] % kind.block_size:
        raise cursor.fail(f"corrupt: {where}: rows of {shape[-1]} are no whole blocks of {kind.block_size} ({kind})")
    return GgufTensor(name, kind, shape, path, offset, rows * kind.row_bytes(shape[-1]))


def _placed(
    found: Sequence[GgufTensor], base: int, alignment: int, size: int, cursor: Cursor
) -> Mapping[str, GgufTensor]:
    """The tensors by name in file order, their offsets counted from the file's beginning."""
    tensors: dict[str, GgufTensor] = {}
    position, previous = base, ""
    for tensor in sorted(found, key=lambda item: (item.start, item.name)):
        start = base + tensor.start
        if tensor.name in tensors:
            raise cursor.fail(f"corrupt: tensor {tensor.name!r} appears twice")
        if tensor.start % alignment:
            raise cursor.fail(f"corrupt: tensor {tensor.name!r} is not aligned to {alignment} bytes")
        if start < position:
            raise cursor.fail(f"corrupt: tensors {previous!r} and {tensor.name!r} overlap")
        position, previous = start + tensor.nbytes, tensor.name
        if position > size:
            raise cursor.fail(
                f"truncated: tensor {tensor.name!r} ends at byte {position:,}, the file has {size:,} bytes"
            )
        tensors[tensor.name] = replace(tensor, start=start)
    return MappingProxyType({tensor.name: tensors[tensor.name] for tensor in found})


def read_blocks(tensor: GgufTensor, first: int = 0, last: int | None = None) -> npt.NDArray[np.uint8]:
    """Rows ``first`` to ``last`` (default: all) as stored, uint8 ``[rows, row_bytes]``, in memory of their own.

    Rows of a tensor of more than two dimensions are counted through. Thread-safe. Raises :class:`CheckpointError` if
    the file shrank or cannot be read.
    """
    width = tensor.row_bytes
    last = tensor.rows if last is None else last
    if not 0 <= first <= last <= tensor.rows:
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r} has {tensor.rows} rows, not {first} to {last}")
    data = np.empty((last - first, width), np.uint8)
    view = data.reshape(-1).data
    try:
        with tensor.file.open("rb", buffering=0) as file:
            file.seek(tensor.start + first * width)
            while len(view):
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(f"{tensor.file}: truncated while reading tensor {tensor.name!r}")
                view = view[count:]
    except OSError as error:
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r}: {error.strerror or error}") from error
    return data
