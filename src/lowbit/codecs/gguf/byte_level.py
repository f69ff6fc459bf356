"""Byte-level BPE: GPT-2's scheme with a pre-tokenizer that llama.cpp knows by name.

A wrong name changes tokens silently, so it is found by behaviour: the one whose splits give the original's token ids
on every hard text, and the original's pieces too where several give the ids.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

from lowbit.codecs.gguf.hard_texts import HARD_TEXTS, with_special_tokens
from lowbit.codecs.gguf.metadata import MetadataValue, Typed
from lowbit.codecs.gguf.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from lowbit.codecs.gguf.token_table import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    Source,
    TokenTable,
    merge_pairs,
    some_texts,
    token_table,
)
from lowbit.errors import UnsupportedError

__all__ = ["byte_level_metadata", "byte_level_tokenizer", "split_pre_tokenizer"]


def byte_level_metadata(source: Source, vocab_size: int) -> tuple[dict[str, MetadataValue], list[str]]:
    """Metadata of a byte-level BPE vocabulary, and notes.

    Raises :class:`UnsupportedError` when no pre-tokenizer of llama.cpp gives the same token ids.
    """
    table = token_table(source, vocab_size)
    merges = merge_pairs(source)
    entry, notes = _identify(source, table, merges)
    metadata: dict[str, MetadataValue] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": entry.name,
        "tokenizer.ggml.tokens": table.tokens,
        "tokenizer.ggml.token_type": Typed("i32", table.kinds),
        "tokenizer.ggml.merges": Typed("str", [" ".join(pair) for pair in merges]),
    }
    return metadata, notes


def byte_level_tokenizer(
    tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[tuple[str, str]], entry: PreTokenizer
) -> Any:
    """A :class:`tokenizers.Tokenizer` that does what llama.cpp does with this vocabulary; no BOS or EOS is added."""
    from tokenizers import AddedToken, Tokenizer, decoders
    from tokenizers.models import BPE

    vocabulary = {text: id for id, text in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=list(merges), ignore_merges=entry.ignore_merges))
    tokenizer.pre_tokenizer = split_pre_tokenizer(entry.splits)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text, kind in zip(tokens, kinds, strict=True)
            if kind in (CONTROL, UNKNOWN)
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(text, special=False, normalized=False)
            for text, kind in zip(tokens, kinds, strict=True)
            if kind == USER_DEFINED
        ]
    )
    return tokenizer


def split_pre_tokenizer(splits: Sequence[str]) -> Any:
    """Split by each expression in turn, then spell the bytes in GPT-2's alphabet."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _identify(source: Source, table: TokenTable, merges: Sequence[tuple[str, str]]) -> tuple[PreTokenizer, list[str]]:
    texts, notes = _texts(source)
    expected = [source.ids(text) for text in texts]
    pieces = [_pieces(source.backend.pre_tokenizer, text) for text in HARD_TEXTS]
    trial = byte_level_tokenizer(table.tokens, table.kinds, merges, PRE_TOKENIZERS["gpt-2"])
    fitting: list[PreTokenizer] = []
    furthest = -1
    for entry in PRE_TOKENIZERS.values():
        failed = _first_failure(trial, entry, entry.original or entry.splits, texts, expected)
        if failed is None:
            fitting.append(entry)
        else:
            furthest = max(furthest, failed)
    if not fitting:
        raise UnsupportedError(
            f"{source.where}: no pre-tokenizer of llama.cpp gives this tokenizer's token ids; "
            f"the nearest of {len(PRE_TOKENIZERS)} first differs on {texts[furthest][:60]!r}"
        )
    same = [entry for entry in fitting if _splits_alike(entry, pieces)]
    chosen = (same or fitting)[0]
    if chosen.original:
        trial_ids = _trial_ids(trial, chosen, chosen.splits, texts)
        different = sum(ids != wanted for ids, wanted in zip(trial_ids, expected, strict=True))
        if different:
            notes.append(
                f"llama.cpp's {chosen.name} splits only approach this tokenizer's (mixed case outside ASCII): "
                f"{different} of {len(texts)} hard texts get other tokens"
            )
    return chosen, notes


def _texts(source: Source) -> tuple[list[str], list[str]]:
    """The texts to compare, and notes on what is left out because llama.cpp is known not to do it."""
    notes = []
    texts = list(HARD_TEXTS)
    normalizer = source.backend.normalizer
    if normalizer is not None:
        composed = [text for text in texts if _only_composed(normalizer, text)]
        if len(composed) < len(texts):
            notes.append(
                "llama.cpp does not compose characters (NFC): letters written with combining marks get other tokens"
            )
        texts = composed
    plain = [token for token in source.added if not token.strips]
    if len(plain) < len(source.added):
        names = ", ".join(token.text for token in source.added if token.strips)
        notes.append(f"llama.cpp does not strip the spaces beside {names[:120]}, which the original tokenizer does")
    return texts + with_special_tokens(some_texts(plain)), notes


def _only_composed(normalizer: Any, text: str) -> bool:
    """Whether ``text`` is for comparison: not one that the normalizer changes just by NFC."""
    normalized = normalizer.normalize_str(text)
    return bool(normalized == text or normalized != unicodedata.normalize("NFC", text))


def _pieces(pre_tokenizer: Any, text: str) -> list[str]:
    return [] if pre_tokenizer is None else [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)]


def _splits_alike(entry: PreTokenizer, pieces: Sequence[Sequence[str]]) -> bool:
    splitter = split_pre_tokenizer(entry.original or entry.splits)
    return all(_pieces(splitter, text) == list(wanted) for text, wanted in zip(HARD_TEXTS, pieces, strict=True))


def _trial_ids(trial: Any, entry: PreTokenizer, splits: Sequence[str], texts: Sequence[str]) -> Iterator[list[int]]:
    trial.model.ignore_merges = entry.ignore_merges
    trial.pre_tokenizer = split_pre_tokenizer(splits)
    for text in texts:
        yield trial.encode(text, add_special_tokens=False).ids


def _first_failure(
    trial: Any, entry: PreTokenizer, splits: Sequence[str], texts: Sequence[str], expected: Sequence[list[int]]
) -> int | None:
    """Index of the first text with other ids, or None."""
    pairs = zip(_trial_ids(trial, entry, splits, texts), expected, strict=True)
    return next((index for index, (ids, wanted) in enumerate(pairs) if ids != wanted), None)
