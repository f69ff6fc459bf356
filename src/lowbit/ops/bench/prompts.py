"""Prompts of a given number of tokens that share no more of their beginning than they are told to."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from lowbit.errors import CheckpointError, UsageError

__all__ = ["Prompt", "TextPrompts", "TokenPrompts", "source_text"]

Prompt: TypeAlias = "str | list[int]"
_FEWEST_WORDS = 200


def source_text(path: str | None = None) -> str:
    """The text that prompts are cut from: a file, or what the demo model has never seen of Python's own library.

    Raises :class:`CheckpointError` for a file that cannot be read and :class:`UsageError` for one that is too short.
    """
    if path is None:
        from lowbit.calibration.standard_library import held_out_text

        return held_out_text()[:1_000_000]
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 text") from error
    if len(text.split()) < _FEWEST_WORDS:
        raise UsageError(f"--text {path}: fewer than {_FEWEST_WORDS} words; give a longer text")
    return text


@dataclass(frozen=True, slots=True)
class TokenPrompts:
    """Prompts as token ids, exact: ``shared`` first ids are always the same, the next is drawn at random."""

    ids: Sequence[int]
    shared: int = 0

    def make(self, tokens: int, rng: random.Random) -> Prompt:
        """``tokens`` ids: the shared ones, a random one so that no two go on alike, and a passage from anywhere."""
        common = [self.ids[index % len(self.ids)] for index in range(min(self.shared, tokens))]
        rest = tokens - len(common)
        if rest == 0:
            return common
        start = rng.randrange(len(self.ids))
        passage = [self.ids[(start + index) % len(self.ids)] for index in range(rest - 1)]
        return [*common, rng.choice(self.ids), *passage]


@dataclass(frozen=True, slots=True)
class TextPrompts:
    """Prompts as text, for servers that take nothing else: ``overhead`` tokens of a chat template and
    ``tokens_per_word`` as the server itself counted them (:func:`fit`)."""

    words: Sequence[str]
    tokens_per_word: float = 1.3
    overhead: float = 0.0
    shared: int = 0

    def make(self, tokens: int, rng: random.Random) -> Prompt:
        """Text of about ``tokens`` tokens: what the server counts is in the outcome."""
        total = max(1, round((tokens - self.overhead) / self.tokens_per_word))
        common = min(total - 1, round(self.shared / self.tokens_per_word))
        start = rng.randrange(len(self.words))
        picked = [self.words[(start + index) % len(self.words)] for index in range(total - common - 1)]
        return " ".join([*(self.words[i % len(self.words)] for i in range(common)), rng.choice(self.words), *picked])

    def fit(self, counts: Sequence[tuple[int, int]]) -> TextPrompts:
        """The same with ratio and overhead from ``(words, tokens)`` of two prompts that a server has counted."""
        (few, low), (many, high) = counts
        ratio = (high - low) / (many - few)
        if ratio <= 0:
            return self
        return TextPrompts(self.words, ratio, max(0.0, low - ratio * few), self.shared)
