"""Supervision of real processes: readiness, crashes, hangs, draining, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from lowbit.engines.logs import EngineLog
from lowbit.engines.process import EngineSpec, Supervisor
from lowbit.errors import ResourceError

FAKE = Path(__file__).parents[1] / "gateway" / "fake_engine.py"


def spec(*arguments: str, **changes: Any) -> EngineSpec:
    facts: dict[str, Any] = {
        "name": "fake",
        "command": (sys.executable, str(FAKE), "--port", "{port}", *arguments),
        "warmup": ("/v1/completions", {"prompt": "hi", "max_tokens": 1}),
        "ready_timeout": 20.0,
        "health_interval": 0.1,
        "health_timeout": 0.5,
        "stop_timeout": 3.0,
        "backoff": 0.05,
        "nice": 0,
    }
    return EngineSpec(**{**facts, **changes})


def with_supervisor(
    body: Callable[[Supervisor, list[tuple[str, str]]], Awaitable[None]], made: EngineSpec
) -> list[tuple[str, str]]:
    events: list[tuple[str, str]] = []

    async def main() -> None:
        async with aiohttp.ClientSession() as session:
            supervisor = Supervisor(made, session, lambda event, reason: events.append((event, reason)))
            try:
                await supervisor.start()
                await body(supervisor, events)
            finally:
                await supervisor.stop()

    asyncio.run(main())
    return events


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        await asyncio.sleep(0.02)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_starts_warm_and_stops_without_a_trace() -> None:
    pids: list[int] = []

    async def body(supervisor: Supervisor, events: list[tuple[str, str]]) -> None:
        assert supervisor.pid is not None
        pids.append(supervisor.pid)
        assert supervisor.resident_bytes() > 1024**2
        async with aiohttp.ClientSession() as session, session.get(f"{supervisor.base_url}/log") as answer:
            assert (await answer.json())["requests"] == 1  # the warm-up

    assert with_supervisor(body, spec()) == []
    assert gone(pids[0])


def test_a_killed_engine_is_restarted_with_a_new_address() -> None:
    async def body(supervisor: Supervisor, events: list[tuple[str, str]]) -> None:
        first = supervisor.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: len(events) == 2)
        assert supervisor.pid not in (None, first)
        assert supervisor.restarted == 1

    events = with_supervisor(body, spec())
    assert [event for event, _ in events] == ["crashed", "restarted"]
    assert "SIGKILL (out of memory?)" in events[0][1]


def test_a_stopped_engine_hangs_and_is_restarted() -> None:
    async def body(supervisor: Supervisor, events: list[tuple[str, str]]) -> None:
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGSTOP)
        await until(lambda: len(events) == 2)

    events = with_supervisor(body, spec(health_timeout=0.2))
    assert [event for event, _ in events] == ["hung", "restarted"]


def test_no_progress_and_no_answer_to_the_probe_is_a_hang() -> None:
    """The health route answers, generation does not: what a deadlocked engine looks like."""

    async def body(supervisor: Supervisor, events: list[tuple[str, str]]) -> None:
        async with aiohttp.ClientSession() as session:
            await session.post(f"{supervisor.base_url}/fault", json={"kind": "hang", "count": None})
        await asyncio.sleep(1.0)
        assert events == [], "idle engines are not probed"
        supervisor.busy = 1
        await until(lambda: len(events) == 2)

    probe = ("/v1/completions", {"prompt": "hi", "max_tokens": 1})
    events = with_supervisor(body, spec(hang_timeout=0.3, probe=probe))
    assert [event for event, _ in events] == ["hung", "restarted"]


def test_slow_but_working_is_no_hang() -> None:
    async def body(supervisor: Supervisor, events: list[tuple[str, str]]) -> None:
        supervisor.busy = 1
        await asyncio.sleep(1.5)

    assert with_supervisor(body, spec(hang_timeout=0.3, probe="/metrics")) == []


def test_an_engine_that_cannot_load_says_why() -> None:
    async def body(supervisor: Supervisor, events: list[tuple[str, str]]) -> None:
        raise AssertionError("it should not have started")

    with pytest.raises(ResourceError, match="fake: engine ended: exit status 1"):
        with_supervisor(body, spec("--fault", "refuse_load"))


def test_an_engine_that_never_gets_ready_is_ended() -> None:
    async def body(supervisor: Supervisor, events: list[tuple[str, str]]) -> None:
        raise AssertionError("it should not have started")

    with pytest.raises(ResourceError, match=r"not ready after 1 s"):
        with_supervisor(body, spec("--fault", "not_ready", ready_timeout=1.0))


def test_a_command_that_is_not_there() -> None:
    async def body(supervisor: Supervisor, events: list[tuple[str, str]]) -> None:
        raise AssertionError("it should not have started")

    with pytest.raises(ResourceError, match=r"exit status 127; it said: /no/such/engine: No such file"):
        with_supervisor(body, spec(command=("/no/such/engine",)))


def test_gives_up_after_too_many_crashes() -> None:
    async def body(supervisor: Supervisor, events: list[tuple[str, str]]) -> None:
        object.__setattr__(supervisor.spec, "command", (sys.executable, "-c", "raise SystemExit(3)"))
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGKILL)
        await until(lambda: any(event == "failed" for event, _ in events))
        assert supervisor.pid is None

    events = with_supervisor(body, spec(restarts=2))
    assert [event for event, _ in events] == ["crashed", "failed"]
    assert "exit status 3" in events[1][1]


GATEWAY = """
import asyncio, sys, aiohttp
from lowbit.engines.process import EngineSpec, Supervisor

async def main():
    async with aiohttp.ClientSession() as session:
        supervisor = Supervisor(EngineSpec("fake", tuple(sys.argv[1:]), health_interval=0.2), session)
        await supervisor.start()
        print(supervisor.pid, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""
STUBBORN = f"""
import os, signal, sys, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
sys.argv = [{str(FAKE)!r}, "--port", sys.argv[1]]
exec(compile(open({str(FAKE)!r}).read(), {str(FAKE)!r}, "exec"))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_survives_the_gateway(number: int) -> None:
    """Killed outright, with an engine that ignores SIGTERM and has a child of its own."""
    gateway = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(GATEWAY), sys.executable, "-c", STUBBORN, "{port}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert gateway.stdout is not None
        engine = psutil.Process(int(gateway.stdout.readline()))
        family = [engine, *engine.children(recursive=True), *engine.parents()[:1]]
        assert len(family) >= 3
        gateway.send_signal(number)
        gateway.wait(10)
        end = time.monotonic() + 10
        while not all(gone(each.pid) for each in family):
            assert time.monotonic() < end, "a process survived its gateway"
            time.sleep(0.02)
    finally:
        gateway.kill()
        gateway.wait()
        if gateway.stdout is not None:
            gateway.stdout.close()


def test_nothing_survives_the_guard() -> None:
    async def body(supervisor: Supervisor, events: list[tuple[str, str]]) -> None:
        assert supervisor.pid is not None
        engine = psutil.Process(supervisor.pid)
        guard = engine.parent()
        assert guard is not None
        guard.kill()
        await until(lambda: gone(engine.pid))
        await until(lambda: len(events) == 2)

    assert [event for event, _ in with_supervisor(body, spec())] == ["crashed", "restarted"]


def test_logs_rotate_and_keep_the_last_words(tmp_path: Path) -> None:
    log = EngineLog(tmp_path / "logs" / "engine.log", size=1000, files=3)
    for number in range(100):
        log.write(f"line {number} {'x' * 40}\n".encode())
    log.write(b"half a li")
    log.close()
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["engine.log", "engine.log.1", "engine.log.2"]
    assert all(path.stat().st_size <= 1000 for path in (tmp_path / "logs").iterdir())
    assert log.tail(2) == [f"line 99 {'x' * 40}", "half a li"]
