"""WordPiece vocabularies: llama.cpp's token ids against BERT's, and against lowbit's model of llama.cpp."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from lowbit.codecs.gguf.hard_texts import HARD_TEXTS, with_special_tokens
from lowbit.codecs.gguf.token_table import TokenTable
from lowbit.codecs.gguf.vocabulary import read_vocabulary
from lowbit.codecs.gguf.wordpiece import WordSplitter
from lowbit.errors import UnsupportedError

SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
ROWS = 1600


def wordpiece(*, lowercase: bool, strip_accents: bool | None = None, pre_tokenizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    texts = [unicodedata.normalize("NFC", text) for text in HARD_TEXTS]
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=1500, special_tokens=list(SPECIAL.values()), show_progress=False)
    )
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    tokenizer.add_special_tokens([AddedToken("[MASK]", normalized=False)])
    return tokenizer


TEXTS = [*HARD_TEXTS, *with_special_tokens(["[MASK]", "[SEP]"])]


@pytest.mark.parametrize(("lowercase", "strip_accents"), [(True, None), (False, None), (True, False), (False, True)])
def test_llama_cpp_gives_the_originals_ids(
    lowercase: bool,
    strip_accents: bool | None,
    save_tokenizer: Callable[..., Path],
    llama_cpp_ids: Callable[..., list[list[int]]],
) -> None:
    directory = save_tokenizer(wordpiece(lowercase=lowercase, strip_accents=strip_accents), **SPECIAL)
    original = AutoTokenizer.from_pretrained(directory)
    vocabulary = read_vocabulary(directory, ROWS, {})
    metadata: Any = vocabulary.metadata
    strips = metadata["tokenizer.ggml.normalizer.strip_accents"]
    splitter = WordSplitter(
        TokenTable(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"].value),
        "[UNK]",
        lowercase=lowercase,
        strip_accents=strips,
    )
    assert strips is (lowercase if strip_accents is None else strip_accents)
    expected = original(TEXTS)["input_ids"]
    actual = llama_cpp_ids(metadata, TEXTS, special=True)
    for text, ids in zip(TEXTS, actual, strict=True):
        assert splitter.ids(text) == ids[1:-1], text
    different = sum(ids != wanted for ids, wanted in zip(actual, expected, strict=True))
    assert 0 < different == sum(int(note.split(": ")[1].split()[0]) for note in vocabulary.notes) < 16
    plain = next(index for index, text in enumerate(TEXTS) if text.startswith("The quick brown fox"))
    assert actual[plain] == expected[plain]


def test_another_way_to_split_is_refused(save_tokenizer: Callable[..., Path]) -> None:
    tokenizer = wordpiece(lowercase=True, pre_tokenizer=pre_tokenizers.Whitespace())
    with pytest.raises(UnsupportedError, match="cleans and splits words as BERT does"):
        read_vocabulary(save_tokenizer(tokenizer, **SPECIAL), ROWS, {})
