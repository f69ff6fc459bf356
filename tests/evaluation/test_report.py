"""The report on made-up figures: what must be in the files, and that nothing from the models can break the page."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lowbit.errors import CheckpointError, ResourceError, UsageError
from lowbit.evaluation.plots import margin_over_baseline
from lowbit.evaluation.report import human_bytes, lead_sentence, visible, write_report
from lowbit.evaluation.results import (
    Candidate,
    Comparison,
    Evaluation,
    Histogram,
    PositionBin,
    Sample,
    WorstToken,
    judge_output_error,
    judge_perplexity,
    judge_weight_error,
    read_comparison,
)

HOSTILE = "<script>alert('{{ 7*7 }}')</script> & 中文"


def evaluation(divergence: float, bits: float, **changes: object) -> Evaluation:
    values: dict[str, object] = {
        "model": "candidate",
        "text": "held-out",
        "text_sha256": "0123456789abcdef",
        "tokens": 1000,
        "windows": 10,
        "seq_len": 101,
        "stride": None,
        "perplexity": 8.0 * (1 + divergence),
        "perplexity_error": 0.2,
        "bits_per_weight": bits + 1,
        "linear_bits_per_weight": bits,
        "size_bytes": 3_000_000,
        "reference": "original",
        "reference_bits_per_weight": 16.0,
        "reference_size_bytes": 11_000_000,
        "reference_perplexity": 8.0,
        "reference_perplexity_error": 0.2,
        "perplexity_ratio": 1 + divergence,
        "perplexity_ratio_error": 0.001,
        "kl_divergence": divergence,
        "kl_divergence_error": divergence / 10,
        "kl_median": divergence / 2,
        "kl_p99": divergence * 9,
        "kl_max": 3.0,
        "top1_agreement": 0.95,
        "top1_agreement_error": 0.01,
        "kl_by_position": tuple(PositionBin(p, divergence * (1 + p / 100), 250) for p in (10.0, 40.0, 70.0, 95.0)),
        "kl_histogram": Histogram((1e-4, 1e-3, 1e-2, 1e-1), (300, 500, 200)),
        "worst_tokens": (WorstToken(3, 7, 2.5, HOSTILE, "\n", HOSTILE, 0.7, 0.0001, " a", HOSTILE),),
        "verdicts": (judge_perplexity(1 + divergence, 0.001, bits),),
    }
    return Evaluation(**(values | changes))  # type: ignore[arg-type]


def comparison() -> Comparison:
    candidates = []
    for method, spec, bits, divergence in [
        ("rtn", "int4-g128-sym", 4.125, 0.04),
        ("gptq", "int4-g128-sym", 4.125, 0.02),
        ("rtn", "int3-g128-sym", 3.125, 0.4),
        ("awq", "int3-g128-sym", 3.125, 0.3),
    ]:
        errors = {f"model.layers.{i}.mlp.{name}": divergence * (i + 1) for i in range(3) for name in ("up", "down")}
        name = f"{method.upper()} {spec[3]} bit"
        candidates.append(Candidate(name, method, spec, evaluation(divergence, bits), 12.0, 600 << 20, errors))
    words = {"original": "return the first", "RTN 4 bit": f"return the {HOSTILE}", "GPTQ 4 bit": "return the first"}
    return Comparison(f"A comparison {HOSTILE}", tuple(candidates), (Sample(HOSTILE, words),), (HOSTILE,))


class Page(HTMLParser):
    """Collects tags, text and references; complains about tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.references: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "br", "source"):
            self.open.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_self_contained_and_escaped(tmp_path: Path) -> None:
    path = write_report(tmp_path / "report", comparison())
    page = Page(path.read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) >= 10
    assert {reference.partition(",")[0] for reference in page.references} == {"data:image/png;base64", "report.json"}
    for reference in page.references:
        if reference.startswith("data:"):
            assert base64.b64decode(reference.partition(",")[2]).startswith(b"\x89PNG\r\n")
    for words in ("GPTQ 4 bit", "10.5 MiB", "4.125", "95.0 %", "same text", "same for 11 characters"):
        assert words in page.text
    files = {file.name for file in path.parent.iterdir()}
    plots = {"divergence-by-bits", "divergence-by-method", "divergence-by-position", "divergence-histogram"}
    assert files == {"index.html", "report.json"} | {
        f"{plot}{theme}.png" for plot in (*plots, "error-by-depth") for theme in ("", "-dark")
    }


def test_the_json_is_the_same_data(tmp_path: Path) -> None:
    write_report(tmp_path, comparison())
    assert read_comparison(tmp_path / "report.json") == comparison()
    values = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert values["candidates"][1]["evaluation"]["kl_divergence"] == 0.02
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"report\.json"):
        read_comparison(tmp_path / "report.json")
    with pytest.raises(CheckpointError, match="absent"):
        read_comparison(tmp_path / "absent")


def test_the_same_comparison_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = (write_report(tmp_path / name, comparison()).read_bytes() for name in ("one", "other"))
    assert one == other


def test_one_model_without_a_reference(tmp_path: Path) -> None:
    bare = {
        name: None
        for name in Evaluation.__dataclass_fields__
        if name.startswith(("reference", "perplexity_ratio", "kl_", "top1"))
    }
    lone = evaluation(0.1, 4.0, **(bare | {"kl_by_position": (), "worst_tokens": (), "verdicts": ()}))
    path = write_report(tmp_path, Comparison("Alone", (Candidate("lone", "", "", lone),)))
    page = Page(path.read_text(encoding="utf-8"))
    assert "img" not in page.tags
    assert "there is no reference" in page.text
    assert {file.name for file in tmp_path.iterdir()} == {"index.html", "report.json"}


def test_figures_that_are_infinite_stay_valid_json(tmp_path: Path) -> None:
    wild = evaluation(0.1, 4.0, kl_divergence=float("inf"), kl_divergence_error=float("inf"), kl_max=float("inf"))
    write_report(tmp_path, Comparison("Wild", (Candidate("wild", "rtn", "int2-g128-sym", wild),)))
    assert json.loads((tmp_path / "report.json").read_text())["candidates"][0]["evaluation"]["kl_divergence"] is None


def test_margins_and_the_leading_sentence() -> None:
    whole = comparison()
    margins = [margin_over_baseline(candidate, whole) for candidate in whole.candidates]
    assert margins == [None, pytest.approx(-0.5), None, pytest.approx(-0.25)]
    sentence = lead_sentence(whole)
    assert sentence.startswith("Closest to original is GPTQ 4 bit: 0.02 nats per token away at 27% of its size")
    assert sentence.endswith("GPTQ 4 bit is 50% closer and AWQ 3 bit is 25% closer.")


def test_candidates_must_share_text_and_reference() -> None:
    one, other = evaluation(0.1, 4.0), evaluation(0.1, 4.0, text_sha256="fedcba")
    with pytest.raises(UsageError, match="same text"):
        Comparison("x", (Candidate("a", "rtn", "s", one), Candidate("b", "rtn", "s", other)))
    with pytest.raises(UsageError, match="at least one"):
        Comparison("x", ())


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        write_report(tmp_path / "file", comparison())
    with pytest.raises(ResourceError, match="cannot write the report"):
        write_report(tmp_path / "file" / "below", comparison())


@pytest.mark.parametrize(
    ("ratio", "bits", "level"),
    [
        (0.99, 4, "good"),
        (1.029, 4, "good"),
        (1.04, 4, "acceptable"),
        (1.06, 4, "warning"),
        (1.06, 3, "warning"),
        (1.009, 8, "good"),
        (1.015, 8, "acceptable"),
        (1.03, 8, "warning"),
        (float("nan"), 4, "warning"),
    ],
)
def test_verdicts_on_perplexity(ratio: float, bits: int, level: str) -> None:
    verdict = judge_perplexity(ratio, 0.001, bits)
    assert verdict.level == level
    assert ("8 bits" in verdict.message) == (bits == 8)


def test_verdicts_on_errors() -> None:
    assert [judge_weight_error(e).level for e in (0.009, 0.02, 0.05)] == ["good", "acceptable", "warning"]
    assert [judge_output_error(e).level for e in (0.04, 0.1, 0.11)] == ["good", "acceptable", "warning"]


def test_small_words() -> None:
    assert [human_bytes(size) for size in (0, 999, 11_000_000, 16 << 30)] == ["0 B", "999 B", "10.5 MiB", "16 GiB"]
    assert [visible(token) for token in (" ", "\n  ", " a", "\t")] == ["␣", "⏎␣␣", " a", "⇥"]
    assert not re.search(r"[\r\n]", visible("a\r\nb"))
