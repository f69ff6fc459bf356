"""The client of lowbit bench against an engine whose delays and failures are known: counts, order and lower bounds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from lowbit.cli.main import main
from lowbit.ops.bench.client import Target, ask, session_for
from lowbit.ops.bench.load import Lengths, Objectives, Outcome, Request
from lowbit.ops.bench.prompts import TextPrompts, TokenPrompts
from lowbit.ops.bench.serving import Level, Load, bench_serving, fit_to_server, run_open

sys.path.insert(0, str(Path(__file__).parents[1] / "gateway"))

from fake_engine import Engine, make_app


@contextlib.asynccontextmanager
async def serving(engine: Engine) -> AsyncIterator[str]:
    runner = web.AppRunner(make_app(engine), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def one(engine: Engine, api: Any = "chat", timeout: float = 5.0, tokens: int = 6) -> Outcome:
    async def scenario() -> Outcome:
        async with serving(engine) as url, session_for(keep_alive=False) as session:
            start = asyncio.get_running_loop().time()
            return await ask(session, Target(url, "fake", api, timeout=timeout), "a b c", tokens, due=0.0, start=start)

    return asyncio.run(scenario())


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_an_answer_is_timed(api: str) -> None:
    outcome = one(Engine(first_token=0.1, token_time=0.02), api)
    assert outcome.failure is None
    assert outcome.first is not None
    assert (outcome.prompt_tokens, outcome.output_tokens, len(outcome.gaps)) == (3, 6, 5)
    assert outcome.first - outcome.sent >= 0.1
    assert sum(outcome.gaps) >= 5 * 0.02 * 0.9
    assert outcome.finished == pytest.approx(outcome.first + sum(outcome.gaps), abs=1e-6)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("hang", "timeout"),
        ("stall_mid", "timeout"),
        ("close_mid", "connection lost"),
        ("garbage", "unreadable answer"),
        ("garbage_mid", "cut short"),
        ("error500", "status 500"),
        ("error503", "status 503"),
    ],
)
def test_failures_by_kind(fault: str, kind: str) -> None:
    outcome = one(Engine(fault=fault), timeout=0.5, tokens=8)
    assert outcome.failure == kind
    assert not Objectives().met(outcome)


def test_nobody_listens() -> None:
    async def scenario() -> Outcome:
        async with session_for(keep_alive=True) as session:
            return await ask(session, Target("http://127.0.0.1:9", "x"), "a", 1, due=0.0, start=0.0)

    assert asyncio.run(scenario()).failure == "connection refused"


def test_arrivals_do_not_wait_for_answers() -> None:
    """Eight requests due within 40 ms, at a server that takes 300 ms: all are under way at once, none is charged less
    than the server's delay, and outcomes keep the order of the schedule."""
    engine = Engine(first_token=0.3)
    schedule = [Request(0.005 * index, 3, index + 2) for index in range(8)]

    async def scenario() -> list[Outcome]:
        async with serving(engine) as url, session_for(keep_alive=False) as session:
            return await run_open(Target(url, "fake"), ["a b c"] * 8, schedule, session)

    outcomes = asyncio.run(scenario())
    assert engine.most_active == 8
    assert [each.due for each in outcomes] == [each.at for each in schedule]
    assert [each.output_tokens for each in outcomes] == [each.output_tokens for each in schedule]
    assert all((each.ttft or 0.0) >= 0.3 for each in outcomes)
    assert all(each.sent >= each.due for each in outcomes)


def test_a_stalled_server_is_charged_for_what_was_due_meanwhile() -> None:
    """While one request of a single-file server hangs, the ones behind it wait: their latency holds the wait."""
    gate = asyncio.Lock()

    async def handler(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        async with gate:
            await asyncio.sleep(0.4 if body["max_tokens"] == 99 else 0.0)
        response = web.StreamResponse()
        await response.prepare(request)
        event = {"choices": [{"delta": {"content": "w"}, "finish_reason": "stop"}]}
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\ndata: [DONE]\n\n")
        return response

    async def scenario() -> list[Outcome]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", handler)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            target = Target(f"http://127.0.0.1:{runner.addresses[0][1]}", "x")
            schedule = [Request(0.0, 1, 99), *(Request(0.05 * index, 1, 1) for index in range(1, 5))]
            async with session_for(keep_alive=False) as session:
                return await run_open(target, ["a"] * 5, schedule, session)
        finally:
            await runner.cleanup()

    first, *others = asyncio.run(scenario())
    assert (first.ttft or 0) >= 0.4
    assert all((each.ttft or 0) + each.due >= 0.39 for each in others)


def test_a_closed_loop_keeps_its_clients() -> None:
    engine = Engine(first_token=0.02)

    async def scenario() -> Any:
        async with serving(engine) as url:
            load = Load(Lengths(3, 3), Lengths(4, 4), count=12)
            prompts = TextPrompts(["w"] * 9, 1.0)
            target = Target(url, "fake")
            return await bench_serving(
                target, prompts, [Level(clients=3), Level(clients=1)], load, Objectives(), repeats=2, warmup=1
            )

    three, single = asyncio.run(scenario())
    assert engine.most_active == 3
    assert engine.counts["requests"] == 2 * 2 * 12 + 1
    assert (three.name, single.name) == ("3 clients", "1 clients")
    assert len(three.requests) == len(single.requests) == 24
    assert len(three.figures["goodput"].values) == 2
    assert three.figures["attainment"].median == 1.0
    assert 0 < single.figures["in_flight"].median <= 1.0 + 1e-9


def test_a_chunk_of_several_tokens_counts_as_several() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for so_far in (1, 4, 5):
            event = {"choices": [{"text": "w", "finish_reason": None}], "timings": {"predicted_n": so_far}}
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await asyncio.sleep(0.03)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def scenario() -> Outcome:
        app = web.Application()
        app.router.add_post("/v1/completions", handler)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            target = Target(f"http://127.0.0.1:{runner.addresses[0][1]}", "x", "completions")
            async with session_for(keep_alive=False) as session:
                return await ask(session, target, [1, 2], 5, due=0.0, start=0.0)
        finally:
            await runner.cleanup()

    outcome = asyncio.run(scenario())
    assert outcome.output_tokens == 5
    assert len(outcome.gaps) == 4
    assert outcome.gaps[0] == outcome.gaps[1] == outcome.gaps[2]
    assert sum(outcome.gaps) >= 0.05


def test_a_server_is_asked_how_it_counts() -> None:
    async def scenario() -> tuple[Target, TextPrompts]:
        async with serving(Engine()) as url:
            return await fit_to_server(Target(url, "fake", extra={"ignore_eos": True}), "one two three " * 40)

    target, prompts = asyncio.run(scenario())
    assert prompts.tokens_per_word == 1.0
    assert prompts.overhead == 0.0
    assert target.extra == {"ignore_eos": True}


def test_token_prompts_of_one_token() -> None:
    import random

    assert TokenPrompts([5, 5]).make(1, random.Random(0)) == [5]


@pytest.fixture
def fake_url() -> Iterator[str]:
    import subprocess

    file = Path(__file__).parents[1] / "gateway" / "fake_engine.py"
    command = [sys.executable, str(file), "--port", "0", "--token-time", "0.001"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().split()[1]}"
        process.kill()


def test_the_verb_against_a_server(fake_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["bench", "--url", f"{fake_url}/v1/", "--model", "fake", "--rate", "20,40", "--requests", "5"]
    assert main([*command, "--repeats", "2", "--slo-ttft", "2s", "--output-tokens", "4", "--out", str(out)]) == 0
    assert "rate 40" in capsys.readouterr().out
    document = json.loads((out / "bench.json").read_text())
    assert document["settings"]["loop"] == "open"
    assert [run["facts"]["rate"] for run in document["runs"]] == [20.0, 40.0]
    assert all(len(run["requests"]) == 10 and not run["failures"] for run in document["runs"])
    assert {row[6] for run in document["runs"] for row in run["requests"]} == {4}
    assert (out / "bench-load.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "bench.csv").read_text().startswith("run,figure")
    assert main(["bench", "--compare", str(out / "bench.json"), str(out / "bench.json")]) == 0
    assert "too few repeats" in capsys.readouterr().out


def test_a_server_that_fails_every_request(fake_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from urllib.request import Request as Post
    from urllib.request import urlopen

    command = [
        "bench",
        "--url",
        fake_url,
        "--model",
        "fake",
        "--rate",
        "50",
        "--requests",
        "4",
        "--quiet",
        "--warmup",
        "0",
    ]
    fault = json.dumps({"kind": "error503"}).encode()
    with urlopen(Post(f"{fake_url}/fault", fault, {"Content-Type": "application/json"})):
        pass
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "503" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name models"),
        (["demo", "--url", "http://x"], "name models"),
        (["--url", "x", "--model", "m"], "http"),
        (["--url", "http://127.0.0.1:9"], "--model"),
        (["--url", "http://127.0.0.1:9", "--model", "m", "--quiet"], "check --url"),
        (["--url", "http://127.0.0.1:9", "--model", "m", "--threads", "2"], "--threads"),
        (["demo", "--rate", "1", "--concurrency", "2"], "exclude"),
        (["demo", "--rate", "x"], "--rate"),
        (["demo", "--concurrency", "1.5"], "--concurrency"),
        (["demo", "--rate", "1", "--duration", "soon"], "--duration"),
        (["demo", "--duration", "5s"], "--duration"),
        (["demo", "--prompt-tokens", "0"], "--prompt-tokens"),
        (["demo", "--slo-ttft", "fast"], "--slo-ttft"),
        (["demo", "demo", "--rate", "1"], "one model at a time"),
        (["demo", "demo"], "twice"),
        (["demo", "--quantize", "int4,"], "--quantize"),
        (["demo", "--text", "/nowhere.txt"], "/nowhere.txt"),
        (["demo", "--json", "/etc/hostname/y.json"], "/etc/hostname"),
        (["./nowhere.gguf"], "nowhere"),
        (["--compare", "/nowhere.json", "/nowhere.json"], "/nowhere.json"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("lowbit: error: ")
    assert said in error
    assert list(tmp_path.iterdir()) == []
