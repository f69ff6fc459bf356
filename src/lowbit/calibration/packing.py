"""Documents to full-length token sequences, and their hash."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from lowbit.calibration.chat import TemplateRefusalError, has_template, render
from lowbit.calibration.rows import Document
from lowbit.calibration.tokenizer import Tokenizer, encode, leading_bos

PIECE = 16_384
"""Characters beyond which a text is cut at a line end, so that a shuffle reaches all of a long file."""

_BATCH = 32
_BREAKS = ("\n\n", "\n", ". ", "。", " ")


@dataclass(frozen=True, slots=True)
class Gathered:
    """Distinct texts: ``(text, has special tokens)``; and what happened on the way."""

    texts: tuple[tuple[str, bool], ...]
    documents: int
    notes: tuple[str, ...]


def gather(documents: Iterable[Document], tokenizer: Tokenizer, *, max_characters: int) -> Gathered:
    """Render conversations, drop duplicates, cut long texts; reading stops after ``max_characters``."""
    seen: set[bytes] = set()
    texts: list[tuple[str, bool]] = []
    notes: list[str] = []
    duplicates = refused = characters = 0
    chats = 0
    reason = ""
    for document in documents:
        key = hashlib.sha256(document.key.encode("utf-8", "surrogatepass")).digest()
        if key in seen:
            duplicates += 1
            continue
        seen.add(key)
        if document.messages:
            chats += 1
            try:
                texts.append((render(document, tokenizer), has_template(tokenizer)))
            except TemplateRefusalError as failure:
                refused, reason = refused + 1, str(failure)
                continue
            characters += len(texts[-1][0])
        else:
            texts.extend((piece, False) for piece in cut(document.text))
            characters += len(document.text)
        if characters >= max_characters:
            notes.append(f"only the first {characters:,} characters were read")
            break
    if duplicates:
        notes.append(f"{duplicates} duplicate documents dropped")
    if refused:
        notes.append(f"{refused} conversations dropped, which the chat template refuses ({reason})")
    if chats and not has_template(tokenizer):
        notes.append("the tokenizer has no chat template: turns of conversations joined as paragraphs")
    return Gathered(tuple(texts), len(seen) - refused, tuple(notes))


def cut(text: str, size: int = PIECE) -> Iterator[str]:
    """``text`` in pieces of at most ``size`` characters, broken after a paragraph, line, sentence or word if possible.

    Joined together the pieces are the text again.
    """
    start = 0
    while len(text) - start > size:
        end = start + size
        for separator in _BREAKS:
            found = text.rfind(separator, start + size // 2, end)
            if found >= 0:
                end = found + len(separator)
                break
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def pack(
    texts: Sequence[tuple[str, bool]], tokenizer: Tokenizer, *, samples: int, seq_len: int, seed: int
) -> tuple[torch.Tensor, int]:
    """Full sequences from texts in seeded order, and the number of tokens that were found for them.

    The result is int64 ``[n, seq_len]`` with ``n <= samples``. Texts follow one another, each led by BOS where the
    tokenizer does so, divided by EOS where it does not; every sequence begins with BOS where texts do.
    """
    order = list(texts)
    random.Random(seed).shuffle(order)
    bos = leading_bos(tokenizer)
    end = [] if bos is not None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    sequences: list[list[int]] = []
    current: list[int] = []
    found = 0
    for ids in _encoded(order, tokenizer):
        found += len(ids)
        position = 0
        if end and ids[-1:] != end:
            ids = ids + end
        while position < len(ids):
            if not current and bos is not None and ids[position] != bos:
                current.append(bos)
            taken = ids[position : position + seq_len - len(current)]
            current += taken
            position += len(taken)
            if len(current) == seq_len:
                sequences.append(current)
                current = []
                if len(sequences) == samples:
                    return torch.tensor(sequences, dtype=torch.int64), found
    return torch.tensor(sequences, dtype=torch.int64).reshape(-1, seq_len), found


def _encoded(texts: Sequence[tuple[str, bool]], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token ids of each text in order, encoded in small batches so that no more is encoded than needed."""
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        for special in (False, True):
            if all(has_special == special for _, has_special in batch):
                yield from encode(tokenizer, [text for text, _ in batch], special=not special)
                break
        else:
            for text, has_special in batch:
                yield from encode(tokenizer, [text], special=not has_special)


def ids_hash(ids: torch.Tensor) -> str:
    """sha256 of token ids: the shape and the little-endian 64-bit values."""
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
