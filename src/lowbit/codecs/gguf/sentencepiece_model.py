"""Reads SentencePiece's ``tokenizer.model``: pieces, scores, kinds and how spaces are treated.

The file is a protocol buffer (``sentencepiece_model.proto``). Only the wire format of the few fields that are needed is
read here, so that neither sentencepiece nor protobuf has to be installed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lowbit.errors import CheckpointError

__all__ = ["PieceModel", "read_piece_model"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_KIND = 1, 2, 3
_TRAINER_MODEL_TYPE = 3
_NORMALIZER_CHARACTERS, _NORMALIZER_DUMMY_PREFIX = 2, 3
BPE = 2
"""``model_type`` of byte pair encoding; 1 is unigram."""


@dataclass(frozen=True, slots=True)
class PieceModel:
    """Pieces by id. ``kinds`` are SentencePiece's, which are llama.cpp's token types as well."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    kinds: tuple[int, ...]
    model_type: int
    add_dummy_prefix: bool
    character_map: bytes


def read_piece_model(path: Path) -> PieceModel:
    """Parse ``path``. Raises :class:`CheckpointError` for a file that is not a SentencePiece model."""
    try:
        return _parse(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model ({error}); download it again") from error


@lru_cache(maxsize=1)  # one vocabulary is asked for its pieces, then for its scores
def _parse(data: bytes) -> PieceModel:
    pieces: list[tuple[str, float, int]] = []
    model_type, dummy_prefix, characters = 1, True, b""
    for field, value in _fields(data):
        if field == _PIECES:
            pieces.append(_piece(_as_bytes(value)))
        elif field == _TRAINER:
            found = dict(_fields(_as_bytes(value)))
            model_type = _as_int(found.get(_TRAINER_MODEL_TYPE, model_type))
        elif field == _NORMALIZER:
            found = dict(_fields(_as_bytes(value)))
            characters = _as_bytes(found.get(_NORMALIZER_CHARACTERS, b""))
            dummy_prefix = bool(_as_int(found.get(_NORMALIZER_DUMMY_PREFIX, 1)))
    if not pieces:
        raise ValueError("it has no pieces")
    texts, scores, kinds = zip(*pieces, strict=True)
    return PieceModel(texts, scores, kinds, model_type, dummy_prefix, characters)


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, 1
    for field, value in _fields(data):
        if field == _PIECE_TEXT:
            text = _as_bytes(value).decode("utf-8")
        elif field == _PIECE_SCORE:
            (score,) = struct.unpack("<f", _as_bytes(value))
        elif field == _PIECE_KIND:
            kind = _as_int(value)
    return text, score, kind


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """``(field number, value)``: an int for varints, bytes for everything else."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind == _BYTES:
            length, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        if length > len(data) - at:
            raise ValueError("it is truncated")
        yield tag >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it is truncated")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number of more than 64 bits")


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value


def _as_int(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("bytes where a number belongs")
    return value
