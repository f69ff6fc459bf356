"""A trained model, where it lies beside the checkout, against the perplexity that others measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lowbit.calibration import encode_text, load_tokenizer
from lowbit.evaluation.evaluate import evaluate


@pytest.mark.slow
def test_stories_perplexity(shared: Path) -> None:
    model = shared / "models" / "stories260K"
    text = (shared / "corpora" / "tinystories-val-1k.txt").read_text(encoding="utf-8")
    folded = re.sub(r"\n\s*\n", "\n", text)
    words = encode_text(folded, "tinystories", load_tokenizer(model), max_tokens=60_001)
    result = evaluate(model, text=words)
    assert result.seq_len == 512
    assert result.tokens == 60_000
    assert result.perplexity == pytest.approx(3.902, abs=0.005)
