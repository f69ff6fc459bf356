"""A Hugging Face tokenizer as the ``tokenizer.*`` metadata of a GGUF file.

Four kinds exist on both sides: byte-level BPE (``gpt2``), SentencePiece's BPE (``llama``) and unigram (``t5``), and
WordPiece (``bert``).
What is written is tried first: a model of llama.cpp's own tokenization, fed with nothing but the metadata, must give
the original's token ids on :data:`~lowbit.codecs.gguf.hard_texts.HARD_TEXTS`. Keys are those of ggml's
``docs/gguf.md``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.codecs.gguf.byte_level import byte_level_metadata
from lowbit.codecs.gguf.metadata import MetadataValue, Typed
from lowbit.codecs.gguf.piece_files import has_only_pieces, tokenizer_from_pieces
from lowbit.codecs.gguf.rebuilding import tokenizer_from_gguf, write_tokenizer
from lowbit.codecs.gguf.sentencepiece import sentencepiece_metadata
from lowbit.codecs.gguf.special_tokens import frame_notes, special_token_metadata
from lowbit.codecs.gguf.token_table import Source, source_of
from lowbit.codecs.gguf.unigram import unigram_metadata
from lowbit.codecs.gguf.wordpiece import wordpiece_metadata
from lowbit.errors import CheckpointError, UnsupportedError

__all__ = ["Vocabulary", "read_vocabulary", "tokenizer_from_gguf", "vocabulary_metadata", "write_tokenizer"]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Metadata of a vocabulary, and what llama.cpp is known to do differently with it, a sentence each."""

    metadata: dict[str, MetadataValue]
    notes: tuple[str, ...] = ()


def vocabulary_metadata(directory: Path, vocab_size: int, config: Mapping[str, Any]) -> dict[str, MetadataValue]:
    """The metadata of :func:`read_vocabulary`."""
    return read_vocabulary(directory, vocab_size, config).metadata


def read_vocabulary(directory: Path, vocab_size: int, config: Mapping[str, Any]) -> Vocabulary:
    """The tokenizer in ``directory`` for a model whose embedding has ``vocab_size`` rows.

    ``config`` is the model's ``config.json``; ``generation_config.json`` beside it is read for the ids that end a turn.

    Raises :class:`CheckpointError` when there is no readable tokenizer or it has more tokens than the embedding rows,
    and :class:`UnsupportedError` when llama.cpp would give other token ids, naming the first text that differs.
    """
    source = source_of(Path(directory), _load(Path(directory)))
    homeless = [token.text for token in source.added if token.id >= vocab_size]
    # Some tokenizer classes of transformers add tokens of their own that the model has never seen.
    source = dataclasses.replace(source, added=tuple(token for token in source.added if token.id < vocab_size))
    metadata, notes = _convert(source)(source, vocab_size)
    if homeless:
        notes.append(f"added tokens without a row in the embedding are left out: {', '.join(homeless)[:200]}")
    metadata.update(special_token_metadata(source, config, vocab_size))
    notes += frame_notes(source, metadata)
    metadata.update(_chat_templates(source))
    return Vocabulary(metadata, tuple(notes))


def _load(directory: Path) -> Any:
    """The tokenizer in ``directory``; the network is never asked."""
    if has_only_pieces(directory):
        return tokenizer_from_pieces(directory)
    if not any((directory / name).exists() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        raise CheckpointError(f"{directory}: tokenizer missing: copy the original model's tokenizer files here")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers package raises bare Exception for a file that it cannot parse
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{directory}: the tokenizer cannot be loaded: {reason}") from error


def _convert(source: Source) -> Callable[[Source, int], tuple[dict[str, MetadataValue], list[str]]]:
    kind = source.model["type"]
    if kind == "BPE" and _mentions(source.spec, "ByteLevel"):
        return byte_level_metadata
    if kind == "BPE" and source.model.get("byte_fallback"):
        return sentencepiece_metadata
    if kind == "WordPiece":
        return wordpiece_metadata
    if kind == "Unigram":
        return unigram_metadata
    raise UnsupportedError(
        f"{source.where}: a {kind} tokenizer without byte level or byte fallback has no counterpart in llama.cpp"
    )


def _mentions(spec: Mapping[str, Any], kind: str) -> bool:
    """Whether a component of type ``kind`` is among the pre-tokenizers or decoders."""
    parts = [spec["pre_tokenizer"], spec["decoder"]]
    while parts:
        part = parts.pop()
        if part is None:
            continue
        if part["type"] == kind:
            return True
        parts += part.get("pretokenizers", ()) or part.get("decoders", ())
    return False


def _chat_templates(source: Source) -> dict[str, MetadataValue]:
    """The chat template, or each of several by name (``tokenizer.chat_template.{name}``)."""
    templates = getattr(source.tokenizer, "chat_template", None)
    if not templates:
        return {}
    if isinstance(templates, str):
        return {"tokenizer.chat_template": templates}
    found: dict[str, MetadataValue] = {}
    names = sorted(name for name in templates if name != "default")
    if "default" in templates:
        found["tokenizer.chat_template"] = templates["default"]
    for name in names:
        found[f"tokenizer.chat_template.{name}"] = templates[name]
    if names:
        found["tokenizer.chat_templates"] = Typed("str", names)
    return found
