"""WordPiece vocabularies of BERT-like encoders.

llama.cpp marks the beginning of a word with ``▁`` where WordPiece marks its continuation with ``##``. It cleans and
splits text in its own way; :class:`WordSplitter` does the same, so that a vocabulary can be tried before it is written.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from lowbit.codecs.gguf.hard_texts import HARD_TEXTS, with_special_tokens
from lowbit.codecs.gguf.metadata import MetadataValue, Typed
from lowbit.codecs.gguf.piece_merging import SPACE, partition
from lowbit.codecs.gguf.token_table import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Source,
    TokenTable,
    check_unique,
    some_texts,
    token_table,
)
from lowbit.errors import UnsupportedError

__all__ = ["WordSplitter", "wordpiece_metadata"]

CONTINUATION = "##"

_WHITE_SPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000") | {
    chr(c) for c in range(0x2000, 0x200B)
}
_CJK = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)
"""Characters that are words of their own. The gap before 0x2B920 is in the tokenizers package as well."""


def wordpiece_metadata(source: Source, vocab_size: int) -> tuple[dict[str, MetadataValue], list[str]]:
    """Metadata of a WordPiece vocabulary, and notes.

    Raises :class:`UnsupportedError` when llama.cpp would give other token ids for a reason that is not one of its known
    limits, naming the text.
    """
    if source.model["continuing_subword_prefix"] != CONTINUATION:
        raise UnsupportedError(
            f"{source.where}: words go on with {source.model['continuing_subword_prefix']!r}: llama.cpp knows only '##'"
        )
    lowercase, strip_accents = _options(source)
    table = _marked(source, token_table(source, vocab_size))
    check_unique(table.tokens, source.where)
    splitter = WordSplitter(table, source.model["unk_token"], lowercase=lowercase, strip_accents=strip_accents)
    texts = [*HARD_TEXTS, *with_special_tokens(some_texts(source.added))]
    limits = _Limits(int(source.model["max_input_chars_per_word"]), lowercase=lowercase, strip_accents=strip_accents)
    different: dict[str, int] = {}
    for text in texts:
        if splitter.ids(text) == source.ids(text):
            continue
        reason = limits.of(text)
        if reason is None:
            raise UnsupportedError(
                f"{source.where}: llama.cpp's WordPiece tokenizer gives other tokens, first on {text[:60]!r}"
            )
        different[reason] = different.get(reason, 0) + 1
    metadata: dict[str, MetadataValue] = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": table.tokens,
        "tokenizer.ggml.token_type": Typed("i32", table.kinds),
        "tokenizer.ggml.normalizer.lowercase": lowercase,
        "tokenizer.ggml.normalizer.strip_accents": strip_accents,
    }
    notes = [
        f"llama.cpp {reason}: {count} of {len(texts)} hard texts get other tokens"
        for reason, count in different.items()
    ]
    return metadata, notes


class WordSplitter:
    """llama.cpp's WordPiece tokenization (``src/llama-vocab.cpp``, tokenizer ``bert``), without CLS and SEP."""

    def __init__(self, table: TokenTable, unknown: str, *, lowercase: bool, strip_accents: bool) -> None:
        self._ids: Mapping[str, int] = {text: id for id, text in enumerate(table.tokens)}
        self._unknown = self._ids[unknown]
        self._longest = max(map(len, table.tokens))
        self._lowercase = lowercase
        self._strip_accents = strip_accents
        apart = [(text, id) for id, (text, kind) in enumerate(table.rows()) if kind in (CONTROL, USER_DEFINED, UNKNOWN)]
        self._special = sorted(apart, key=lambda entry: -len(entry[0].encode("utf-8")))

    def ids(self, text: str) -> list[int]:
        """Token ids of ``text``, special tokens in it recognised."""
        found: list[int] = []
        for part in partition(text, self._special):
            if isinstance(part, int):
                found.append(part)
                continue
            for word in self._words(part):
                found += self._word_ids(SPACE + word)
        return found

    def _word_ids(self, word: str) -> list[int]:
        """The longest token at each place, or the unknown token for a word that is not all tokens."""
        found: list[int] = []
        at = 0
        while at < len(word):
            for end in range(min(len(word), at + self._longest), at, -1):
                id = self._ids.get(word[at:end])
                if id is not None:
                    found.append(id)
                    at = end
                    break
            else:
                return [self._unknown]
        return found

    def _words(self, text: str) -> Iterator[str]:
        word = ""
        for character in text:
            if self._strip_accents:
                character = unicodedata.normalize("NFD", character)[0]
            if character in _WHITE_SPACE:
                yield from [word] if word else []
                word = ""
                continue
            category = unicodedata.category(character)
            if character == "\ufffd" or category in ("Cc", "Cf", "Co", "Cs"):
                continue
            if self._strip_accents and category[0] == "M":
                continue
            lowered = character.lower()[0] if self._lowercase else character
            if _stands_alone(character, category):
                yield from [word] if word else []
                yield lowered
                word = ""
            else:
                word += lowered
        if word:
            yield word


class _Limits:
    """What llama.cpp is known not to do as BERT's tokenizer does."""

    def __init__(self, longest_word: int, *, lowercase: bool, strip_accents: bool) -> None:
        self._longest_word = longest_word
        self._lowercase = lowercase
        self._strip_accents = strip_accents

    def of(self, text: str) -> str | None:
        """Why ``text`` gets other tokens, if that is known."""
        if any(len(word) > self._longest_word for word in text.split()):
            return f"does not take words of more than {self._longest_word} characters for unknown"
        if any(character in "\v\f\x85" for character in text):
            return "splits words at some control characters"
        if self._strip_accents:
            if any("\uac00" <= character <= "\ud7a3" for character in text):
                return "keeps only the first letter of a Hangul syllable"
            if any(unicodedata.category(character) in ("Mc", "Me") for character in unicodedata.normalize("NFD", text)):
                return "drops vowel signs of Indic scripts"
        elif self._lowercase and "İ" in text:
            return "writes İ as i without a dot of its own"
        if any(unicodedata.category(character) == "Cn" for character in text):
            return "keeps unassigned characters"
        return None


def _options(source: Source) -> tuple[bool, bool]:
    """``(lowercase, strip_accents)``."""
    normalizer: Any = source.spec["normalizer"]
    splitter: Any = source.spec["pre_tokenizer"]
    bert = normalizer is not None and normalizer["type"] == "BertNormalizer"
    if not bert or splitter is None or splitter["type"] != "BertPreTokenizer":
        raise UnsupportedError(
            f"{source.where}: llama.cpp cleans and splits words as BERT does; this tokenizer does not"
        )
    lowercase = bool(normalizer["lowercase"])
    return lowercase, lowercase if normalizer["strip_accents"] is None else bool(normalizer["strip_accents"])


def _marked(source: Source, table: TokenTable) -> TokenTable:
    """Beginnings of words marked instead of continuations."""
    tokens, kinds = list(table.tokens), list(table.kinds)
    for id, (text, kind) in enumerate(table.rows()):
        if kind == NORMAL:
            tokens[id] = text.removeprefix(CONTINUATION) if text.startswith(CONTINUATION) else SPACE + text
    unknown = source.id_of(source.model["unk_token"])
    if unknown is None:
        raise UnsupportedError(
            f"{source.where}: its unknown token {source.model['unk_token']!r} is not in the vocabulary"
        )
    tokens[unknown], kinds[unknown] = source.model["unk_token"], UNKNOWN
    return TokenTable(tokens, kinds)


def _stands_alone(character: str, category: str) -> bool:
    code = ord(character)
    return (
        category[0] == "P" or (code < 0x7F and category[0] == "S") or any(first <= code <= last for first, last in _CJK)
    )
