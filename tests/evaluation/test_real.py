"""A trained model, where it lies beside the checkout, against the perplexity that others measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lowbit.calibration import encode_text, load_tokenizer
from lowbit.evaluation.evaluate import evaluate
from lowbit.evaluation.summary import continuation


def test_a_token_keeps_the_space_in_front_of_its_word(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "models" / "stories260K")
    before, word = (encode_text(text, "t", tokenizer).ids.tolist() for text in ("Once upon", "Once upon a time"))
    assert continuation(tokenizer, before, word[len(before) :]) == " a time"
    assert tokenizer.decode(word[len(before) :]) == "a time"


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
