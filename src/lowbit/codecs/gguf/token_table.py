"""Ids, texts and kinds of the tokens of a Hugging Face tokenizer, as a GGUF vocabulary lists them.

Kinds are llama.cpp's ``llama_token_type``. Ids that the tokenizer does not use, up to the number of embedding rows,
become unused tokens ``[PADn]``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError, UnsupportedError

__all__ = [
    "BYTE",
    "CONTROL",
    "NORMAL",
    "UNKNOWN",
    "UNUSED",
    "USER_DEFINED",
    "Added",
    "Source",
    "TokenTable",
    "check_unique",
    "merge_pairs",
    "some_texts",
    "source_of",
    "token_table",
]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_KNOWN_BY_TEXT = """
<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT> _<EOT> [EOT] [EOS]
<|end_of_text|> <end_of_utterance> <eos> <｜end▁of▁sentence｜> <｜fim▁begin｜> <｜fim▁hole｜> <｜fim▁end｜>
<|fim_prefix|> <fim-prefix> <fim_prefix> <PRE> <|code_prefix|> <|fim_suffix|> <fim-suffix> <fim_suffix> <SUF>
<|code_suffix|> <|fim_middle|> <fim-middle> <fim_middle> <MID> <|code_middle|> <|fim_pad|> <fim-pad> <fim_pad> <PAD>
[PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>
"""
_ALWAYS_CONTROL = frozenset(_KNOWN_BY_TEXT.split())
"""Added tokens that llama.cpp knows by their text and takes for control tokens, with a warning where they are not."""


_MOST_TRIED = 24
"""Added tokens of each kind that are tried in texts; vocabularies with thousands of reserved ones exist."""


@dataclass(frozen=True, slots=True)
class Added:
    """An added token: matched in the text before everything else."""

    id: int
    text: str
    special: bool
    strips: bool
    """Swallows the white space beside it, or must stand alone: llama.cpp does neither."""


@dataclass(frozen=True, slots=True)
class Source:
    """A Hugging Face tokenizer: the transformers object, its Rust tokenizer, and that one's own description."""

    where: Path
    tokenizer: Any
    backend: Any
    spec: Mapping[str, Any]
    added: tuple[Added, ...]

    @property
    def model(self) -> Mapping[str, Any]:
        """The ``model`` part of ``tokenizer.json``."""
        model: Mapping[str, Any] = self.spec["model"]
        return model

    def ids(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of ``text``; ``special`` adds what the tokenizer puts around every text."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=special).ids
        return ids

    def id_of(self, token: object) -> int | None:
        """The id of a token's text, or None."""
        return None if token is None else self.backend.token_to_id(str(token))


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Texts and kinds of all tokens, by id."""

    tokens: list[str]
    kinds: list[int]

    def rows(self) -> Iterator[tuple[str, int]]:
        """``(text, kind)`` by id."""
        return zip(self.tokens, self.kinds, strict=True)


def source_of(where: Path, tokenizer: Any) -> Source:
    """The parts of a transformers tokenizer. Raises :class:`UnsupportedError` for one that is not a fast tokenizer."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UnsupportedError(
            f"{where}: {type(tokenizer).__name__} has no tokenizer.json, so its vocabulary cannot go into GGUF: "
            "save it once with transformers as a fast tokenizer"
        )
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    spec = json.loads(backend.to_str())
    added = tuple(
        Added(
            entry["id"],
            entry["content"],
            bool(entry["special"]),
            bool(entry["lstrip"] or entry["rstrip"] or entry["single_word"]),
        )
        for entry in spec["added_tokens"]
    )
    return Source(where, tokenizer, backend, spec, added)


def token_table(source: Source, vocab_size: int) -> TokenTable:
    """All ``vocab_size`` tokens; kinds of added tokens set, all others normal. Added tokens beyond are left out.

    Raises :class:`CheckpointError` when the tokenizer has ids beyond the embedding's rows, :class:`UnsupportedError`
    when two ids would have the same text.
    """
    added = {entry["content"] for entry in source.spec["added_tokens"]}
    everything: dict[str, int] = source.backend.get_vocab(with_added_tokens=True)
    vocabulary = {text: id for text, id in everything.items() if id < vocab_size or text not in added}
    last = max(vocabulary.values(), default=-1)
    if last < 0:
        raise CheckpointError(f"{source.where}: the tokenizer has an empty vocabulary")
    if last >= vocab_size:
        raise CheckpointError(
            f"{source.where}: the tokenizer has {last + 1} tokens but the embedding only {vocab_size} rows: "
            "the tokenizer files belong to another model"
        )
    tokens = [f"[PAD{id}]" for id in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    for text, id in vocabulary.items():
        if "\0" not in text:  # llama.cpp would read it as ending there
            tokens[id], kinds[id] = text, NORMAL
    for token in (token for token in source.added if token.id < vocab_size):
        control = token.special or token.text in _ALWAYS_CONTROL
        tokens[token.id], kinds[token.id] = token.text, CONTROL if control else USER_DEFINED
    check_unique(tokens, source.where)
    return TokenTable(tokens, kinds)


def check_unique(tokens: Sequence[str], where: Path) -> None:
    """Raise :class:`UnsupportedError` for two tokens of one text, or a token without any: llama.cpp would abort."""
    seen: dict[str, int] = {}
    for id, text in enumerate(tokens):
        if not text:
            raise UnsupportedError(f"{where}: token {id} is empty: llama.cpp cannot hold it")
        if text in seen:
            raise UnsupportedError(
                f"{where}: tokens {seen[text]} and {id} are both {text!r}: llama.cpp cannot hold them"
            )
        seen[text] = id


def merge_pairs(source: Source) -> list[tuple[str, str]]:
    """The merges of a BPE model, from either form of ``tokenizer.json``: ``"a b"`` or ``["a", "b"]``."""
    merges = source.model["merges"]
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    for merge, pair in zip(merges, pairs, strict=True):
        if len(pair) != 2 or not pair[0] or not pair[1] or " " in pair[0] or " " in pair[1]:
            raise CheckpointError(f"{source.where}: merge {merge!r} is not a pair of tokens without spaces")
    return pairs


def some_texts(tokens: Sequence[Added]) -> list[str]:
    """The texts of at most some dozens of ``tokens``, special ones and others, evenly picked."""
    texts = []
    for special in (True, False):
        of_kind = [token.text for token in tokens if token.special is special]
        texts += of_kind[:: max(1, len(of_kind) // _MOST_TRIED)]
    return texts
