"""lowbit plan fleet: the model against the event simulation, and both against queues with known answers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.cli.main import main
from lowbit.errors import UsageError
from lowbit.ops.bench.load import Lengths, Objectives, Outcome, Request, poisson_requests
from lowbit.ops.bench.results import Bench, Run, write_file
from lowbit.ops.fleet.model import Replica, Work, forecast, mean_length, passage, replica_of, smallest_fleet
from lowbit.ops.fleet.simulation import error_grid, simulate, simulate_requests

BATCHING = Replica(0.0, 0.0003, ((1, 0.010), (2, 0.011), (4, 0.013), (8, 0.018), (16, 0.03)), 16)
"""Like a GPU: eight requests together cost less than twice one."""
SERIAL = Replica(0.05, 0.0, ((1, 0.01),), 1)
"""One request at a time, 50 ms of prompt."""
NO_LIMITS = Objectives()


def lengths(tokens: int) -> Lengths:
    return Lengths(tokens, tokens)


def naive_single_queue(service: Sequence[float], arrivals: Sequence[float], servers: int) -> list[float]:
    """Waits of a first-come first-served queue (Kiefer and Wolfowitz): the next server that is free takes the next."""
    free = [0.0] * servers
    waits = []
    for at, work in zip(arrivals, service, strict=True):
        free.sort()
        begin = max(at, free[0])
        free[0] = begin + work
        waits.append(begin - at)
    return waits


@given(st.integers(0, 999), st.integers(1, 4), st.floats(0.2, 1.2))
@settings(max_examples=30)
def test_one_slot_each_is_a_plain_queue(seed: int, replicas: int, busy: float) -> None:
    rng = random.Random(seed)
    schedule = poisson_requests(busy * replicas / 0.2, lengths(8), Lengths(2, 30), rng, seconds=None, count=120)
    outcomes = simulate_requests(SERIAL, schedule, replicas)
    service = [0.05 + 0.01 * (request.output_tokens - 1) for request in schedule]
    expected = naive_single_queue(service, [request.at for request in schedule], replicas)
    assert [each.ttft for each in outcomes] == pytest.approx([wait + 0.05 for wait in expected], abs=1e-9)
    assert [each.e2e for each in outcomes] == pytest.approx([w + s for w, s in zip(expected, service, strict=True)])


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 50), st.integers(1, 20)), min_size=1, max_size=25))
def test_nothing_is_lost_and_nothing_is_early(made: list[tuple[float, int, int]]) -> None:
    schedule = [Request(*each) for each in sorted(made)]
    outcomes = simulate_requests(BATCHING, schedule, 2)
    assert len(outcomes) == len(schedule)
    for request, outcome in zip(schedule, outcomes, strict=True):
        alone = BATCHING.prefill(request.prompt_tokens)
        assert outcome.ttft is not None
        assert outcome.ttft >= alone - 1e-9
        assert outcome.e2e >= alone + (request.output_tokens - 1) * BATCHING.step(1) - 1e-9
        assert outcome.output_tokens == request.output_tokens
    total = sum(BATCHING.prefill(each.prompt_tokens) + each.output_tokens * BATCHING.step(1) for each in schedule)
    assert max(each.finished for each in outcomes) <= max(each.at for each in schedule) + total


@pytest.mark.parametrize(("replicas", "busy"), [(1, 0.5), (1, 0.8), (4, 0.7), (8, 0.9)])
def test_the_chain_without_batching_is_erlang_c(replicas: int, busy: float) -> None:
    """Chance of waiting and number under way, from Erlang's formula written out."""
    work = Work(0.0, lengths(8), lengths(16))
    service = passage(SERIAL, work, 1)
    offered = busy * replicas
    found = forecast(SERIAL, Work(offered / service, work.prompt, work.output), replicas, NO_LIMITS)
    top = offered**replicas / math.factorial(replicas) / (1 - busy)
    waiting = top / (sum(offered**n / math.factorial(n) for n in range(replicas)) + top)
    assert found.waiting == pytest.approx(waiting, rel=1e-6)
    assert found.under_way == pytest.approx(offered + waiting * busy / (1 - busy), rel=1e-6)
    assert found.e2e == pytest.approx(found.under_way / (offered / service), rel=1e-9)


def test_the_model_against_the_simulation() -> None:
    """Over sizes and loads, at most so far apart: what docs/bench.md says of it."""
    work = Work(1.0, Lengths(100, 300), Lengths(32, 96))
    objectives = Objectives(ttft=0.3, itl=0.03)
    cells = error_grid(BATCHING, work, objectives, replicas=(1, 2, 4, 8), busy=(0.3, 0.5, 0.7), requests=2500)
    for cell in cells:
        expected, seen = cell.forecast, cell.simulated
        assert expected.e2e == pytest.approx(seen.e2e, rel=0.12)
        assert expected.tpot == pytest.approx(seen.tpot, rel=0.15)
        assert expected.ttft == pytest.approx(seen.ttft, rel=0.25)
        assert expected.ttft_p90 == pytest.approx(seen.figures["ttft_p90"], rel=0.25)
        assert expected.attainment == pytest.approx(seen.attainment, abs=0.15)


@given(st.floats(1.0, 60.0), st.floats(0.5, 0.99))
@settings(max_examples=12, deadline=None)
def test_plans_are_monotone(rate: float, attainment: float) -> None:
    work = Work(rate, lengths(200), lengths(64))
    loose, tight = Objectives(ttft=2.0), Objectives(ttft=0.5, itl=0.025)
    chosen, tried = smallest_fleet(BATCHING, work, loose, attainment, 1000)
    assert chosen.stable
    assert chosen.attainment >= attainment
    assert all(not each.stable or each.attainment < attainment for each in tried[:-1])
    assert smallest_fleet(BATCHING, work, tight, attainment, 1000)[0].replicas >= chosen.replicas
    more = smallest_fleet(BATCHING, Work(rate * 1.5, work.prompt, work.output), loose, attainment, 1000)[0]
    assert more.replicas >= chosen.replicas


def test_what_no_fleet_can_do_is_said() -> None:
    with pytest.raises(UsageError, match=r"after 60 ms and then one every 10\.0 ms"):
        smallest_fleet(BATCHING, Work(5.0, lengths(200), lengths(64)), Objectives(ttft=0.01), 0.9, 1000)
    with pytest.raises(UsageError, match="raise --max-replicas"):
        smallest_fleet(BATCHING, Work(500.0, lengths(200), lengths(64)), NO_LIMITS, 0.9, 3)


def test_mean_lengths() -> None:
    rng = random.Random(3)
    for each in (lengths(7), Lengths(3, 9), Lengths(1, 400, 100.0, 0.6)):
        drawn = [each.draw(rng) for _ in range(20_000)]
        assert mean_length(each) == pytest.approx(sum(drawn) / len(drawn), rel=0.02)


def closed_loop(replica: Replica, clients: int) -> Run:
    """What a bench of a replica in a closed loop would write, played by the simulation."""
    outcomes: list[Outcome] = []
    ready = [0.0] * clients
    rng = random.Random(clients)
    schedule: list[Request] = []
    # a client sends its next when its last is answered: repeated until the arrivals agree with the answers
    while len(outcomes) < 24 + 3 * clients:
        schedule += [Request(at, rng.randint(50, 300), 64) for at in ready]
        outcomes = simulate_requests(replica, sorted(schedule, key=lambda each: each.at), 1)
        ready = [each.finished for each in outcomes[-clients:]]
    return Run(
        f"{clients} clients", {"clients": clients, "parallel": 16}, {}, {}, tuple((0, each) for each in outcomes)
    )


@cache
def bench_of(replica: Replica) -> Bench:
    runs = tuple(closed_loop(replica, clients) for clients in (1, 2, 4, 8, 16))
    return Bench("serving", {}, {}, runs, lowbit_version="0")


def test_a_replica_is_recovered_from_its_bench() -> None:
    found = replica_of(bench_of(BATCHING))
    assert found.per_token == pytest.approx(BATCHING.per_token, rel=0.02)
    assert found.base == pytest.approx(0.0, abs=1e-3)
    assert found.slots == 16
    for count, step in BATCHING.steps:
        assert found.step(count) == pytest.approx(step, rel=0.25)
    steps = [step for _, step in found.steps]
    assert steps == sorted(steps)


def test_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fleet.json"
    write_file(path, json.dumps(bench_of(BATCHING).to_json()).encode())
    command = ["plan", "fleet", "--bench", str(path), "--rate", "12", "--prompt-tokens", "100-300", "--gpu-price", "2"]
    out = tmp_path / "plan.json"
    assert main([*command, "--slo-ttft", "1s", "--slo-itl", "40ms", "--simulate", "--json", str(out)]) == 0
    plan = json.loads(out.read_text())
    assert plan["gpus"] == plan["replicas"] >= 2
    assert plan["cost_per_hour"] == 2 * plan["replicas"]
    assert plan["cost_per_million_output_tokens"] == pytest.approx(plan["cost_per_hour"] / (12 * 64 * 3600) * 1e6)
    assert plan["simulated"]["attainment"] == pytest.approx(plan["forecast"]["attainment"], abs=0.1)
    assert len(plan["grid"]) == 15
    assert "needed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bench", "fleet.json"], "--rate"),
        (["--rate", "1"], "--bench"),
        (["--bench", "nowhere.json", "--rate", "1"], "nowhere.json"),
        (["--bench", "other.json", "--rate", "1"], "other.json"),
        (["--bench", "open.json", "--rate", "1"], "--concurrency 1,2,4,8"),
        (["--bench", "fleet.json", "--rate", "0"], "--rate"),
        (["--bench", "fleet.json", "--rate", "nan"], "--rate"),
        (["--bench", "fleet.json", "--rate", "1", "--attainment", "95"], "--attainment"),
        (["--bench", "fleet.json", "--rate", "1", "--gpu-price", "-1"], "--gpu-price"),
        (["--bench", "fleet.json", "--rate", "1", "--slo-itl", "1ms"], "loosen the objectives"),
        (["--bench", "fleet.json", "--rate", "1", "--prompt-tokens", "many"], "--prompt-tokens"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    write_file(tmp_path / "fleet.json", json.dumps(bench_of(SERIAL).to_json()).encode())
    opened = Bench("serving", {}, {}, (Run("rate 1", {"rate": 1.0, "clients": None}, {}),), lowbit_version="0")
    write_file(tmp_path / "open.json", json.dumps(opened.to_json()).encode())
    assert main(["plan", "fleet", *arguments, "--json", "plan.json"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "plan.json").exists()


def test_a_simulation_is_the_same_again() -> None:
    once, again = (simulate(BATCHING, 4.0, lengths(100), lengths(20), 2, NO_LIMITS, requests=300) for _ in range(2))
    assert once == again
