"""SentencePiece vocabularies: llama.cpp's token ids against the original's, for the ways that spaces are treated."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from lowbit.codecs.gguf.hard_texts import HARD_TEXTS, with_special_tokens
from lowbit.codecs.gguf.piece_merging import PieceMerger, byte_token
from lowbit.codecs.gguf.sentencepiece_model import read_piece_model
from lowbit.codecs.gguf.vocabulary import read_vocabulary
from lowbit.errors import CheckpointError, UnsupportedError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
TO_SIGN = normalizers.Replace(" ", "▁")
STYLES: dict[str, tuple[Any, Any, bool]] = {
    "prepended": (normalizers.Sequence([normalizers.Prepend("▁"), TO_SIGN]), None, True),
    "metaspace": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), True),
    "bare": (TO_SIGN, None, False),
}
"""Normalizer, pre-tokenizer, and whether a text begins with a space."""


def pieces() -> list[str]:
    """Texts of tokens in the order of their merging: learnt from words, so that no token holds a space inside."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    texts = [text.replace("\0", "") for text in HARD_TEXTS]
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1100, show_progress=False))
    vocabulary = trained.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def spm_tokenizer(style: str, extra: tuple[str, ...] = ()) -> Tokenizer:
    """A LLaMA-like tokenizer: every pair that makes a token is a merge, ranked as the token is."""
    normalizer, pre_tokenizer, _ = STYLES[style]
    ordered = ["<unk>", "<s>", "</s>", *map(byte_token, range(256)), *pieces(), *extra]
    vocabulary = {text: id for id, text in enumerate(dict.fromkeys(ordered))}
    merges = [
        (text[:cut], text[cut:])
        for text in vocabulary
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", AddedToken("[INST]", normalized=False)])
    return tokenizer


PLAIN = [text for text in HARD_TEXTS if "<s>" not in text]


@pytest.mark.parametrize("style", STYLES)
def test_llama_cpp_gives_the_originals_ids(
    style: str, save_tokenizer: Callable[..., Path], llama_cpp_ids: Callable[..., list[list[int]]]
) -> None:
    directory = save_tokenizer(spm_tokenizer(style), **SPECIAL)
    original = AutoTokenizer.from_pretrained(directory)
    vocabulary = read_vocabulary(directory, len(original) + 7, {})
    assert vocabulary.metadata["tokenizer.ggml.model"] == "llama"
    assert vocabulary.metadata["tokenizer.ggml.add_space_prefix"] is STYLES[style][2]
    texts = [*PLAIN, *with_special_tokens(["<s>", "[INST]"])]
    expected = original(texts)["input_ids"]
    actual = llama_cpp_ids(vocabulary.metadata, texts, special=True)
    special = range(len(PLAIN), len(texts))
    for index, (text, ids, wanted) in enumerate(zip(texts, actual, expected, strict=True)):
        if style == "metaspace" and (index in special or text.startswith(" ")):
            continue  # what the notes tell of
        assert ids == wanted, text
    differing = sum(ids != wanted for ids, wanted in zip(actual, expected, strict=True))
    assert len(vocabulary.notes) == (2 if style == "metaspace" else 0)
    assert bool(vocabulary.notes) is bool(differing)


def test_the_model_of_llama_cpp_equals_llama_cpp(
    save_tokenizer: Callable[..., Path], llama_cpp_ids: Callable[..., list[list[int]]]
) -> None:
    directory = save_tokenizer(spm_tokenizer("metaspace", extra=("▁▁", "▁▁▁▁")), **SPECIAL)
    metadata: Any = read_vocabulary(directory, 1600, {}).metadata
    merger = PieceMerger(
        metadata["tokenizer.ggml.tokens"],
        metadata["tokenizer.ggml.scores"].value,
        metadata["tokenizer.ggml.token_type"].value,
        add_space_prefix=metadata["tokenizer.ggml.add_space_prefix"],
    )
    texts = [*HARD_TEXTS, *with_special_tokens(["<s>", "[INST]", "<unk>"])]
    for text, ids in zip(texts, llama_cpp_ids(metadata, texts), strict=True):
        assert merger.ids(text) == ids, text


def test_added_runs_of_spaces_are_found(
    save_tokenizer: Callable[..., Path], llama_cpp_ids: Callable[..., list[list[int]]]
) -> None:
    tokenizer = spm_tokenizer("bare", extra=("▁▁", "▁▁▁"))
    tokenizer.add_tokens([AddedToken("▁▁", normalized=False), AddedToken("▁▁▁", normalized=False)])
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    directory = save_tokenizer(tokenizer, **SPECIAL)
    original = AutoTokenizer.from_pretrained(directory)
    metadata = read_vocabulary(directory, len(original), {}).metadata
    for text, ids, wanted in zip(
        PLAIN, llama_cpp_ids(metadata, PLAIN), original(PLAIN, add_special_tokens=False)["input_ids"], strict=True
    ):
        assert ids == wanted, text


def test_a_real_model(shared: Path, llama_cpp_ids: Callable[..., list[list[int]]]) -> None:
    stories = shared / "models" / "stories260K"
    original = AutoTokenizer.from_pretrained(stories)
    vocabulary = read_vocabulary(stories, 512, {})
    assert vocabulary.notes == ()
    texts = [*HARD_TEXTS, *with_special_tokens(["<s>", "</s>"])]
    assert llama_cpp_ids(vocabulary.metadata, texts, special=True) == original(texts)["input_ids"]


def test_merges_that_scores_cannot_say_are_refused(save_tokenizer: Callable[..., Path]) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = TO_SIGN
    tokenizer.train_from_iterator(
        HARD_TEXTS,
        trainers.BpeTrainer(
            vocab_size=1100,
            special_tokens=["<unk>", "<s>", "</s>", *map(byte_token, range(256))],
            show_progress=False,
        ),
    )
    directory = save_tokenizer(tokenizer, **SPECIAL)
    with pytest.raises(UnsupportedError, match="gives other tokens, first on"):
        read_vocabulary(directory, 1200, {})


def test_without_all_bytes_it_is_refused(save_tokenizer: Callable[..., Path]) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"<unk>": 0, "a": 1}, merges=[], unk_token="<unk>", byte_fallback=True))
    directory = save_tokenizer(tokenizer, unk_token="<unk>", eos_token="a")
    with pytest.raises(UnsupportedError, match="256 of 256 byte tokens are missing"):
        read_vocabulary(directory, 10, {})


def _field(number: int, payload: bytes | int) -> bytes:
    if isinstance(payload, int):
        return bytes([number << 3, payload])
    return bytes([number << 3 | 2]) + bytes([len(payload)]) + payload


def _model(entries: list[tuple[str, float, int]]) -> bytes:
    found = b""
    for text, score, kind in entries:
        piece = _field(1, text.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score) + _field(3, kind)
        found += _field(1, piece)
    return found + _field(2, _field(3, 2)) + _field(3, _field(3, 0))


def test_a_sentencepiece_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(_model([("<unk>", 0.0, 2), ("▁a", -1.5, 1), ("<0x0A>", 0.0, 6)]))
    found = read_piece_model(path)
    assert found.pieces == ("<unk>", "▁a", "<0x0A>")
    assert found.scores == (0.0, -1.5, 0.0)
    assert found.kinds == (2, 1, 6)
    assert (found.model_type, found.add_dummy_prefix) == (2, False)


def test_a_broken_sentencepiece_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    entries = [("<unk>", 0.0, 2), ("▁a", -1.5, 1)]
    data = _model(entries)
    tail = len(_model([]))
    whole = {len(_model(entries[:1])) - tail, len(data) - tail, len(data) - tail // 2}
    for cut in set(range(len(data))) - whole:
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match="not a SentencePiece model"):
            read_piece_model(path)
