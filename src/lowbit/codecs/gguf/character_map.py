"""SentencePiece's map of characters to what they are normalized to (``precompiled_charsmap``).

The map is a double-array trie over UTF-8 bytes (darts-clone's layout) whose leaves point into a list of replacements
that end in a zero byte. At each place the longest key counts.
"""

from __future__ import annotations

import struct

__all__ = ["CharacterMap"]


class CharacterMap:
    """The map, read from its bytes. Raises :class:`ValueError` for bytes that are not one."""

    def __init__(self, data: bytes) -> None:
        if len(data) < 4:
            raise ValueError("it is truncated")
        (size,) = struct.unpack_from("<I", data)
        if size % 4 or size + 4 >= len(data) or size == 0:
            raise ValueError("its trie does not fit")
        self.data = data
        self._units: tuple[int, ...] = struct.unpack_from(f"<{size // 4}I", data, 4)
        self._replacements = data[4 + size :]

    def apply(self, text: str) -> str:
        """``text`` normalized."""
        data = text.encode("utf-8")
        found = bytearray()
        at = 0
        while at < len(data):
            replacement, length = self._longest(data, at)
            if not length:
                length = _length(data[at])
                replacement = data[at : at + length]
            found += replacement
            at += length
        return found.decode("utf-8", errors="replace")

    def _longest(self, data: bytes, start: int) -> tuple[bytes, int]:
        """The replacement of the longest key at ``start``, and the key's length, 0 for none."""
        place, length = 0, 0
        node = _base(self._unit(0))
        for at in range(start, len(data)):
            byte = data[at]
            if not byte:
                break
            node ^= byte
            unit = self._unit(node)
            if unit & 0x800000FF != byte:
                break
            node ^= _base(unit)
            if unit >> 8 & 1:
                length = at - start + 1
                place = self._unit(node) & 0x7FFFFFFF
        if not length:
            return b"", 0
        end = self._replacements.find(b"\0", place)
        if end < 0:
            raise ValueError("a replacement does not end")
        return self._replacements[place:end], length

    def _unit(self, index: int) -> int:
        if index >= len(self._units):
            raise ValueError("its trie points outside itself")
        return self._units[index]


def _base(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)


def _length(first: int) -> int:
    """Bytes of the character that begins with ``first``."""
    return 1 if first < 0xC0 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
