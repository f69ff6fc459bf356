"""The typed values of a GGUF header, from Python and back, and a cursor over a header that believes nothing.

Values are little endian: numbers of 1 to 8 bytes, strings as a u64 length and UTF-8, arrays as an element type, a u64
count and the elements (ggml's ``docs/gguf.md``).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np

from lowbit.errors import CheckpointError, UnsupportedError

__all__ = ["MAX_HEADER_BYTES", "Cursor", "MetadataValue", "Scalar", "Typed", "Value", "encode_string", "encode_value"]

Scalar: TypeAlias = bool | int | float | str
Value: TypeAlias = "Scalar | Sequence[Scalar]"
"""What reading gives: a scalar or a list of one kind."""

MAX_HEADER_BYTES = 256 << 20
"""Longest header that is read. The largest vocabularies take some 30 MB."""
MAX_STRING_BYTES = 64 << 20
_CHUNK = 1 << 20

_NUMBERS: Mapping[str, tuple[int, str]] = {
    "u8": (0, "<B"),
    "i8": (1, "<b"),
    "u16": (2, "<H"),
    "i16": (3, "<h"),
    "u32": (4, "<I"),
    "i32": (5, "<i"),
    "f32": (6, "<f"),
    "bool": (7, "<B"),
    "u64": (10, "<Q"),
    "i64": (11, "<q"),
    "f64": (12, "<d"),
}
"""Number kinds: their type id and how they lie in the file."""
_STRING, _ARRAY = 8, 9
_BY_ID = {code: (kind, layout) for kind, (code, layout) in _NUMBERS.items()}


@dataclass(frozen=True, slots=True)
class Typed:
    """A value whose stored type is chosen: ``kind`` of a scalar or of each element of a list.

    ``kind`` is one of u8 i8 u16 i16 u32 i32 u64 i64 f32 f64 bool str.
    """

    kind: str
    value: Value


MetadataValue: TypeAlias = "Value | Typed"
"""What can be written: a plain value (see :func:`encode_value`) or a :class:`Typed` one."""


def encode_string(text: str) -> bytes:
    """A string as it lies in the file."""
    data = text.encode("utf-8")
    return len(data).to_bytes(8, "little") + data


def encode_value(key: str, value: MetadataValue) -> bytes:
    """Type id and bytes of a metadata value.

    Plain ints become u32, or u64 / i64 where they do not fit; floats f32. Elements of a list share one type: i32 (u32,
    i64, u64) for ints. Raises :class:`UnsupportedError` naming ``key`` for an empty untyped list, a mixture, a number
    out of its kind's range or a string that is not Unicode.
    """
    kind, plain = (value.kind, value.value) if isinstance(value, Typed) else (_kind(key, value), value)
    if kind != "str" and kind not in _NUMBERS:
        raise UnsupportedError(f"metadata key {key}: GGUF has no type {kind!r}")
    if isinstance(plain, str) or not isinstance(plain, Sequence):
        return _type_id(kind).to_bytes(4, "little") + _encode_elements(key, kind, [plain])
    prefix = struct.pack("<IIQ", _ARRAY, _type_id(kind), len(plain))
    return prefix + _encode_elements(key, kind, plain)


def _type_id(kind: str) -> int:
    return _STRING if kind == "str" else _NUMBERS[kind][0]


def _encode_elements(key: str, kind: str, values: Sequence[Scalar]) -> bytes:
    if kind == "str":
        if not all(isinstance(value, str) for value in values):
            raise UnsupportedError(f"metadata key {key}: not all values are strings")
        try:
            return b"".join(encode_string(str(value)) for value in values)
        except UnicodeEncodeError as error:
            raise UnsupportedError(f"metadata key {key}: a string is not valid Unicode") from error
    layout = _NUMBERS[kind][1]
    try:
        return struct.pack(f"<{len(values)}{layout[1]}", *values)
    except (struct.error, OverflowError) as error:
        raise UnsupportedError(f"metadata key {key}: {error} ({kind})") from error


def _kind(key: str, value: Value) -> str:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return _kind_of_all(key, [value], listed=False)
    if not value:
        raise UnsupportedError(f"metadata key {key}: an empty list has no type of its own: give it one")
    return _kind_of_all(key, value, listed=True)


def _kind_of_all(key: str, values: Sequence[Scalar], *, listed: bool) -> str:
    types = {type(value) for value in values}
    if types == {bool}:
        return "bool"
    if types == {str}:
        return "str"
    if types <= {float, int} and float in types:
        return "f32"
    if types != {int}:
        raise UnsupportedError(f"metadata key {key}: cannot hold {sorted(kind.__name__ for kind in types)}")
    low, high = min(map(int, values)), max(map(int, values))
    if listed and low >= -(2**31) and high < 2**31:
        return "i32"
    if low < 0:
        return "i64"
    return "u32" if high < 2**32 else "u64"


class Cursor:
    """Reads typed values off the start of a file, no byte more than the header and one chunk.

    A length or count is refused when it does not fit into what is left of the file, before anything is allocated for
    it. All errors are :class:`CheckpointError` and name the file.
    """

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self.position = 0
        self._file = file
        self._size = size
        self._path = path
        self._data = bytearray()

    @property
    def left(self) -> int:
        """Bytes of the file that lie ahead."""
        return self._size - self.position

    def fail(self, what: str) -> CheckpointError:
        """The error that ``what`` is wrong in this file."""
        return CheckpointError(f"{self._path}: {what}; download it again or convert the model anew")

    def need(self, count: int, what: str) -> int:
        """Make ``count`` bytes ahead available and step over them; returns where they begin."""
        start = self.position
        end = start + count
        if count > self.left:
            raise self.fail(f"truncated or corrupt: {what} needs {count:,} bytes, {self.left:,} are left")
        if end > MAX_HEADER_BYTES:
            raise self.fail(f"corrupt: the header would be longer than {MAX_HEADER_BYTES:,} bytes ({what})")
        while len(self._data) < end:
            piece = self._file.read(min(max(_CHUNK, end - len(self._data)), self._size - len(self._data)))
            if not piece:
                raise self.fail(f"truncated inside its header ({what})")
            self._data += piece
        self.position = end
        return start

    def number(self, kind: str, what: str) -> int:
        """An integer of ``kind``."""
        layout = _NUMBERS[kind][1]
        return int(struct.unpack_from(layout, self._data, self.need(struct.calcsize(layout), what))[0])

    def numbers(self, count: int, what: str) -> tuple[int, ...]:
        """``count`` u64 numbers."""
        return struct.unpack_from(f"<{count}Q", self._data, self.need(8 * count, what))

    def string(self, what: str) -> str:
        """A string; :class:`CheckpointError` if it is not UTF-8."""
        length = self.number("u64", f"length of {what}")
        if length > MAX_STRING_BYTES:
            raise self.fail(f"corrupt: {what} would be {length:,} bytes long")
        start = self.need(length, what)
        try:
            return self._data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"corrupt: {what} is not valid UTF-8") from error

    def value(self, what: str) -> Value:
        """A typed value: type id, then the scalar or the array."""
        code = self.number("u32", f"type of {what}")
        if code == _STRING:
            return self.string(what)
        if code != _ARRAY:
            return self._numbers(code, 1, what)[0]
        element = self.number("u32", f"element type of {what}")
        count = self.number("u64", f"length of {what}")
        if element == _STRING:
            return self._strings(count, what)
        if element == _ARRAY:
            raise self.fail(f"{what} is an array of arrays, which readers of GGUF do not accept")
        return self._numbers(element, count, what)

    def _numbers(self, code: int, count: int, what: str) -> list[Scalar]:
        if code not in _BY_ID:
            raise self.fail(f"corrupt: {what} has the unknown value type {code}")
        kind, layout = _BY_ID[code]
        width = struct.calcsize(layout)
        start = self.need(count * width, what)
        values = np.frombuffer(self._data, layout, count, start).copy()
        if kind != "bool":
            return values.tolist()  # type: ignore[no-any-return]
        if bool((values > 1).any()):
            raise self.fail(f"corrupt: {what} holds a truth value other than 0 and 1")
        return values.astype(np.bool_).tolist()  # type: ignore[no-any-return]

    def _strings(self, count: int, what: str) -> list[str]:
        if count * 8 > self.left:
            raise self.fail(f"truncated or corrupt: {count:,} strings ({what}) do not fit in {self.left:,} bytes")
        texts: list[str] = []
        data = self._data
        for _ in range(count):
            begin = self.position + 8
            end = begin + int.from_bytes(data[begin - 8 : begin], "little")
            if end > len(data):  # reaches beyond the chunk that is in memory, or beyond what there is
                texts.append(self.string(what))
                continue
            try:
                texts.append(data[begin:end].decode("utf-8"))
            except UnicodeDecodeError as error:
                raise self.fail(f"corrupt: {what} holds a string that is not valid UTF-8") from error
            self.position = end
        return texts
