"""A tiny tokenizer, fresh for each test because tests change its chat template."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.calibration import Tokenizer, load_tokenizer


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return load_tokenizer(tiny_llama)
