"""Byte-level BPE: the pre-tokenizer found by behaviour, and llama.cpp's token ids against the original's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from lowbit.codecs.gguf.byte_level import byte_level_tokenizer, split_pre_tokenizer
from lowbit.codecs.gguf.hard_texts import HARD_TEXTS, with_special_tokens
from lowbit.codecs.gguf.pre_tokenizers import PRE_TOKENIZERS
from lowbit.codecs.gguf.vocabulary import read_vocabulary

DEMO = Path(__file__).parents[4] / "src" / "lowbit" / "demo" / "model"
ROWS = 1400

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _bytes(*, use_regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _sequence(*patterns: str) -> Any:
    return pre_tokenizers.Sequence([*map(_split, patterns), _bytes(use_regex=False)])


ORIGINALS: dict[str, Any] = {
    "gpt-2": _bytes(use_regex=True),
    "llama-bpe": _sequence(rf"{_SHORT}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"),
    "qwen2": _sequence(rf"{_SHORT}|{_WORDS}|\p{{N}}|{_REST}"),
    "starcoder": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _bytes(use_regex=True)]),
    "seed-coder": _sequence(rf"{_SHORT}|{_WORDS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"),
}
"""Pre-tokenizers as the models' own tokenizer.json has them, where that is another spelling than llama.cpp's."""

LETTERS_ONLY_ASCII_CASE = ("tekken", "gpt-4o")


def train(pre_tokenizer: Any, *, ignore_merges: bool = False, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS - 20,
        special_tokens=["<|bos|>", "<|end_of_text|>", "<|pad|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*HARD_TEXTS, *HARD_TEXTS], trainer)
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", normalized=False)])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("    ", normalized=False)])
    return tokenizer


TEXTS = [*HARD_TEXTS, *with_special_tokens(["<|bos|>", "<|im_end|>", "<think>", "    "])]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_llama_cpp_gives_the_originals_ids(
    name: str, save_tokenizer: Callable[..., Path], llama_cpp_ids: Callable[..., list[list[int]]]
) -> None:
    entry = PRE_TOKENIZERS[name]
    pre_tokenizer = ORIGINALS.get(name) or split_pre_tokenizer(entry.original or entry.splits)
    directory = save_tokenizer(train(pre_tokenizer, ignore_merges=entry.ignore_merges))
    vocabulary = read_vocabulary(directory, ROWS, {})
    found = PRE_TOKENIZERS[str(vocabulary.metadata["tokenizer.ggml.pre"])]
    assert found.splits == entry.splits
    original = AutoTokenizer.from_pretrained(directory)
    expected = original(TEXTS, add_special_tokens=False)["input_ids"]
    actual = llama_cpp_ids(vocabulary.metadata, TEXTS)
    if entry.original:
        tokens, kinds = vocabulary.metadata["tokenizer.ggml.tokens"], vocabulary.metadata["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ")) for merge in vocabulary.metadata["tokenizer.ggml.merges"].value]  # type: ignore[union-attr]
        model = byte_level_tokenizer(tokens, kinds.value, merges, entry)  # type: ignore[arg-type, union-attr]
        differing = sum(ids != wanted for ids, wanted in zip(actual, expected, strict=True))
        assert any(f"{differing} of" in note for note in vocabulary.notes)
        expected = [model.encode(text, add_special_tokens=False).ids for text in TEXTS]
    else:
        assert vocabulary.notes == ()
    for text, ids, wanted in zip(TEXTS, actual, expected, strict=True):
        assert ids == wanted, text
