"""llama.cpp's tokenization with a SentencePiece vocabulary, in Python, to try a vocabulary before it is written.

Pieces are merged greedily: of all neighbours whose concatenation is a token, those with the highest score first, the
leftmost among equals (``src/llama-vocab.cpp``, tokenizer ``llama``). What is no token in the end becomes byte tokens.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Mapping, Sequence

from lowbit.codecs.gguf.token_table import CONTROL, UNKNOWN, USER_DEFINED

__all__ = ["SPACE", "PieceMerger", "byte_token", "partition"]

SPACE = "▁"
"""SentencePiece's sign for a space."""


def byte_token(byte: int) -> str:
    """The token that stands for one byte."""
    return f"<0x{byte:02X}>"


def partition(text: str, special: Sequence[tuple[str, int]]) -> list[str | int]:
    """``text`` cut at the special tokens in it: pieces of text and token ids. ``special`` is tried in its order."""
    parts: list[str | int] = [text] if text else []
    for token, id in special:
        if token not in text:
            continue
        cut: list[str | int] = []
        for part in parts:
            if isinstance(part, int):
                cut.append(part)
                continue
            for index, rest in enumerate(part.split(token)):
                cut += [id] if index else []
                cut += [rest] if rest else []
        parts = cut
    return parts


class PieceMerger:
    """A vocabulary ready to encode: the same token ids as llama.cpp's, without BOS and EOS."""

    def __init__(
        self, tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], *, add_space_prefix: bool
    ) -> None:
        self._ids: Mapping[str, int] = {text: id for id, text in enumerate(tokens)}
        # As the file has them: ties among float32 scores are broken by position.
        self._scores = struct.unpack(f"<{len(scores)}f", struct.pack(f"<{len(scores)}f", *scores))
        self._prefix = add_space_prefix
        apart = [
            (text, id)
            for id, (text, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (CONTROL, USER_DEFINED, UNKNOWN)
        ]
        self._special = sorted(apart, key=lambda entry: -len(entry[0].encode("utf-8")))

    def ids(self, text: str, *, spaced: bool = False) -> list[int]:
        """Token ids of ``text``, special tokens in it recognised; with ``spaced`` it needs no space in front."""
        found: list[int] = []
        after_special = not spaced
        for part in partition(text, self._special):
            if isinstance(part, int):
                found.append(part)
                after_special = True
                continue
            prefix = " " if self._prefix and after_special else ""
            for piece in self._merged((prefix + part).replace(" ", SPACE)):
                found += self._ids_of(piece)
            after_special = False
        return found

    def _ids_of(self, piece: str) -> list[int]:
        id = self._ids.get(piece)
        if id is not None:
            return [id]
        return [self._ids[byte_token(byte)] for byte in piece.encode("utf-8")]

    def _merged(self, text: str) -> list[str]:
        pieces = list(text)
        following = [*range(1, len(pieces)), -1]
        previous = list(range(-1, len(pieces) - 1))
        queue: list[tuple[float, int, int, str]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                both = pieces[left] + pieces[right]
                id = self._ids.get(both)
                if id is not None:
                    heapq.heappush(queue, (-self._scores[id], left, right, both))

        for index in range(1, len(pieces)):
            offer(index - 1, index)
        while queue:
            _, left, right, both = heapq.heappop(queue)
            if not pieces[left] or not pieces[right] or len(pieces[left]) + len(pieces[right]) != len(both):
                continue
            pieces[left], pieces[right] = both, ""
            following[left] = following[right]
            if following[right] >= 0:
                previous[following[right]] = left
            offer(previous[left], left)
            offer(left, following[left])
        return [piece for piece in pieces if piece]
