"""The safetensors file: a validated header, tensors read on demand into memory of their own, deterministic writing.

Layout: 8 bytes little-endian header length, a JSON header ``{name: {dtype, shape, data_offsets}}`` with an optional
``__metadata__`` of strings, then the tensors' bytes without holes. Nothing of a file is believed before it is checked,
and no file stays mapped: reading a tensor copies its bytes, so resident memory holds what the caller holds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint.files import FileRecord, parse_json_object, write_atomically
from lowbit.errors import CheckpointError, UnsupportedError

__all__ = [
    "DTYPES",
    "TensorInfo",
    "check_rows",
    "layout",
    "read_bytes",
    "read_header",
    "read_rows",
    "read_tensor",
    "safetensors_bytes",
    "tensor_bytes",
    "write_safetensors",
]

MAX_HEADER_BYTES = 100_000_000
"""Longest header that readers of the format accept."""
_LFS_POINTER = b"version "
_MAX_DIMENSIONS = 64
_MAX_INDEX = 2**63 - 1

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""dtype names of the format and what they are in torch, by ascending alignment."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {name: rank for rank, name in enumerate(DTYPES)}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: ``start`` and ``end`` are byte offsets from the beginning of ``file``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Length of the stored bytes."""
        return self.end - self.start


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and validate the header of a safetensors file: tensors by name (file order), and the metadata.

    Checked: length of file and header, JSON, repeated names, dtypes, shapes (overflow too), and that the tensors
    fill the data without overlap or hole to the last byte. Raises :class:`CheckpointError` naming file and tensor.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start == _LFS_POINTER:
                raise CheckpointError(
                    f"{path}: a Git LFS pointer, not the weights: run `git lfs pull` in its repository"
                )
            if size < 8 or length > size - 8 or length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: {_header_problem(size, length)}")
            data = file.read(length)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; download the checkpoint again") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) != length:
        raise CheckpointError(f"{path}: truncated inside its header; download it again")
    entries = parse_json_object(data, f"{path}: header", unique=True)
    metadata = _read_metadata(entries.pop("__metadata__", None), path)
    base = 8 + length
    tensors = sorted(
        (_read_entry(name, entry, path, base) for name, entry in entries.items()),
        key=lambda info: (info.start, info.end),
    )
    _check_coverage(tensors, path, base, size)
    return {info.name: info for info in tensors}, metadata


def _header_problem(size: int, length: int) -> str:
    if size < 8:
        return f"{size} bytes are too few for a safetensors file; download it again"
    if length > MAX_HEADER_BYTES:
        return f"not a safetensors file: its header would be {length:,} bytes long (at most {MAX_HEADER_BYTES:,})"
    return f"truncated: the header needs {length + 8:,} bytes, the file has {size:,}; download it again"


def _read_metadata(value: object, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise CheckpointError(f"{path}: __metadata__ must map names to strings")
    return value


def _read_entry(name: str, entry: object, path: Path, base: int) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where}: the name is not valid Unicode") from error
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: expected an object with dtype, shape and data_offsets")
    code = entry.get("dtype")
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: dtype {code!r} is not one of {', '.join(DTYPES)}")
    shape = _integers(entry.get("shape"))
    if shape is None or len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(f"{where}: shape {entry.get('shape')!r:.200} is not a list of sizes")
    offsets = _integers(entry.get("data_offsets"))
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {entry.get('data_offsets')!r:.200} are not [begin, end]")
    count = 1
    for extent in shape:
        count *= max(extent, 1)
    if count * dtype.itemsize > _MAX_INDEX:
        raise CheckpointError(f"{where}: shape {list(shape)!r:.200} overflows")
    needed = 0 if 0 in shape else count * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            f"{where}: {code} {list(shape)!r:.200} takes {needed:,} bytes, its offsets span {offsets[1] - offsets[0]:,}"
        )
    return TensorInfo(name, dtype, shape, path, base + offsets[0], base + offsets[1])


def _integers(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list):
        return None
    if not all(type(item) is int and 0 <= item <= _MAX_INDEX for item in value):
        return None
    return tuple(value)


def _check_coverage(tensors: Sequence[TensorInfo], path: Path, base: int, size: int) -> None:
    position = base
    for info in tensors:
        if info.start != position:
            what = "overlaps the tensor before it" if info.start < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {info.name!r} {what} (byte {info.start:,}, expected {position:,})")
        position = info.end
    if position > size:
        raise CheckpointError(f"{path}: truncated: {size:,} bytes, its header promises {position:,}; download it again")
    if position < size:
        raise CheckpointError(f"{path}: {size - position:,} bytes more than its header describes; download it again")


def _fill(file: Any, start: int, view: memoryview, info: TensorInfo) -> None:
    """Read ``len(view)`` bytes at ``start`` into ``view``."""
    file.seek(start)
    while len(view):
        count = file.readinto(view)
        if not count:
            raise CheckpointError(f"{info.file}: truncated while reading tensor {info.name!r}; download it again")
        view = view[count:]


def _shaped(data: torch.Tensor, info: TensorInfo, shape: Sequence[int]) -> torch.Tensor:
    if info.dtype == torch.bool:
        return (data != 0).reshape(tuple(shape))
    return data.view(info.dtype).reshape(tuple(shape))


def _read_raw(info: TensorInfo, first: int = 0, count: int | None = None) -> torch.Tensor:
    """``count`` bytes of the tensor from ``first``, or all."""
    data = torch.empty(info.nbytes if count is None else count, dtype=torch.uint8)
    try:
        with info.file.open("rb", buffering=0) as file:
            _fill(file, info.start + first, data.numpy().data, info)
    except OSError as error:
        raise CheckpointError(f"{info.file}: tensor {info.name!r}: {error.strerror or error}") from error
    return data


def read_bytes(info: TensorInfo) -> memoryview:
    """The stored bytes of a tensor, copied into memory of their own (writable)."""
    return _read_raw(info).numpy().data


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """The tensor, in its stored dtype and shape, in memory of its own. Thread-safe.

    Raises :class:`CheckpointError` if the file shrank or cannot be read.
    """
    return _shaped(_read_raw(info), info, info.shape)


def check_rows(info: TensorInfo, rows: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """``rows`` as int64 ``[n]``; :class:`CheckpointError` if the tensor lacks one of them."""
    if not info.shape:
        raise CheckpointError(f"{info.file}: tensor {info.name!r} is a scalar and has no rows")
    if isinstance(rows, torch.Tensor):
        wanted = rows.detach().reshape(-1).to("cpu", torch.long)
    else:
        wanted = torch.tensor(list(rows), dtype=torch.long)
    if len(wanted):
        low, high = int(wanted.min()), int(wanted.max())
        if low < 0 or high >= info.shape[0]:
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} has {info.shape[0]} rows, row {low if low < 0 else high} was asked "
                "for; do tokenizer and model belong together?"
            )
    return wanted


def read_rows(info: TensorInfo, rows: torch.Tensor | Sequence[int]) -> torch.Tensor:
    """Rows of a tensor ``[n, ...]``, in the order asked (repeats allowed), without reading the others.

    Neighbouring rows are read in one go, so ``range(a, b)`` costs one read. Raises :class:`CheckpointError` for a row
    outside the tensor.
    """
    if isinstance(rows, range) and rows.step == 1 and rows:
        check_rows(info, (rows[0], rows[-1]))
        width = info.nbytes // info.shape[0]
        return _shaped(_read_raw(info, rows[0] * width, len(rows) * width), info, (len(rows), *info.shape[1:]))
    wanted = check_rows(info, rows)
    shape = (len(wanted), *info.shape[1:])
    if not len(wanted):
        return torch.empty(shape, dtype=info.dtype)
    distinct, inverse = torch.unique(wanted, return_inverse=True)
    width = info.nbytes // info.shape[0]
    data = torch.empty(len(distinct) * width, dtype=torch.uint8)
    view = data.numpy().data
    breaks = (torch.nonzero(distinct[1:] != distinct[:-1] + 1).reshape(-1) + 1).tolist()
    starts = distinct[[0, *breaks]].tolist()
    try:
        with info.file.open("rb", buffering=0) as file:
            for start, first, last in zip(starts, [0, *breaks], [*breaks, len(distinct)], strict=True):
                _fill(file, info.start + start * width, view[first * width : last * width], info)
    except OSError as error:
        raise CheckpointError(f"{info.file}: tensor {info.name!r}: {error.strerror or error}") from error
    if not torch.equal(wanted, distinct):
        data = data.reshape(len(distinct), width)[inverse].reshape(-1)
    return _shaped(data, info, shape)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def layout(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, list[str]]:
    """Header bytes (length prefix included) and the order in which the tensors' bytes follow.

    Tensors are ordered by falling alignment, then name, as the reference implementation does.
    """
    codes: dict[str, str] = {}
    for name, (dtype, _) in tensors.items():
        if dtype not in _NAMES:
            raise UnsupportedError(f"tensor {name!r}: safetensors cannot hold {dtype}")
        codes[name] = _NAMES[dtype]
    order = sorted(tensors, key=lambda name: (-_RANK[codes[name]], name))
    entries: dict[str, Any] = {"__metadata__": dict(sorted((metadata or {"format": "pt"}).items()))}
    position = 0
    for name in order:
        dtype, shape = tensors[name]
        count = dtype.itemsize
        for extent in shape:
            count *= extent
        entries[name] = {"dtype": codes[name], "shape": list(shape), "data_offsets": [position, position + count]}
        position += count
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, order


def safetensors_bytes(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[int, Iterator[bytes | memoryview]]:
    """The size of the file that holds ``tensors``, and its bytes piece by piece (one tensor in memory at a time)."""
    header, order = layout({name: (item.dtype, item.shape) for name, item in tensors.items()}, metadata)
    size = len(header) + sum(item.numel() * item.element_size() for item in tensors.values())

    def pieces() -> Iterator[bytes | memoryview]:
        yield header
        for name in order:
            yield tensor_bytes(tensors[name])

    return size, pieces()


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    way_out: str = "free some disk space",
) -> FileRecord:
    """Write a safetensors file atomically, the same bytes for the same tensors; returns its sha256 and length.

    ``metadata`` defaults to ``{"format": "pt"}``. Raises :class:`ResourceError` (ending in ``way_out``) when the disk
    is full, :class:`UnsupportedError` for a dtype that the format lacks.
    """
    size, pieces = safetensors_bytes(tensors, metadata)
    return write_atomically(Path(path), pieces, size, way_out)
