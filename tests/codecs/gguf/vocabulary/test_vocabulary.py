"""What is around the tokens: special ids, chat templates, padding, notes and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lowbit.codecs.gguf.hard_texts import HARD_TEXTS, with_special_tokens
from lowbit.codecs.gguf.pre_tokenizers import ALIASES, PRE_TOKENIZERS, find_pre_tokenizer
from lowbit.codecs.gguf.token_table import CONTROL, NORMAL, UNUSED, USER_DEFINED
from lowbit.codecs.gguf.vocabulary import read_vocabulary, vocabulary_metadata
from lowbit.errors import CheckpointError, UnsupportedError

ROWS = 700


def byte_level(*, pattern: str | None = None, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    tokenizer.pre_tokenizer = byte_alphabet
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_alphabet])
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(
        HARD_TEXTS,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<|bos|>", "<|eos|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return tokenizer


SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}


def test_the_hard_texts_are_hard() -> None:
    assert len(set(HARD_TEXTS)) == len(HARD_TEXTS)
    joined = "".join(HARD_TEXTS)
    for needed in ("\u200d", "\u0301", "\u200f", "\ufffd", "\x00", "\r\n", "\t\t\t", "中", "ا", "'ll", "123456789"):
        assert needed in joined
    assert max(map(len, HARD_TEXTS)) >= 200
    assert with_special_tokens(["<s>"])[0] == "<s>"


def test_names_of_pre_tokenizers() -> None:
    assert set(ALIASES.values()) <= set(PRE_TOKENIZERS)
    assert not set(ALIASES) & set(PRE_TOKENIZERS)
    assert find_pre_tokenizer("llama3") is PRE_TOKENIZERS["llama-bpe"]
    assert find_pre_tokenizer("nobody") is None


def test_added_tokens_and_unused_rows(save_tokenizer: Callable[..., Path]) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", normalized=False)])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<|fim_prefix|>", normalized=False)])
    directory = save_tokenizer(tokenizer, **SPECIAL)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 600]}))
    metadata: Any = vocabulary_metadata(directory, ROWS, {})
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"].value
    assert len(tokens) == len(kinds) == ROWS
    assert tokens[600:604] == ["<|im_end|>", "<think>", "<|fim_prefix|>", "[PAD603]"]
    # A token that llama.cpp knows by its text is written as what it would be taken for.
    assert kinds[600:604] == [CONTROL, USER_DEFINED, CONTROL, UNUSED]
    assert kinds[:3] == [CONTROL, CONTROL, NORMAL]
    assert metadata["tokenizer.ggml.eos_token_id"] == 1
    assert metadata["tokenizer.ggml.eot_token_id"] == 600
    assert metadata["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize(
    ("eos", "ends", "turn"),
    [
        ("<|im_end|>", [600, 601], 600),  # of a chat model: it ends texts as it ends turns
        ("<|endoftext|>", [601, 600], 600),
        ("<|endoftext|>", [601], 601),
        ("<|eos|>", [1], 600),
        ("<|eos|>", [1, 601], 601),
    ],
)
def test_the_end_of_a_turn(eos: str, ends: list[int], turn: int, save_tokenizer: Callable[..., Path]) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|im_end|>", "<|endoftext|>"])
    directory = save_tokenizer(tokenizer, eos_token=eos)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    metadata = vocabulary_metadata(directory, ROWS, {"bos_token_id": 601})
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.token_to_id(eos)
    assert metadata["tokenizer.ggml.eot_token_id"] == turn
    assert metadata["tokenizer.ggml.bos_token_id"] == 601


@pytest.mark.parametrize(("before", "after"), [("<|bos|> ", ""), ("", " <|eos|>"), ("<|bos|> ", " <|eos|>")])
def test_what_stands_around_a_text(
    before: str, after: str, save_tokenizer: Callable[..., Path], llama_cpp_ids: Callable[..., list[list[int]]]
) -> None:
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{before}$A{after}", special_tokens=[("<|bos|>", 0), ("<|eos|>", 1)]
    )
    metadata = vocabulary_metadata(save_tokenizer(tokenizer, **SPECIAL), ROWS, {})
    assert metadata["tokenizer.ggml.add_bos_token"] is bool(before)
    assert metadata["tokenizer.ggml.add_eos_token"] is bool(after)
    assert llama_cpp_ids(metadata, ["some text"], special=True) == [tokenizer.encode("some text").ids]


def test_more_than_one_token_in_front_is_noted(save_tokenizer: Callable[..., Path]) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["[gMASK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        "[gMASK] <|bos|> $A", special_tokens=[("[gMASK]", 600), ("<|bos|>", 0)]
    )
    vocabulary = read_vocabulary(save_tokenizer(tokenizer, **SPECIAL), ROWS, {})
    assert vocabulary.metadata["tokenizer.ggml.add_bos_token"] is False
    assert vocabulary.notes == ("llama.cpp does not put [gMASK]<|bos|> in front of a text",)


def test_merges_in_their_older_form(save_tokenizer: Callable[..., Path]) -> None:
    directory = save_tokenizer(byte_level(), **SPECIAL)
    pairs = vocabulary_metadata(directory, ROWS, {})["tokenizer.ggml.merges"]
    path = directory / "tokenizer.json"
    description = json.loads(path.read_text())
    description["model"]["merges"] = [" ".join(pair) for pair in description["model"]["merges"]]
    path.write_text(json.dumps(description))
    assert vocabulary_metadata(directory, ROWS, {})["tokenizer.ggml.merges"] == pairs


def test_chat_templates(save_tokenizer: Callable[..., Path]) -> None:
    directory = save_tokenizer(byte_level(), **SPECIAL)
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert vocabulary_metadata(directory, ROWS, {})["tokenizer.chat_template"] == "{{ messages }}"
    (directory / "chat_template.jinja").unlink()
    path = directory / "tokenizer_config.json"
    listed = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": listed}))
    metadata: Any = vocabulary_metadata(directory, ROWS, {})
    assert metadata["tokenizer.chat_template"] == "one"
    assert metadata["tokenizer.chat_template.tool_use"] == "two"
    assert metadata["tokenizer.chat_templates"].value == ["tool_use"]


def test_composition_is_noted(
    save_tokenizer: Callable[..., Path], llama_cpp_ids: Callable[..., list[list[int]]]
) -> None:
    tokenizer = byte_level(normalizer=normalizers.NFC())
    vocabulary = read_vocabulary(save_tokenizer(tokenizer, **SPECIAL), ROWS, {})
    assert any("NFC" in note for note in vocabulary.notes)
    composed = [text for text in HARD_TEXTS if normalizers.NFC().normalize_str(text) == text]
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in composed]
    assert llama_cpp_ids(vocabulary.metadata, composed) == expected


def test_tokens_that_swallow_spaces_are_noted(save_tokenizer: Callable[..., Path]) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|assistant|>", rstrip=True, normalized=False)])
    notes = read_vocabulary(save_tokenizer(tokenizer, **SPECIAL), ROWS, {}).notes
    assert notes == ("llama.cpp does not strip the spaces beside <|assistant|>, which the original tokenizer does",)


@pytest.mark.parametrize(
    ("tokenizer", "first"),
    [
        (byte_level(pattern=r"[aeiou]+|\s+"), "no pre-tokenizer of llama.cpp"),
        (byte_level(normalizer=normalizers.Lowercase()), "no pre-tokenizer of llama.cpp"),
        (byte_level(normalizer=normalizers.NFKC()), "no pre-tokenizer of llama.cpp"),
    ],
    ids=["unknown-split", "lower-case", "compatibility"],
)
def test_other_tokens_are_refused(tokenizer: Tokenizer, first: str, save_tokenizer: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedError, match=f"{first}.* first differs on "):
        read_vocabulary(save_tokenizer(tokenizer, **SPECIAL), ROWS, {})


def test_kinds_without_counterpart_are_refused(save_tokenizer: Callable[..., Path]) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(UnsupportedError, match="WordLevel tokenizer"):
        read_vocabulary(save_tokenizer(tokenizer, eos_token="a"), ROWS, {})


def test_an_embedding_that_is_too_small(save_tokenizer: Callable[..., Path]) -> None:
    directory = save_tokenizer(byte_level(), **SPECIAL)
    with pytest.raises(CheckpointError, match="600 tokens but the embedding only 512 rows"):
        read_vocabulary(directory, 512, {})


def test_added_tokens_without_embedding_are_left_out(save_tokenizer: Callable[..., Path]) -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|im_end|>", "<|never|>"])
    vocabulary = read_vocabulary(save_tokenizer(tokenizer, **SPECIAL, pad_token="<|never|>"), 601, {})
    tokens: Any = vocabulary.metadata["tokenizer.ggml.tokens"]
    assert tokens[600:] == ["<|im_end|>"]
    assert "tokenizer.ggml.padding_token_id" not in vocabulary.metadata
    assert vocabulary.notes == ("added tokens without a row in the embedding are left out: <|never|>",)


def test_some_token_must_end_a_text(save_tokenizer: Callable[..., Path]) -> None:
    directory = save_tokenizer(byte_level(), bos_token="<|bos|>")
    with pytest.raises(CheckpointError, match="no token ends a text"):
        read_vocabulary(directory, ROWS, {})
    assert vocabulary_metadata(directory, ROWS, {"eos_token_id": [7, 1]})["tokenizer.ggml.eos_token_id"] == 7


def test_a_directory_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer missing"):
        read_vocabulary(tmp_path, ROWS, {})
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        read_vocabulary(tmp_path, ROWS, {})
