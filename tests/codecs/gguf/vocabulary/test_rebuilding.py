"""From GGUF back to Hugging Face: the same ids, texts, special tokens and chat templates."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lowbit.calibration import load_tokenizer
from lowbit.codecs.gguf.container import read_gguf
from lowbit.codecs.gguf.hard_texts import HARD_TEXTS, with_special_tokens
from lowbit.codecs.gguf.vocabulary import read_vocabulary, tokenizer_from_gguf, write_tokenizer
from lowbit.errors import CheckpointError, LowbitError, UnsupportedError

DEMO = Path(__file__).parents[4] / "src" / "lowbit" / "demo" / "model"


def plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata as a reader gives it."""
    return {key: getattr(value, "value", value) for key, value in metadata.items()}


@functools.cache
def demo() -> dict[str, Any]:
    """Made once; tests only add to copies."""
    return plain(read_vocabulary(DEMO, 2048, json.loads((DEMO / "config.json").read_text())).metadata)


def test_byte_level_there_and_back(tmp_path: Path) -> None:
    _there_and_back(DEMO, tmp_path)


def test_sentencepiece_there_and_back(shared: Path, tmp_path: Path) -> None:
    _there_and_back(shared / "models" / "stories260K", tmp_path)


def _there_and_back(directory: Path, tmp_path: Path) -> None:
    original: Any = AutoTokenizer.from_pretrained(directory)
    metadata = plain(read_vocabulary(directory, len(original) + 5, {}).metadata)
    files = write_tokenizer(metadata, tmp_path)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in files}
    rebuilt: Any = load_tokenizer(tmp_path)
    texts = [*HARD_TEXTS, *with_special_tokens([original.bos_token, original.eos_token])]
    ids = original(texts)["input_ids"]
    assert rebuilt(texts)["input_ids"] == ids
    assert len(rebuilt) == len(original)
    assert rebuilt.chat_template == original.chat_template
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(rebuilt, role) == getattr(original, role)
    for row in ids:
        assert rebuilt.decode(row, skip_special_tokens=True) == original.decode(row, skip_special_tokens=True)


def test_several_chat_templates() -> None:
    metadata = demo() | {"tokenizer.chat_template.tool_use": "{{ tools }}"}
    assert tokenizer_from_gguf(metadata).chat_template == {
        "default": metadata["tokenizer.chat_template"],
        "tool_use": "{{ tools }}",
    }


def test_a_gguf_file_is_a_place_for_a_tokenizer(tmp_path: Path) -> None:
    from lowbit.codecs.gguf.writing import write_gguf

    path = tmp_path / "vocabulary.gguf"
    vocabulary = read_vocabulary(DEMO, 2048, {})
    write_gguf(path, {"general.architecture": "llama", **vocabulary.metadata}, [], [])
    assert read_gguf(path).metadata["tokenizer.ggml.pre"] == "gpt-2"
    expected = AutoTokenizer.from_pretrained(DEMO)(list(HARD_TEXTS))["input_ids"]
    assert load_tokenizer(path)(list(HARD_TEXTS))["input_ids"] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.tokens": []}, "holds no vocabulary"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "twice"),
        ({"tokenizer.ggml.tokens": ["a", 3]}, "not a list of the right type"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "2 entries for 2048 tokens"),
        ({"tokenizer.ggml.merges": ["ab"]}, "not a pair"),
        ({"tokenizer.ggml.merges": ["neither token"]}, "contradicts itself"),
        ({"tokenizer.ggml.pre": "nobody"}, "pre-tokenizer 'nobody'"),
        ({"tokenizer.ggml.model": "rwkv"}, "of kind 'rwkv'"),
        ({"tokenizer.ggml.model": "bert"}, "unknown_token_id is missing"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        tokenizer_from_gguf(demo() | changes)


@pytest.mark.parametrize("model", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("key", ["tokens", "token_type", "merges", "scores", "bos_token_id", "unknown_token_id"])
def test_any_value_gives_a_tokenizer_or_a_named_error(model: str, key: str) -> None:
    metadata = demo() | {"tokenizer.ggml.model": model}
    metadata["tokenizer.ggml.tokens"] = metadata["tokenizer.ggml.tokens"][:300]
    metadata["tokenizer.ggml.token_type"] = metadata["tokenizer.ggml.token_type"][:300]
    metadata["tokenizer.ggml.merges"] = metadata["tokenizer.ggml.merges"][:20]
    for value in ("text", -1, 1 << 40, 1.5, True, [], ["", " ", "x y"], [7] * 300, [[1]]):
        with contextlib.suppress(LowbitError):
            tokenizer_from_gguf(metadata | {f"tokenizer.ggml.{key}": value})
