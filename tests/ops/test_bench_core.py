"""The pure core of lowbit bench: statistics, schedules, goodput and documents, against naive counts and numpy."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from statistics import fmean, pvariance

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import UsageError
from lowbit.ops.bench.compare import compare
from lowbit.ops.bench.load import (
    Lengths,
    Objectives,
    Outcome,
    failures,
    parse_lengths,
    parse_rates,
    parse_seconds,
    poisson_requests,
    serving_figures,
)
from lowbit.ops.bench.prompts import TextPrompts, TokenPrompts
from lowbit.ops.bench.results import SCHEMA, Bench, Run, read_bench, to_csv, write_file
from lowbit.ops.bench.stats import Figure, compare_figures, quantile, rank_test

numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(numbers, min_size=1, max_size=40), st.floats(0, 1))
def test_quantiles_are_numpys(values: list[float], share: float) -> None:
    assert quantile(values, share) == pytest.approx(float(np.quantile(values, share)), rel=1e-9, abs=1e-6)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_rank_test_counts_every_split(first: list[int], second: list[int]) -> None:
    """The p-value against the enumeration of all ways to split the values in two."""
    everything = [*first, *second]
    less = [sum(other < value for other in everything) for value in everything]
    equal = [sum(other == value for other in everything) for value in everything]
    ranks = [below + (ties + 1) / 2 for below, ties in zip(less, equal, strict=True)]
    expected = sum(ranks) * len(first) / len(everything)
    observed = abs(sum(ranks[: len(first)]) - expected)
    splits = [abs(sum(split) - expected) for split in itertools.combinations(ranks, len(first))]
    assert rank_test(first, second) == pytest.approx(fmean(value >= observed - 1e-9 for value in splits))


def test_verdicts() -> None:
    def figure(*values: float, better: str = "less") -> Figure:
        return Figure("s", "more" if better == "more" else "less", values)

    slow, fast = figure(10, 11, 12, 13, 14), figure(5, 6, 7, 8, 9)
    assert compare_figures(slow, fast)[::2] == (pytest.approx(7 / 12), "better")
    assert compare_figures(fast, slow)[2] == "worse"
    assert (
        compare_figures(figure(5, 6, 7, 8, 9, better="more"), figure(10, 11, 12, 13, 14, better="more"))[2] == "better"
    )
    assert compare_figures(slow, figure(9, 11.5, 12.5, 13.5, 10.5))[2] == "no difference"
    assert compare_figures(slow, slow)[2] == "no difference"
    assert compare_figures(figure(1, 2, 3), figure(4, 5, 6))[2] == "too few repeats"


def test_noise_alone_is_seldom_a_difference() -> None:
    rng = random.Random(1)
    wrong = 0
    for _ in range(400):
        first, second = (Figure("s", "less", tuple(rng.gauss(1, 0.2) for _ in range(5))) for _ in range(2))
        wrong += compare_figures(first, second)[2] in ("better", "worse")
    assert wrong <= 0.05 * 400 + 3 * math.sqrt(400 * 0.05 * 0.95)


def test_arrivals_are_poisson() -> None:
    """Gaps have mean and standard deviation 1 / rate, and nothing else decides when a request is due."""
    requests = poisson_requests(4.0, Lengths(8, 8), Lengths(1, 9), random.Random(7), seconds=None, count=4000)
    gaps = [after.at - before.at for before, after in itertools.pairwise(requests)]
    assert all(gap > 0 for gap in gaps)
    assert fmean(gaps) == pytest.approx(0.25, rel=0.06)
    assert math.sqrt(pvariance(gaps)) == pytest.approx(0.25, rel=0.08)
    assert {request.output_tokens for request in requests} == {*range(1, 10)}
    again = poisson_requests(4.0, Lengths(8, 8), Lengths(1, 9), random.Random(7), seconds=None, count=4000)
    assert again == requests


@given(st.integers(0, 99), st.floats(0.5, 20), st.floats(0.5, 20))
def test_arrivals_end_in_time(seed: int, rate: float, seconds: float) -> None:
    requests = poisson_requests(rate, Lengths(1, 1), Lengths(1, 1), random.Random(seed), seconds=seconds, count=None)
    assert all(request.at < seconds for request in requests)


@given(st.integers(1, 500), st.integers(0, 500), st.integers(0, 9))
def test_lengths_stay_within_their_bounds(low: int, more: int, seed: int) -> None:
    rng = random.Random(seed)
    for text in (str(low), f"{low}-{low + more}", f"lognormal:{low}:0.7"):
        lengths = parse_lengths(text, "--prompt-tokens")
        assert all(lengths.low <= lengths.draw(rng) <= lengths.high for _ in range(20))
        assert str(lengths) == (text if more or "-" not in text else str(low))


@pytest.mark.parametrize("text", ["", "0", "-3", "9-3", "x", "lognormal:5", "lognormal:0:1", "1.5", "0-4"])
def test_lengths_that_mean_nothing(text: str) -> None:
    with pytest.raises(UsageError, match="--prompt-tokens"):
        parse_lengths(text, "--prompt-tokens")


def test_times_and_rates() -> None:
    assert [parse_seconds(text, "--x") for text in ("500ms", "2s", "1.5m", "3")] == [0.5, 2.0, 90.0, 3.0]
    assert parse_rates("1,2.5", "--rate") == (1.0, 2.5)
    for bad in ("", "0", "1,,2", "nan", "-1", "inf"):
        with pytest.raises(UsageError, match="--rate"):
            parse_rates(bad, "--rate")
    with pytest.raises(UsageError, match="--slo-ttft"):
        parse_seconds("soon", "--slo-ttft")


def outcome(due: float, ttft: float, gaps: tuple[float, ...], failure: str | None = None) -> Outcome:
    first = due + ttft
    return Outcome(due, due, first + sum(gaps), None if failure == "lost" else first, 5, len(gaps) + 1, gaps, failure)


outcomes = st.lists(
    st.builds(
        outcome,
        st.floats(0, 10),
        st.floats(0, 3),
        st.lists(st.floats(0, 0.5), max_size=5).map(tuple),
        st.sampled_from([None, None, "lost", "status 503"]),
    ),
    min_size=1,
    max_size=30,
)


@given(outcomes, st.floats(0, 3), st.floats(0, 0.5))
def test_goodput_counts_what_came_in_time(found: list[Outcome], ttft: float, itl: float) -> None:
    figures = serving_figures(found, Objectives(ttft=ttft, itl=itl), 5.0)
    span = max(5.0, *(each.finished for each in found))
    good = 0
    for each in found:
        if each.failure is None and each.first is not None:
            mean = sum(each.gaps) / len(each.gaps) if each.gaps else 0.0
            good += each.first - each.due <= ttft and mean <= itl
    assert figures["goodput"] == pytest.approx(good / span)
    assert figures["attainment"] == pytest.approx(good / len(found))
    assert figures["goodput"] <= figures["requests_per_second"] + 1e-12
    assert sum(failures(found).values()) == sum(each.failure is not None for each in found)


@given(outcomes)
def test_looser_objectives_never_lose_a_request(found: list[Outcome]) -> None:
    attained = [serving_figures(found, Objectives(ttft=limit), 1.0)["attainment"] for limit in (0.1, 0.5, 1.0, 3.0)]
    assert attained == sorted(attained)
    assert serving_figures(found, Objectives(), 1.0)["attainment"] >= attained[-1]


def test_latency_counts_from_when_a_request_was_due() -> None:
    late = Outcome(due=1.0, sent=3.0, finished=4.0, first=3.5, output_tokens=2, gaps=(0.5,))
    figures = serving_figures([late], Objectives(), 0.0)
    assert figures["ttft_p50"] == 2.5
    assert figures["e2e_p50"] == 3.0
    assert figures["late"] == 2.0


@given(st.integers(1, 300), st.integers(0, 200), st.integers(0, 99))
def test_token_prompts_are_exact_and_differ_after_the_shared_part(tokens: int, shared: int, seed: int) -> None:
    prompts = TokenPrompts(list(range(1000)), shared)
    rng = random.Random(seed)
    first, second = prompts.make(tokens, rng), prompts.make(tokens, rng)
    assert len(first) == len(second) == tokens
    common = min(shared, tokens)
    assert first[:common] == second[:common] == list(range(1000))[:common]


def test_text_prompts_are_fitted_to_what_the_server_counts() -> None:
    prompts = TextPrompts(["w"] * 50).fit([(8, 8 * 3 + 11), (72, 72 * 3 + 11)])
    made = prompts.make(311, random.Random(0))
    assert isinstance(made, str)
    assert len(made.split()) * 3 + 11 == 311


def bench(*runs: Run, kind: str = "offline") -> Bench:
    return Bench(kind, {"repeats": 5, "prompt_tokens": "8"}, {"cpu": "one"}, runs, lowbit_version="0")


def test_documents_come_back(tmp_path: Path) -> None:
    sent = Outcome(0.0, 0.1, 2.0, 0.5, 7, 4, (0.5, 0.5, 0.5))
    lost = Outcome(1.0, 1.0, 2.0, failure="connection lost")
    figures = {"ttft": Figure("s", "less", (0.1, 0.2, math.nan))}
    run = Run("rate 1", {"rate": 1.0}, figures, {"connection lost": 1}, ((0, sent), (1, lost)))
    path = tmp_path / "new" / "bench.json"
    write_file(path, json.dumps(bench(run, kind="serving").to_json(), allow_nan=False).encode())
    back = read_bench(path)
    assert back.runs[0].requests == ((0, sent), (1, lost))
    assert back.runs[0].failures == {"connection lost": 1}
    assert back.runs[0].figures["ttft"].values[:2] == (0.1, 0.2)
    assert math.isnan(back.runs[0].figures["ttft"].values[2])
    lines = to_csv(back).splitlines()
    assert lines[0] == "run,figure,unit,median,q1,q3,repeats"
    assert lines[-1] == "rate 1,failed: connection lost,requests,1,1,1,1"


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"schema": "lowbit-bench/2"}', json.dumps({"schema": SCHEMA, "runs": [1]}), "\x00"],
)
def test_documents_of_something_else(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"x\.json"):
        read_bench(path)


def test_comparison_pairs_runs_by_name() -> None:
    def run(name: str, *values: float) -> Run:
        return Run(name, {}, {"decode": Figure("tokens/s", "more", values)})

    before = bench(run("a", 1, 2, 3, 4, 5), run("b", 1, 1, 1, 1, 1))
    after = bench(run("a", 6, 7, 8, 9, 10), run("c", 1, 1, 1, 1, 1))
    (row,) = compare(before, after)
    assert (row.run, row.verdict) == ("a", "better")
    assert row.ratio == pytest.approx(8 / 3)
    with pytest.raises(UsageError, match="same name"):
        compare(bench(run("a", 1), run("b", 1)), bench(run("c", 1), run("d", 1)))
    with pytest.raises(UsageError, match="only the same kind"):
        compare(before, bench(run("a", 1), kind="serving"))
