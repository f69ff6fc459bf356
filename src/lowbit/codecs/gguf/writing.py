"""Writing GGUF files as a stream: the header is known first, the tensors' bytes follow piece by piece.

The same input gives the same bytes. Every file appears by rename after fsync, all parts of a split model together at
the end, so a kill or a full disk leaves what was there before.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lowbit.checkpoint.files import TEMPORARY, FileRecord, HashedFile, disk_errors, sync_directory
from lowbit.codecs.gguf.metadata import MetadataValue, Typed, encode_string, encode_value
from lowbit.errors import UnsupportedError, UsageError
from lowbit.formats.ggml.types import GgmlType

__all__ = ["MAX_NAME_BYTES", "Piece", "TensorHeader", "WrittenFile", "output_paths", "write_gguf"]

MAX_NAME_BYTES = 63
"""Longest tensor name that ggml holds."""
DEFAULT_ALIGNMENT = 32
_VERSION = 3
_WAY_OUT = "free some disk space and run the same command again"

Piece: TypeAlias = "bytes | bytearray | memoryview | npt.NDArray[Any]"
"""Consecutive bytes of a tensor."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A tensor to be written: ``shape`` has the outermost extent first."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Stored bytes, padding not counted."""
        rows = 1
        for extent in self.shape[:-1]:
            rows *= extent
        return rows * self.type.row_bytes(self.shape[-1])


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file that was written, with its sha256 and length."""

    path: Path
    record: FileRecord


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, MetadataValue],
    tensors: Sequence[TensorHeader],
    data: Iterable[Piece],
    *,
    split_bytes: int | None = None,
    overwrite: bool = False,
) -> tuple[WrittenFile, ...]:
    """Write a GGUF file, or with ``split_bytes`` as many as keep each below that size (never fewer than one tensor).

    ``data`` yields the tensors' bytes in the order of ``tensors``, each tensor in one piece or several; no piece
    reaches into the next tensor. A piece is not used any more when the next one is asked for. Returns the files in
    order, one under the name ``path`` itself, several under ``NAME-00001-of-0000N.gguf``.

    Raises :class:`UsageError` if a file exists and ``overwrite`` is false, :class:`UnsupportedError` for a name, shape
    or value that the format cannot hold, :class:`ResourceError` when the disk is full.
    """
    path = Path(path)
    _check(tensors)
    alignment = _alignment(metadata)
    groups = _split(tensors, split_bytes, alignment)
    paths = _names(path, len(groups))
    if not overwrite and (taken := next((file for file in paths if file.exists()), None)):
        raise UsageError(f"{taken}: exists already: name another file, or --overwrite")
    headers = [
        _header(_shard_metadata(metadata, number, len(groups), len(tensors)), group, alignment)
        for number, group in enumerate(groups)
    ]
    pieces = iter(data)
    temporaries = [file.with_name(file.name + TEMPORARY) for file in paths]
    records = []
    try:
        for file, temporary, header, group in zip(paths, temporaries, headers, groups, strict=True):
            size = len(header) + sum(_padded(tensor.nbytes, alignment) for tensor in group)
            with disk_errors(file, size, _WAY_OUT):
                file.parent.mkdir(parents=True, exist_ok=True)
                records.append(_write_file(temporary, header, group, pieces, alignment))
        if next(pieces, None) is not None:
            raise ValueError("more data than the tensors take")
        for file, temporary in zip(paths, temporaries, strict=True):
            with disk_errors(file, 0, _WAY_OUT):
                temporary.replace(file)
        with disk_errors(path, 0, _WAY_OUT):
            sync_directory(path.parent)
    except BaseException:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise
    return tuple(WrittenFile(file, record) for file, record in zip(paths, records, strict=True))


def output_paths(
    path: str | os.PathLike[str], tensors: Sequence[TensorHeader], split_bytes: int | None = None
) -> list[Path]:
    """The files that :func:`write_gguf` writes for ``tensors`` at the default alignment."""
    return _names(Path(path), len(_split(tensors, split_bytes, DEFAULT_ALIGNMENT)))


def gguf_file_size(metadata: Mapping[str, MetadataValue], tensors: Sequence[TensorHeader]) -> int:
    """Bytes of the single file that :func:`write_gguf` would write."""
    alignment = _alignment(metadata)
    header = len(_header(metadata, tensors, alignment))
    return header + sum(_padded(tensor.nbytes, alignment) for tensor in tensors)


def _check(tensors: Sequence[TensorHeader]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        where = f"tensor {tensor.name!r}"
        if not 0 < len(tensor.name.encode("utf-8")) <= MAX_NAME_BYTES or tensor.name in seen:
            raise UnsupportedError(f"{where}: GGUF wants distinct names of 1 to {MAX_NAME_BYTES} bytes")
        if not 1 <= len(tensor.shape) <= 4 or min(tensor.shape) < 1:
            raise UnsupportedError(f"{where}: GGUF cannot hold the shape {list(tensor.shape)}, only 1 to 4 dimensions")
        if not tensor.type.fits(tensor.shape[-1]):
            raise UnsupportedError(
                f"{where}: rows of {tensor.shape[-1]} are no whole blocks of {tensor.type.block_size}",
                [f"{tensor.type} cannot hold it, choose another type"],
            )
        seen.add(tensor.name)


def _alignment(metadata: Mapping[str, MetadataValue]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    number = value.value if isinstance(value, Typed) else value
    if not isinstance(number, int) or number < 8 or number & (number - 1):
        raise UnsupportedError(f"general.alignment must be a power of two from 8, not {number!r}")
    return number


def _padded(size: int, alignment: int) -> int:
    return size + -size % alignment


def _split(tensors: Sequence[TensorHeader], limit: int | None, alignment: int) -> list[list[TensorHeader]]:
    groups: list[list[TensorHeader]] = [[]]
    size = 0
    for tensor in tensors:
        extent = _padded(tensor.nbytes, alignment)
        if limit is not None and groups[-1] and size + extent > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += extent
    return groups


def _names(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    stem = path.name.removesuffix(".gguf")
    return [path.with_name(f"{stem}-{number + 1:05d}-of-{count:05d}.gguf") for number in range(count)]


def _shard_metadata(
    metadata: Mapping[str, MetadataValue], number: int, count: int, tensors: int
) -> Mapping[str, MetadataValue]:
    if count == 1:
        return metadata
    split = {
        "split.no": Typed("u16", number),
        "split.count": Typed("u16", count),
        "split.tensors.count": Typed("i32", tensors),
    }
    kept = metadata if number == 0 else {key: metadata[key] for key in ("general.alignment",) if key in metadata}
    return {**kept, **split}


def _header(metadata: Mapping[str, MetadataValue], tensors: Sequence[TensorHeader], alignment: int) -> bytes:
    parts = [b"GGUF", _VERSION.to_bytes(4, "little")]
    parts += [len(tensors).to_bytes(8, "little"), len(metadata).to_bytes(8, "little")]
    for key, value in metadata.items():
        parts += [encode_string(key), encode_value(key, value)]
    offset = 0
    for tensor in tensors:
        sizes = b"".join(extent.to_bytes(8, "little") for extent in reversed(tensor.shape))
        parts += [encode_string(tensor.name), len(tensor.shape).to_bytes(4, "little"), sizes]
        parts += [tensor.type.id.to_bytes(4, "little"), offset.to_bytes(8, "little")]
        offset += _padded(tensor.nbytes, alignment)
    header = b"".join(parts)
    return header.ljust(_padded(len(header), alignment), b"\0")


def _write_file(
    path: Path, header: bytes, tensors: Sequence[TensorHeader], pieces: Iterator[Piece], alignment: int
) -> FileRecord:
    with HashedFile(path) as file:
        file.write(memoryview(header))
        for tensor in tensors:
            left = tensor.nbytes
            while left:
                piece = next(pieces, None)
                view = memoryview(b"") if piece is None else _bytes_of(piece)
                if not 0 < len(view) <= left:
                    raise ValueError(f"tensor {tensor.name}: a piece of {len(view)} bytes where {left} are to come")
                file.write(view)
                left -= len(view)
            file.write(memoryview(bytes(-tensor.nbytes % alignment)))
        return file.finish()


def _bytes_of(piece: Piece) -> memoryview:
    if isinstance(piece, np.ndarray):
        return np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
    return memoryview(piece).cast("B")
