"""lowbit tune: the search against machines whose best setting is known, the configuration's text, the real engine."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lowbit.cli.main import main
from lowbit.errors import UsageError
from lowbit.gateway.config import load_config
from lowbit.ops.tune.config import edit_tier, new_config, tier_changes
from lowbit.ops.tune.quality import coarse_divergence
from lowbit.ops.tune.run import changed
from lowbit.ops.tune.search import (
    DEFAULT,
    Candidate,
    Dimension,
    Race,
    combinations_of,
    race,
    rounds_of,
    rungs_of,
    single_changes,
)

DIMENSIONS = [
    Dimension("threads", {"1": {"flags.threads": 1}, "2": {"flags.threads": 2}}),
    Dimension("batch", {"64": {"flags.batch": 64}, "256": {"flags.batch": 256}}),
    Dimension("concurrency", {"2": {"concurrency": 2}, "8": {"concurrency": 8}}),
]


def run_race(
    candidates: list[Candidate],
    speed: Callable[[Candidate, int], float | str],
    slices: int = 60,
    rounds: int = 10**6,
    seed: int = 0,
) -> tuple[Race, list[tuple[str, int]]]:
    asked: list[tuple[str, int]] = []

    async def measure(candidate: Candidate, number: int) -> float | str:
        asked.append((candidate.name, number))
        return speed(candidate, number)

    def in_time() -> bool:
        return max(number for _, number in asked) + 1 < rounds

    state = asyncio.run(race(candidates, measure, slices=slices, in_time=in_time, rng=random.Random(seed)))
    return state, asked


@given(st.integers(2, 40), st.integers(0, 50), st.integers(0, 400))
def test_the_best_of_a_quiet_machine_wins(count: int, seed: int, slices: int) -> None:
    rng = random.Random(seed)
    candidates = [DEFAULT, *(Candidate(f"c{index}", (("x", index),)) for index in range(count - 1))]
    speeds = {each: rng.random() for each in candidates}
    state, asked = run_race(candidates, lambda each, _: speeds[each], slices, seed=seed)
    assert state.best() == max(speeds, key=lambda each: speeds[each])
    assert DEFAULT in state.alive
    assert len(state.alive) == 2
    # every round asks each of those alive exactly once, in whatever order
    by_round: dict[int, list[str]] = {}
    for name, number in asked:
        by_round.setdefault(number, []).append(name)
    sizes = [len(names) for _, names in sorted(by_round.items())]
    assert all(len(set(names)) == len(names) and "default" in names for names in by_round.values())
    assert sizes == sorted(sizes, reverse=True)
    assert len(asked) <= max(slices, count * rungs_of(count)) + count


def test_drift_does_not_decide() -> None:
    """The machine slows down to a third during the race; the better setting wins whatever the order."""
    candidates = single_changes(DIMENSIONS)
    best = candidates[4]
    for seed in range(20):
        clock = iter(range(10_000))

        def speed(candidate: Candidate, number: int, clock: Any = clock) -> float:
            return (1.25 if candidate == best else 1.0) * (1 - 0.66 * min(1.0, next(clock) / 80))

        state, _ = run_race(candidates, speed, slices=80, seed=seed)
        assert state.best() == best


def test_a_candidate_that_cannot_run_is_out() -> None:
    candidates = single_changes(DIMENSIONS)
    state, asked = run_race(candidates, lambda each, _: "no such kernel" if each == candidates[2] else 1.0)
    assert state.failed == {candidates[2]: "no such kernel"}
    assert [name for name, _ in asked].count(candidates[2].name) == 1


def test_out_of_time_the_round_is_finished() -> None:
    candidates = single_changes(DIMENSIONS)
    state, asked = run_race(candidates, lambda each, _: 1.0, slices=10_000, rounds=1)
    assert sorted(name for name, _ in asked) == sorted(each.name for each in candidates)
    assert len(state.means()) == len(candidates)


@given(st.integers(2, 100), st.integers(1, 1000))
def test_rungs_cost_about_the_same(count: int, slices: int) -> None:
    assert rounds_of(count, count, slices) * count <= max(count, slices / rungs_of(count))
    assert rungs_of(count) <= math.log(count, 3) + 2


def test_combinations_join_what_did_well() -> None:
    singles = single_changes(DIMENSIONS)
    scores = dict(zip(singles, (1.0, 1.5, 1.2, 0.5, 1.1, 1.01, 1.3), strict=True))
    found = combinations_of(scores, DIMENSIONS)
    assert found[0] == DEFAULT
    assert [dict(each.changes) for each in found[1:4]] == [
        {"flags.threads": 1}, {"concurrency": 8}, {"flags.batch": 256},
    ]  # fmt: skip
    everything = {"flags.threads": 1, "concurrency": 8, "flags.batch": 256}
    assert dict(found[4].changes) == everything
    assert all(dict(each.changes).items() <= everything.items() for each in found)
    assert combinations_of({DEFAULT: 1.0}, DIMENSIONS) == [DEFAULT]


def test_changes_of_a_tier() -> None:
    tier = {"name": "a", "concurrency": 4, "flags": {"threads": 2, "batch": None}, "env": {}}
    candidate = Candidate("x", (("concurrency", 8), ("flags.threads", 1), ("env.OMP_WAIT_POLICY", "ACTIVE")))
    assert changed(tier, candidate) == {
        "name": "a",
        "concurrency": 8,
        "flags": {"threads": 1, "batch": None},
        "env": {"OMP_WAIT_POLICY": "ACTIVE"},
    }
    assert tier["flags"] == {"threads": 2, "batch": None}


@given(st.lists(st.floats(0.01, 10), min_size=3, max_size=12), st.integers(0, 9))
def test_coarse_divergence_is_below_the_whole(weights: list[float], seed: int) -> None:
    rng = random.Random(seed)
    others = [rng.uniform(0.01, 10) for _ in weights]
    first = [math.log(each / sum(weights)) for each in weights]
    second = [math.log(each / sum(others)) for each in others]
    whole = sum(math.exp(p) * (p - q) for p, q in zip(first, second, strict=True))
    kept = rng.sample(range(len(weights)), len(weights) - 1)
    coarse = coarse_divergence({i: first[i] for i in kept}, {i: second[i] for i in kept})
    assert 0 <= coarse <= whole + 1e-9
    assert coarse_divergence(dict(enumerate(first)), dict(enumerate(second))) == pytest.approx(
        max(0.0, whole), abs=1e-9
    )


CONFIG = """\
# our models
host: 127.0.0.1   # only here
models:
  assistant:      # the one
    tiers:
      - {name: bf16, path: ./big}
      - name: int4
        path: ./small.gguf   # made on Monday
        concurrency: 4
        flags:
          threads: 2   # two cores

      # a third
      - name: other
        path: ./third.gguf
  second:
    tiers: [{name: only, path: ./x.gguf, flags: {threads: 1}}]

limits: {queue_requests: 9}
"""


@pytest.mark.parametrize(
    ("model", "tier"), [("assistant", "bf16"), ("assistant", "int4"), ("assistant", "other"), ("second", "only")]
)
def test_the_text_of_a_configuration_is_edited_in_place(model: str, tier: str, tmp_path: Path) -> None:
    evidence = {"date": "2026-01-01", "ratio": 1.2, "workload": {"rate": 2.0}}
    changes = tier_changes({"concurrency": 8, "flags.threads": 1, "flags.batch": 64, "env.A": "B"}, evidence)
    text = edit_tier(CONFIG, model, tier, changes, "config.yaml")
    again = edit_tier(text, model, tier, tier_changes({"concurrency": 16}, {"ratio": 1.3}), "config.yaml")
    for written, concurrency, ratio in ((text, 8, 1.2), (again, 16, 1.3)):
        path = tmp_path / "config.yaml"
        path.write_text(written)
        (found,) = (each for each in load_config(path).models[model].tiers if each.name == tier)
        assert (found.concurrency, found.flags.threads, found.flags.batch, found.env) == (
            concurrency,
            1,
            64,
            {"A": "B"},
        )
        assert found.tuned["ratio"] == ratio
        for comment in ("# our models", "# only here", "# the one", "# made on Monday", "# a third"):
            assert comment in written
    before, after = yaml.safe_load(CONFIG), yaml.safe_load(text)
    for content in (before, after):
        content["models"][model]["tiers"] = [each for each in content["models"][model]["tiers"] if each["name"] != tier]
    assert before == after


def test_what_cannot_be_edited_faithfully_is_refused() -> None:
    text = "models:\n  a:\n    tiers:\n      - &t {name: x, path: p}\n  b:\n    tiers: [*t]\n"
    with pytest.raises(UsageError, match="--out"):
        edit_tier(text, "a", "x", {"concurrency": 2}, "config.yaml")
    with pytest.raises(UsageError, match="no tier a@y"):
        edit_tier(CONFIG, "a", "y", {}, "config.yaml")


def test_a_new_configuration_is_a_valid_one(tmp_path: Path) -> None:
    changes = tier_changes({"flags.threads": 1}, {"ratio": 1.2})
    (tmp_path / "x.yaml").write_text(new_config("demo", {"name": "default", "path": "demo", "context": None}, changes))
    (tier,) = load_config(tmp_path / "x.yaml").models["demo"].tiers
    assert (tier.path, tier.flags.threads, tier.tuned) == ("demo", 1, {"ratio": 1.2})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo"], "--rate"),
        (["demo", "--rate", "1", "--concurrency", "2"], "--rate"),
        (["demo", "--rate", "-1"], "--rate"),
        (["demo", "--concurrency", "2", "--budget", "soon"], "--budget"),
        (["demo", "--concurrency", "2", "--settings", "threads,magic"], "'magic'"),
        (["demo", "--concurrency", "2", "--settings", "kv_dtype"], "--allow-lossy"),
        (["demo", "--concurrency", "2", "--tier", "a@b"], "--tier"),
        (["demo", "--concurrency", "2", "--out", "there.yaml"], "--overwrite"),
        (["demo", "--concurrency", "2", "--context", "64"], "--context"),
        (["two.yaml", "--concurrency", "2"], "a@x, a@y"),
        (["two.yaml", "--concurrency", "2", "--tier", "a@z"], "a@x, a@y"),
        (["nowhere.yaml", "--concurrency", "2"], "nowhere.yaml"),
        (["nowhere.gguf", "--concurrency", "2", "--quiet"], "nowhere.gguf"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "there.yaml").write_text("mine")
    (tmp_path / "two.yaml").write_text("models: {a: {tiers: [{name: x, path: p}, {name: y, path: q}]}}")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["tune", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("lowbit: error: ")
    assert said in error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.slow
def test_the_real_engine_is_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file holds the winner where that beat the default, and else is as it was."""
    pytest.importorskip("xllamacpp")
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lowbit.ops.tune.search.MOST_ROUNDS", 1)
    monkeypatch.setattr("lowbit.ops.tune.run._MOST_PAIRS", 5)
    config = tmp_path / "config.yaml"
    config.write_text(
        "models:\n  demo:\n    tiers:\n      - name: x   # slow\n        path: demo\n        concurrency: 1\n"
        "        flags: {threads: 1, flash_attention: false}\n"
    )
    command = ["tune", str(config), "--concurrency", "1", "--prompt-tokens", "16", "--output-tokens", "4"]
    command += ["--requests", "4"]
    command += ["--settings", "flash_attention", "--budget", "4m", "--json", str(tmp_path / "t.json"), "--quiet"]
    assert main(command) == 0
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["winner"].startswith("flash_attention")
    assert set(found["scores"]) >= {"default", "flash_attention on", "flash_attention off"}
    assert not found["failed"]
    assert len(found["default"]["values"]) == len(found["tuned"]["values"]) >= 5
    assert found["adopted"] == (found["verdict"] == "better" and found["winner"] != "default")
    said = capsys.readouterr().out
    if not found["adopted"]:  # a machine too busy to tell
        assert "nothing was left to gain" in said
        assert "tuned" not in config.read_text()
        return
    assert "# slow" in config.read_text()
    (tier,) = load_config(config).models["demo"].tiers
    assert tier.flags.flash_attention is not None
    assert tier.tuned["ratio"] == pytest.approx(found["ratio"], abs=1e-3)
    assert f"written to {config}" in said
