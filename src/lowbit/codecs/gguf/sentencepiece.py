"""SentencePiece vocabularies of the LLaMA kind: BPE over characters, spaces written ``▁``, bytes as a fallback.

llama.cpp merges by the scores of tokens, Hugging Face by the ranks of pairs. Scores come from ``tokenizer.model`` where
it is there, else from the ranks: a token's is minus the rank of the first pair that makes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lowbit.codecs.gguf.hard_texts import HARD_TEXTS, with_special_tokens
from lowbit.codecs.gguf.metadata import MetadataValue, Typed
from lowbit.codecs.gguf.piece_merging import SPACE, PieceMerger, byte_token
from lowbit.codecs.gguf.sentencepiece_model import BPE, read_piece_model
from lowbit.codecs.gguf.token_table import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Source,
    TokenTable,
    check_unique,
    merge_pairs,
    some_texts,
    token_table,
)
from lowbit.errors import UnsupportedError

__all__ = ["sentencepiece_metadata"]

_NEVER_MERGED = -1e6
"""Score of what no merge makes: below every rank."""


@dataclass(frozen=True, slots=True)
class _Variant:
    """A way to write the vocabulary down: the prefix, and what becomes of added tokens made of spaces."""

    add_space_prefix: bool
    spaces: str
    """``"text"``: as they are; ``"spaces"``: with real spaces; ``"normal"``: as tokens that only merging finds."""


def sentencepiece_metadata(source: Source, vocab_size: int) -> tuple[dict[str, MetadataValue], list[str]]:
    """Metadata of a SentencePiece BPE vocabulary, and notes.

    Raises :class:`UnsupportedError` when llama.cpp would give other token ids, naming the first text.
    """
    table = _kinds(source, token_table(source, vocab_size))
    scores = _scores(source, table)
    texts = [text for text in HARD_TEXTS if not any(token.text in text for token in source.added)]
    expected = [source.ids(text) for text in texts]
    furthest = -1
    for variant in _variants(table):
        written = _written(table, variant)
        check_unique(written.tokens, source.where)
        merger = PieceMerger(written.tokens, scores, written.kinds, add_space_prefix=variant.add_space_prefix)
        failed = _first_failure(merger, texts, expected)
        if failed is None:
            break
        furthest = max(furthest, failed)
    else:
        raise UnsupportedError(
            f"{source.where}: llama.cpp's SentencePiece tokenizer gives other tokens, first on {texts[furthest][:60]!r}"
        )
    metadata: dict[str, MetadataValue] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": written.tokens,
        "tokenizer.ggml.scores": Typed("f32", scores),
        "tokenizer.ggml.token_type": Typed("i32", written.kinds),
        "tokenizer.ggml.add_space_prefix": variant.add_space_prefix,
    }
    return metadata, list(_notes(source, merger))


def _kinds(source: Source, table: TokenTable) -> TokenTable:
    """Byte tokens and the unknown token marked as such."""
    kinds = list(table.kinds)
    ids = {text: id for id, text in enumerate(table.tokens)}
    missing = [byte for byte in range(256) if byte_token(byte) not in ids]
    if missing:
        raise UnsupportedError(
            f"{source.where}: {len(missing)} of 256 byte tokens are missing (first {byte_token(missing[0])}): "
            "llama.cpp cannot spell characters outside the vocabulary"
        )
    for byte in range(256):
        kinds[ids[byte_token(byte)]] = BYTE
    unknown = source.model.get("unk_token")
    if unknown in ids:
        kinds[ids[unknown]] = UNKNOWN
    return TokenTable(table.tokens, kinds)


def _scores(source: Source, table: TokenTable) -> list[float]:
    model = source.where / "tokenizer.model"
    if model.exists():
        pieces = read_piece_model(model)
        alike = pieces.model_type == BPE and len(pieces.pieces) <= len(table.tokens)
        if alike and all(
            a == b or k != NORMAL for a, b, k in zip(pieces.pieces, table.tokens, table.kinds, strict=False)
        ):
            return [*pieces.scores, *[_NEVER_MERGED] * (len(table.tokens) - len(pieces.pieces))]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merge_pairs(source)):
        ranks.setdefault(left + right, rank)
    return [float(-ranks[text]) if text in ranks else _score_of(kind) for text, kind in table.rows()]


def _score_of(kind: int) -> float:
    return 0.0 if kind in (BYTE, CONTROL, UNKNOWN) else _NEVER_MERGED


def _variants(table: TokenTable) -> Iterator[_Variant]:
    spaced = any(kind == USER_DEFINED and SPACE in text for text, kind in table.rows())
    ways = ("spaces", "text", "normal") if spaced else ("text",)
    for spaces, prefix in itertools.product(ways, (True, False)):
        yield _Variant(prefix, spaces)


def _written(table: TokenTable, variant: _Variant) -> TokenTable:
    tokens, kinds = list(table.tokens), list(table.kinds)
    for id, (text, kind) in enumerate(table.rows()):
        if kind == USER_DEFINED and SPACE in text:
            if variant.spaces == "spaces":
                tokens[id] = text.replace(SPACE, " ")
            elif variant.spaces == "normal":
                kinds[id] = NORMAL
    return TokenTable(tokens, kinds)


def _first_failure(merger: PieceMerger, texts: Sequence[str], expected: Sequence[list[int]]) -> int | None:
    """Index of the first text with other tokens that is not just :func:`_spared_the_prefix`, or None."""
    for index, (text, ids) in enumerate(zip(texts, expected, strict=True)):
        if merger.ids(text) != ids and not _spared_the_prefix(merger, text, ids):
            return index
    return None


def _spared_the_prefix(merger: PieceMerger, text: str, expected: Sequence[int]) -> bool:
    """Whether the original only adds no space in front of a text that begins with one."""
    return text.startswith(" ") and merger.ids(text, spaced=True) == expected


def _notes(source: Source, merger: PieceMerger) -> Iterator[str]:
    """What differs at the start of a text and beside special tokens, where each treats spaces in its own way."""
    if merger.ids(" a") != source.ids(" a"):
        yield "llama.cpp puts a space in front of every text, the original tokenizer not where there is one already"
    texts = with_special_tokens(some_texts(source.added))
    different = [text for text in texts if merger.ids(text) != source.ids(text)]
    if different:
        yield (
            f"beside special tokens llama.cpp treats spaces differently: {len(different)} of {len(texts)} texts "
            f"with them get other tokens, e.g. {different[0][:60]!r}"
        )
