"""SentencePiece vocabularies of the unigram kind (XLM-R, T5): the likeliest way to cut a text into tokens.

:class:`UnigramCutter` is llama.cpp's tokenizer ``t5`` in Python (``src/llama-vocab.cpp``), to try a vocabulary before
it is written.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from lowbit.codecs.gguf.character_map import CharacterMap
from lowbit.codecs.gguf.hard_texts import HARD_TEXTS, with_special_tokens
from lowbit.codecs.gguf.metadata import MetadataValue, Typed
from lowbit.codecs.gguf.piece_merging import SPACE, partition
from lowbit.codecs.gguf.token_table import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Source,
    TokenTable,
    check_unique,
    some_texts,
    token_table,
)
from lowbit.errors import CheckpointError, UnsupportedError

__all__ = ["UnigramCutter", "unigram_metadata"]

_NEVER_TAKEN = -10000.0
_UNKNOWN_PENALTY = 10.0


def unigram_metadata(source: Source, vocab_size: int) -> tuple[dict[str, MetadataValue], list[str]]:
    """Metadata of a unigram vocabulary, and notes.

    Raises :class:`UnsupportedError` when llama.cpp would give other token ids, naming the first text, for another
    reason than that it applies the map of characters to code points and the original to clusters of them.
    """
    table, scores = _scored(source, token_table(source, vocab_size))
    check_unique(table.tokens, source.where)
    characters = _character_map(source)
    plain = [token for token in source.added if not token.strips]
    texts = [*HARD_TEXTS, *with_special_tokens(some_texts(plain))]
    expected = [source.ids(text) for text in texts]
    different, prefix, merge = texts, True, True
    for spaces in itertools.product((True, False), repeat=2):
        cutter = UnigramCutter(table, scores, characters, add_space_prefix=spaces[0], merge_spaces=spaces[1])
        found = [text for text, ids in zip(texts, expected, strict=True) if cutter.ids(text) != ids]
        if len(found) < len(different):
            different, (prefix, merge) = found, spaces
    unexplained = [text for text in different if not _mapped_otherwise(source, characters, text)]
    if unexplained:
        raise UnsupportedError(
            f"{source.where}: llama.cpp's unigram tokenizer gives other tokens, first on {unexplained[0][:60]!r}"
        )
    metadata: dict[str, MetadataValue] = {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": table.tokens,
        "tokenizer.ggml.scores": Typed("f32", scores),
        "tokenizer.ggml.token_type": Typed("i32", table.kinds),
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.remove_extra_whitespaces": merge,
    }
    if characters is not None:
        metadata["tokenizer.ggml.precompiled_charsmap"] = Typed("u8", list(characters.data))
    notes = []
    if different:
        notes.append(
            f"llama.cpp normalizes characters one by one: {len(different)} of {len(texts)} hard texts get other tokens"
        )
    if len(plain) < len(source.added):
        names = ", ".join(token.text for token in source.added if token.strips)
        notes.append(f"llama.cpp does not strip the spaces beside {names[:120]}, which the original tokenizer does")
    return metadata, notes


class UnigramCutter:
    """A unigram vocabulary ready to encode: the same token ids as llama.cpp's, without BOS and EOS."""

    def __init__(
        self,
        table: TokenTable,
        scores: Sequence[float],
        characters: CharacterMap | None,
        *,
        add_space_prefix: bool,
        merge_spaces: bool,
    ) -> None:
        stored = struct.unpack(f"<{len(scores)}f", struct.pack(f"<{len(scores)}f", *scores))
        rows = list(enumerate(table.rows()))
        normal = [stored[id] for id, (_, kind) in rows if kind == NORMAL]
        self._entries: Mapping[str, tuple[int, float]] = {
            text: (id, 0.0 if kind == USER_DEFINED else stored[id])
            for id, (text, kind) in rows
            if kind in (NORMAL, USER_DEFINED, UNUSED)
        }
        self._unknown = table.kinds.index(UNKNOWN)
        self._unknown_score = min(normal, default=0.0) - _UNKNOWN_PENALTY
        self._longest = max(map(len, self._entries), default=1)
        self._characters = characters
        self._prefix = add_space_prefix
        self._merge = merge_spaces
        apart = [(text, id) for id, (text, kind) in rows if kind in (CONTROL, USER_DEFINED, UNKNOWN)]
        self._special = sorted(apart, key=lambda entry: -len(entry[0].encode("utf-8")))

    def ids(self, text: str) -> list[int]:
        """Token ids of ``text``, special tokens in it recognised."""
        found: list[int] = []
        for part in partition(text, self._special):
            found += [part] if isinstance(part, int) else self._cut(self._normalized(part))
        return found

    def _normalized(self, text: str) -> str:
        if self._characters is not None:
            text = self._characters.apply(text)
        pieces: list[str] = []
        in_word = prefixed = False
        for character in text:
            if character == " ":
                in_word = False
                pieces += [] if self._merge else [SPACE]
                continue
            if not in_word:
                in_word = True
                if self._merge or (self._prefix and not prefixed):
                    pieces.append(SPACE)
                    prefixed = True
            pieces.append(character)
        return "".join(pieces)

    def _cut(self, text: str) -> list[int]:
        """The cut with the highest sum of scores; neighbouring unknown characters are one token."""
        best = [-math.inf] * (len(text) + 1)
        came: list[tuple[int, int]] = [(0, self._unknown)] * (len(text) + 1)
        best[0] = 0.0
        for start in range(len(text)):
            for end in range(start + 1, min(len(text), start + self._longest) + 1):
                entry = self._entries.get(text[start:end])
                if entry is not None and best[start] + entry[1] > best[end]:
                    best[end] = best[start] + entry[1]
                    came[end] = start, entry[0]
            if text[start] not in self._entries and best[start] + self._unknown_score > best[start + 1]:
                best[start + 1] = best[start] + self._unknown_score
                came[start + 1] = start, self._unknown
        found: list[int] = []
        at = len(text)
        while at:
            at, id = came[at]
            if id != self._unknown or found[-1:] != [id]:
                found.append(id)
        return found[::-1]


def _scored(source: Source, table: TokenTable) -> tuple[TokenTable, list[float]]:
    """The unknown token marked, and the score of every token."""
    unknown = source.model.get("unk_id")
    if unknown is None:
        raise UnsupportedError(f"{source.where}: the unigram tokenizer has no unknown token: llama.cpp needs one")
    kinds = list(table.kinds)
    kinds[unknown] = UNKNOWN
    scores = [_NEVER_TAKEN] * len(kinds)
    for id, (_, score) in enumerate(source.model["vocab"]):
        scores[id] = float(score)
    return TokenTable(table.tokens, kinds), scores


def _character_map(source: Source) -> CharacterMap | None:
    parts: list[Any] = [source.spec["normalizer"]]
    while parts:
        part = parts.pop()
        if part is None:
            continue
        if part["type"] == "Precompiled":
            try:
                return CharacterMap(base64.b64decode(part["precompiled_charsmap"], validate=True))
            except (ValueError, binascii.Error) as error:
                raise CheckpointError(
                    f"{source.where}: the tokenizer's precompiled_charsmap is damaged: {error}"
                ) from error
        parts += part.get("normalizers", ())
    return None


def _mapped_otherwise(source: Source, characters: CharacterMap | None, text: str) -> bool:
    """Whether the original and llama.cpp already differ in the characters that they cut, or in where words end."""
    if characters is None or source.backend.normalizer is None:
        return False
    original = source.backend.normalizer.normalize_str(text).replace(SPACE, " ")
    mapped = characters.apply(text).replace(SPACE, " ")
    # NEL ends a word for the original, but the usual map does not make it a space.
    return "\x85" in mapped or bool(original.split() != mapped.split())
