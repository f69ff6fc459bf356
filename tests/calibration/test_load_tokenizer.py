"""Tokenizers that are missing or broken are told in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lowbit.calibration import Tokenizer, load_tokenizer
from lowbit.calibration.tokenizer import encode, leading_bos
from lowbit.errors import CheckpointError


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"tokenizer missing .* copy the tokenizer files"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "tokenizer.json: not readable JSON"),
        ("[]", "tokenizer.json: expected a JSON object"),
        ('{"version": "1.0", "model": {"type": "Nonsense"}}', "the tokenizer cannot be loaded"),
    ],
)
def test_broken(tiny_llama: Path, tmp_path: Path, content: str, expected: str) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama / name, tmp_path)
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=expected) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_leading_bos(tokenizer: Tokenizer, shared: Path) -> None:
    assert leading_bos(tokenizer) is None
    stories = load_tokenizer(shared / "models" / "stories260K")
    assert leading_bos(stories) == 1
    assert encode(stories, ["hello"], special=False)[0] == encode(stories, ["hello"])[0][1:]
