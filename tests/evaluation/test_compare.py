"""Comparison of ways to quantize a tiny model, and the front of those that nothing beats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import UnsupportedError, UsageError
from lowbit.evaluation.compare import compare
from lowbit.evaluation.frontier import frontier
from lowbit.evaluation.results import Candidate, Comparison, Evaluation
from lowbit.pipeline.candidates import contenders

SHARED = {"samples": 4, "seq_len": 64, "seed": 1}


def fake(name: str, bits: float, divergence: float | None) -> Candidate:
    evaluation = Evaluation("m", "t", "0", 1, 1, 1, None, 1.0, 0.0, bits, bits, 1, kl_divergence=divergence)
    return Candidate(name, name, "s", evaluation)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    found = frontier(Comparison("t", tuple(fake(str(i), bits, kl) for i, (bits, kl) in enumerate(points))))
    assert found
    for i, (bits, kl) in enumerate(points):
        beaten = any(b <= bits and k <= kl and (b, k) != (bits, kl) for b, k in points)
        assert (str(i) in found) != beaten


def test_an_unmeasured_candidate_is_not_on_the_front() -> None:
    comparison = Comparison("t", (fake("a", 4, None), fake("b", 5, 0.1), fake("c", 3, float("inf"))))
    assert frontier(comparison) == {"b"}


def test_each_way_is_measured_on_the_same_text(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    ways = contenders(["rtn", "gptq", "nf4", "q8_0"], [4], group_size=32, symmetric=True)
    found = compare(tiny_llama, ways, out=tmp_path / "kept", max_tokens=256, calibration=calibration_file, **SHARED)
    assert [one.name for one in found.candidates] == [way.name for way in ways]
    assert len({(one.evaluation.text_sha256, one.evaluation.tokens) for one in found.candidates}) == 1
    for one in found.candidates:
        assert one.seconds is not None
        assert one.seconds > 0
        assert 100 << 20 < (one.peak_memory_bytes or 0) < 16 << 30
        assert (one.evaluation.kl_divergence or 0) > 0
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert kept == {"gptq-4bit", "nf4", "q8_0.gguf", "q8_0.lowbit.json", "rtn-4bit"}
    bits = {one.name: one.evaluation.linear_bits_per_weight for one in found.candidates}
    assert bits["NF4"] == pytest.approx(4.5, abs=0.2)
    assert bits["GPTQ 4 bit"] == bits["RTN 4 bit"]


def test_what_the_model_rules_out_becomes_a_note(new_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    odd = new_checkpoint(tmp_path / "odd", "llama", intermediate_size=200)
    ways = contenders(["rtn", "nf4"], [4], group_size=128, symmetric=True)
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 200)
    found = compare(odd, ways, text=text, max_tokens=128, **SHARED)
    assert [one.name for one in found.candidates] == ["NF4"]
    assert any("RTN 4 bit is left out" in note and "does not divide" in note for note in found.notes)
    with pytest.raises(UnsupportedError, match="no contender"):
        compare(odd, ways[:1], text=text, max_tokens=128, **SHARED)


def test_text_is_asked_for_before_any_work(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match="--calibration FILE"):
        compare(tiny_llama, contenders(["nf4"], [4], group_size=128, symmetric=True))
