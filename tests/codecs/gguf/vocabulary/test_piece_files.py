"""Checkpoints with nothing but SentencePiece's own file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.calibration import load_tokenizer
from lowbit.codecs.gguf.hard_texts import HARD_TEXTS
from lowbit.codecs.gguf.piece_files import has_only_pieces, tokenizer_from_pieces
from lowbit.codecs.gguf.piece_merging import byte_token
from lowbit.codecs.gguf.vocabulary import read_vocabulary
from lowbit.errors import CheckpointError, LowbitError, UnsupportedError


def field(number: int, payload: bytes | int) -> bytes:
    if isinstance(payload, int):
        return bytes([number << 3, payload])
    return bytes([number << 3 | 2]) + bytes([len(payload)]) + payload


def piece(text: str, score: float, kind: int) -> bytes:
    import struct

    return field(1, field(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score) + field(3, kind))


def write_pieces(directory: Path, *, model_type: int = 2, character_map: bytes = b"") -> None:
    """``tokenizer.model`` with a few words, and what is beside it."""
    words = ["▁t", "▁th", "he", "▁the", "▁", "t", "h", "e"]
    data = piece("<unk>", 0, 2) + piece("<s>", 0, 3) + piece("</s>", 0, 3)
    data += b"".join(piece(byte_token(byte), 0, 6) for byte in range(256))
    data += b"".join(piece(word, -float(rank), 1) for rank, word in enumerate(words))
    data += field(2, field(3, model_type)) + field(3, (field(2, character_map) if character_map else b"") + field(3, 1))
    (directory / "tokenizer.model").write_bytes(data)
    (directory / "added_tokens.json").write_text(json.dumps({"<pad>": 270}))
    config = {"tokenizer_class": "LlamaTokenizer", "pad_token": {"content": "<pad>"}, "chat_template": "{{ messages }}"}
    decoder = {"268": {"content": "[INST]", "special": True}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": decoder}))


def test_a_directory_of_pieces(tmp_path: Path, llama_cpp_ids: Callable[..., list[list[int]]]) -> None:
    write_pieces(tmp_path)
    assert has_only_pieces(tmp_path)
    tokenizer: Any = tokenizer_from_pieces(tmp_path)
    first = 259
    assert tokenizer("the").input_ids == [1, first + 3]
    assert tokenizer("[INST]").input_ids == [1, 268]
    assert tokenizer("é").input_ids == [1, first + 4, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.pad_token_id == 270
    vocabulary = read_vocabulary(tmp_path, 280, {})
    assert vocabulary.metadata["tokenizer.ggml.padding_token_id"] == 270
    assert vocabulary.metadata["tokenizer.chat_template"] == "{{ messages }}"
    texts = list(HARD_TEXTS)
    assert llama_cpp_ids(vocabulary.metadata, texts, special=True) == tokenizer(texts)["input_ids"]


def test_calibration_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pieces(tmp_path)
    monkeypatch.setattr("lowbit.calibration.tokenizer.importlib.util.find_spec", lambda name: None)
    assert load_tokenizer(tmp_path)(["the"])["input_ids"] == [[1, 262]]


def test_other_models_are_refused(tmp_path: Path) -> None:
    for options in ({"model_type": 1}, {"character_map": b"map"}):
        write_pieces(tmp_path, **options)  # type: ignore[arg-type]
        with pytest.raises(UnsupportedError, match="BPE without normalization"):
            tokenizer_from_pieces(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("added_tokens.json", "{"),
        ("added_tokens.json", "[]"),
        ("added_tokens.json", '{"x": -1}'),
        ("added_tokens.json", '{"x": 99999999}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}'),
    ],
)
def test_damage_beside_it_is_named(tmp_path: Path, name: str, text: str) -> None:
    write_pieces(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(LowbitError) as caught:
        tokenizer_from_pieces(tmp_path)
    assert isinstance(caught.value, CheckpointError)
    assert str(tmp_path) in str(caught.value)


def test_sentencepiece_agrees(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in HARD_TEXTS * 2 for line in text.replace("\0", "").split("\n")]),
        model_writer=written,
        vocab_size=1100,
        model_type="bpe",
        hard_vocab_limit=False,
        character_coverage=0.98,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    oracle = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    tokenizer: Any = tokenizer_from_pieces(tmp_path)
    for text in HARD_TEXTS:
        if "<s>" not in text:
            assert tokenizer(text, add_special_tokens=False).input_ids == oracle.encode(text), text
