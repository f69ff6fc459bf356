"""The tokenizer of a checkpoint: transformers' own, behind clear errors."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from lowbit.codecs.gguf.container import is_gguf, open_gguf
from lowbit.codecs.gguf.piece_files import has_only_pieces, tokenizer_from_pieces
from lowbit.codecs.gguf.vocabulary import tokenizer_from_gguf
from lowbit.errors import CheckpointError, UnsupportedError

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class Tokenizer(Protocol):
    """What lowbit uses of a transformers tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: Any

    def __call__(
        self, text: Sequence[str], *, add_special_tokens: bool = True, verbose: bool = True
    ) -> Mapping[str, Any]:
        """Encode texts; ``["input_ids"]`` holds one list of ids per text."""

    def __len__(self) -> int:
        """Number of ids, added tokens counted."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The Jinja source of the chat template."""

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """Messages through the chat template."""


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer in the checkpoint directory or GGUF file ``path``; the network is never asked.

    Raises :class:`CheckpointError` when there is none or it cannot be read, :class:`UnsupportedError` for a GGUF
    vocabulary of a kind that lowbit does not know.
    """
    directory = Path(path)
    if is_gguf(directory):
        return _from_gguf(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint directory, so no tokenizer")
    if not any((directory / name).exists() for name in _FILES):
        raise CheckpointError(
            f"{directory}: tokenizer missing (none of {', '.join(_FILES[:3])} …): "
            "copy the tokenizer files of the original model here"
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        _check_json(directory / name)
    if has_only_pieces(directory) and importlib.util.find_spec("sentencepiece") is None:
        pieces: Tokenizer = tokenizer_from_pieces(directory)
        return pieces
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # the tokenizers package raises bare Exception for a file that it cannot parse
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{directory}: the tokenizer cannot be loaded: {reason}") from error
    if len(tokenizer) == 0:
        raise CheckpointError(
            f"{directory}: the tokenizer has an empty vocabulary: copy the original model's tokenizer files here"
        )
    return tokenizer


def _from_gguf(path: Path) -> Tokenizer:
    try:
        tokenizer: Tokenizer = tokenizer_from_gguf(open_gguf(path).metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error}") from error
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
    """Token ids of each text; ``special`` adds what the tokenizer puts around a text (usually BOS)."""
    with _quiet():
        ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def leading_bos(tokenizer: Tokenizer) -> int | None:
    """The id that this tokenizer puts in front of every text, or None."""
    ids = encode(tokenizer, ["a"])[0]
    bos = tokenizer.bos_token_id
    return bos if bos is not None and ids and ids[0] == bos else None


def _check_json(path: Path) -> None:
    """Raise :class:`CheckpointError` when ``path`` exists and is not a JSON object."""
    if not path.exists():
        return
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{path}: not readable JSON ({error}): copy the file of the original model again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object: copy the file of the original model again")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the "sequence longer than the model's maximum" warning: texts are cut into windows later."""
    logger = logging.getLogger("transformers.tokenization_utils_base")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
