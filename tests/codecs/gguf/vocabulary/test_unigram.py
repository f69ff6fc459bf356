"""Unigram vocabularies: llama.cpp's token ids against XLM-R's, and against lowbit's model of llama.cpp."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lowbit.codecs.gguf.character_map import CharacterMap
from lowbit.codecs.gguf.hard_texts import HARD_TEXTS, with_special_tokens
from lowbit.codecs.gguf.token_table import TokenTable
from lowbit.codecs.gguf.unigram import UnigramCutter
from lowbit.codecs.gguf.vocabulary import read_vocabulary, tokenizer_from_gguf
from lowbit.errors import UnsupportedError

SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}


def like_xlm_r(pieces: list[tuple[str, float]], characters: bytes) -> Tokenizer:
    """The pipeline of XLM-R around a vocabulary."""
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    if characters:
        tokenizer.normalizer = normalizers.Precompiled(characters)
    words = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True, normalized=False)])
    return tokenizer


def framed(pieces: list[tuple[str, float]]) -> list[tuple[str, float]]:
    return [(text, 0.0) for text in ("<s>", "<pad>", "</s>", "<unk>")] + pieces


def trained_here() -> Tokenizer:
    """Without normalization or a space in front: every space counts."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    texts = [text.replace("\0", "") for text in HARD_TEXTS]
    tokenizer.train_from_iterator(texts, trainers.UnigramTrainer(vocab_size=900, show_progress=False))
    # SentencePiece stores float32; sums of other numbers would order equal cuts another way.
    pieces = [(text, float(np.float32(score))) for text, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    trained = like_xlm_r(framed(pieces), b"")
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    return trained


def with_character_map() -> Tokenizer:
    """Trained by SentencePiece, with its default normalization."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from lowbit.codecs.gguf.sentencepiece_model import _parse

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in HARD_TEXTS * 3 for line in text.replace("\0", "").split("\n")]),
        model_writer=written,
        vocab_size=900,
        hard_vocab_limit=False,
        character_coverage=0.98,
        minloglevel=2,
    )
    model = _parse(written.getvalue())
    pieces = list(zip(model.pieces, model.scores, strict=True))[3:]
    return like_xlm_r(framed(pieces), model.character_map)


@pytest.mark.parametrize("make", [trained_here, with_character_map])
def test_llama_cpp_gives_the_originals_ids(
    make: Callable[[], Tokenizer], save_tokenizer: Callable[..., Path], llama_cpp_ids: Callable[..., list[list[int]]]
) -> None:
    tokenizer = make()
    vocabulary = read_vocabulary(save_tokenizer(tokenizer, **SPECIAL), tokenizer.get_vocab_size() + 3, {})
    metadata: Any = vocabulary.metadata
    assert metadata["tokenizer.ggml.model"] == "t5"
    mapped = metadata.get("tokenizer.ggml.precompiled_charsmap")
    cutter = UnigramCutter(
        TokenTable(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"].value),
        metadata["tokenizer.ggml.scores"].value,
        None if mapped is None else CharacterMap(bytes(mapped.value)),
        add_space_prefix=metadata["tokenizer.ggml.add_space_prefix"],
        merge_spaces=metadata["tokenizer.ggml.remove_extra_whitespaces"],
    )
    texts = [*HARD_TEXTS, *with_special_tokens(["<s>", "</s>", "<pad>"])]
    actual = llama_cpp_ids(metadata, texts, special=True)
    expected = [tokenizer.encode(text).ids for text in texts]
    for text, ids in zip(texts, actual, strict=True):
        assert [0, *cutter.ids(text), 2] == ids, text
    different = [text for text, ids, wanted in zip(texts, actual, expected, strict=True) if ids != wanted]
    assert len(different) <= (0 if mapped is None else 2)
    assert any("one by one" in note for note in vocabulary.notes) is bool(different)
    assert any("<mask>" in note for note in vocabulary.notes)
    rebuilt = tokenizer_from_gguf({key: getattr(value, "value", value) for key, value in metadata.items()})
    assert rebuilt(texts)["input_ids"] == expected


def test_spaces_that_llama_cpp_cannot_merge_are_refused(save_tokenizer: Callable[..., Path]) -> None:
    tokenizer = trained_here()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    with pytest.raises(UnsupportedError, match="unigram tokenizer gives other tokens, first on"):
        read_vocabulary(save_tokenizer(tokenizer, **SPECIAL), 1000, {})


@pytest.mark.parametrize("data", [b"", b"abc", b"\0\0\0\0rest", b"\x08\0\0\0abcd", b"\x04\0\0\0\xff\xff\xff\xff\0"])
def test_a_damaged_character_map(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"it|its"):
        CharacterMap(data).apply("text")
