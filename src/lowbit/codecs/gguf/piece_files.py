"""The tokenizer of a checkpoint that has only SentencePiece's ``tokenizer.model``; sentencepiece is not needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.codecs.gguf.metadata import Value
from lowbit.codecs.gguf.piece_merging import SPACE
from lowbit.codecs.gguf.rebuilding import tokenizer_from_gguf
from lowbit.codecs.gguf.sentencepiece_model import BPE, read_piece_model
from lowbit.codecs.gguf.token_table import CONTROL, UNUSED, USER_DEFINED
from lowbit.errors import CheckpointError, UnsupportedError

__all__ = ["has_only_pieces", "tokenizer_from_pieces"]

_ROLES = {"bos": ("bos", "<s>"), "eos": ("eos", "</s>"), "unk": ("unknown", "<unk>"), "pad": ("padding", "<pad>")}
"""Role in transformers to the stem of GGUF's key and the piece that plays it where nothing else is said."""


def has_only_pieces(directory: Path) -> bool:
    """Whether ``directory`` has a ``tokenizer.model`` but no ``tokenizer.json``."""
    return (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").exists()


def tokenizer_from_pieces(directory: Path) -> Any:
    """A :class:`transformers.PreTrainedTokenizerFast` made of ``tokenizer.model``, ``added_tokens.json`` and
    ``tokenizer_config.json``.

    Raises :class:`CheckpointError` for a file that is damaged and :class:`UnsupportedError` for a model that normalizes
    text or is neither BPE nor unigram.
    """
    path = directory / "tokenizer.model"
    model = read_piece_model(path)
    if model.model_type != BPE or model.character_map:
        raise UnsupportedError(
            f"{path}: only SentencePiece's BPE without normalization can be read from this file: open the model once "
            "with transformers and sentencepiece, and save its tokenizer.json beside it"
        )
    tokens = [
        text.replace(SPACE, " ") if kind == USER_DEFINED else text
        for text, kind in zip(model.pieces, model.kinds, strict=True)
    ]
    kinds = list(model.kinds)
    config = _json(directory / "tokenizer_config.json")
    for id, (text, special) in sorted(_added(directory, config).items()):
        if id > len(tokens) + 65536:
            raise CheckpointError(f"{directory}: added token {text!r} has the id {id}, far beyond {len(tokens)} pieces")
        while len(tokens) <= id:
            tokens.append(f"[PAD{len(tokens)}]")
            kinds.append(UNUSED)
        tokens[id], kinds[id] = text, CONTROL if special else USER_DEFINED
    metadata: dict[str, Value] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [*model.scores, *[0.0] * (len(tokens) - len(model.scores))],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": model.add_dummy_prefix,
        "tokenizer.ggml.add_bos_token": config.get("add_bos_token", True) is True,
        "tokenizer.ggml.add_eos_token": config.get("add_eos_token", False) is True,
    }
    for role, (stem, usual) in _ROLES.items():
        text = _text(config.get(f"{role}_token")) or usual
        if text in tokens:
            metadata[f"tokenizer.ggml.{stem}_token_id"] = tokens.index(text)
    if isinstance(template := config.get("chat_template"), str):
        metadata["tokenizer.chat_template"] = template
    return tokenizer_from_gguf(metadata)


def _added(directory: Path, config: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Id to text and whether it is special, of tokens beyond the pieces and of pieces that are special."""
    found = {}
    for text, id in _json(directory / "added_tokens.json").items():
        if not isinstance(id, int) or id < 0:
            raise CheckpointError(f"{directory / 'added_tokens.json'}: the id of {text!r} is {id!r}")
        found[id] = (text, False)
    decoder = config.get("added_tokens_decoder", {})
    for key, entry in decoder.items() if isinstance(decoder, Mapping) else ():
        content = _text(entry)
        if not str(key).isdecimal() or content is None:
            raise CheckpointError(
                f"{directory / 'tokenizer_config.json'}: added_tokens_decoder has a bad entry {key!r}"
            )
        found[int(key)] = (content, bool(entry.get("special")) if isinstance(entry, Mapping) else False)
    return found


def _text(token: object) -> str | None:
    """The text of a token that is given as such or as an object with its ``content``."""
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return found
