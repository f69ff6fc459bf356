"""The gateway itself ended under load: what it had begun is finished or cut, never lost; its successor answers."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from pathlib import Path

import pytest
from aiohttp import ClientSession, ClientTimeout, TCPConnector
from harness import run
from soak import Soak, lives
from soak_calls import ask

STREAMS = 20


async def under_way(soak: Soak, http: ClientSession, number: int) -> tuple[Counter[str], Counter[str]]:
    """Results of streams that ran when the gateway got signal ``number``, and of those asked of the next one."""
    asking = [asyncio.create_task(ask(http, soak.url, "chat stream", each, 0)) for each in range(STREAMS)]
    engines = 0
    while not engines:
        await asyncio.sleep(0.05)
        async with http.get(f"{soak.url}/status") as response:
            status = await response.json()
        engines = sum(tier["in_flight"] for model in status["models"] for tier in model["tiers"])
    old = [*soak.engines(), soak.gateway]
    await soak.end(number)
    first = Counter(each.result for each in await asyncio.gather(*asking))
    for _ in range(200):  # a killed gateway's guards end the engines
        if not any(lives(each) for each in old):
            break
        await asyncio.sleep(0.05)
    else:
        raise AssertionError("an engine outlived its gateway")
    await soak.start(http)
    answers = await asyncio.gather(*(ask(http, soak.url, "chat", 100 + each, 1) for each in range(STREAMS)))
    return first, Counter(each.result for each in answers)


@pytest.mark.slow
def test_ended_and_killed_under_load(tmp_path: Path) -> None:
    async def scenario() -> None:
        soak = Soak(tmp_path, 60.0, 1)
        soak.configure()
        async with ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(total=None)) as http:
            await soak.start(http)
            try:
                gently, after = await under_way(soak, http, signal.SIGTERM)
                assert set(gently) <= {"answered", "refused: 503 shutting_down"}, gently
                assert gently["answered"]
                assert after == {"answered": STREAMS}
                killed, after = await under_way(soak, http, signal.SIGKILL)
                assert set(killed) <= {"answered", "cut"}, killed
                assert killed["cut"]
                assert after == {"answered": STREAMS}
            finally:
                await soak.end(signal.SIGTERM)

    run(scenario, 180)


@pytest.mark.slow
def test_a_short_soak_is_all_accounted_for(tmp_path: Path) -> None:
    soak = Soak(tmp_path, 20.0, 7)
    run(soak.run, 240)
    assert soak.account() == []
    assert sum(soak.faults.values()) > 5
