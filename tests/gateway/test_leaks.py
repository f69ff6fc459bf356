"""An hour of trouble in seconds: afterwards everything that was taken is given back."""

from __future__ import annotations

import asyncio
import gc
import random
from typing import Any

import psutil
import pytest
from aiohttp import ClientError
from fake_engine import GENERATION_FAULTS, Engine
from harness import Bench, gateway, run

from lowbit.gateway.state import STATE

CHAT: dict[str, Any] = {"model": "assistant", "messages": [{"role": "user", "content": "hello"}]}
FAULTS = [fault for fault in GENERATION_FAULTS if fault not in ("die", "die_mid", "hang_all")]


async def trouble(bench: Bench, chance: random.Random) -> int | None:
    """One request with whatever comes: a faulty engine, a client that leaves, nonsense. Its status, None if it left."""
    for engine in bench.engines:
        engine.fault, engine.fault_count = chance.choice([None, None, *FAULTS]), 1
        engine.token_time = chance.choice([0.0, 0.0, 0.005])
    body = {**CHAT, "stream": chance.random() < 0.7, **({"n": -1} if chance.random() < 0.1 else {})}
    patience = chance.choice([None, None, 0.005, 0.05])
    try:
        return await asyncio.wait_for(ask(bench, body), patience)
    except (asyncio.TimeoutError, ClientError):
        return None


async def ask(bench: Bench, body: dict[str, Any]) -> int:
    async with bench.http.post(f"{bench.url}/v1/chat/completions", json=body) as response:
        await response.read()
        return response.status


def test_nothing_leaks(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        chance = random.Random(0)
        limits = {"first_byte_timeout": 0.1, "queue_requests": 20, "key_concurrency": 40}
        async with gateway([Engine(), Engine()], capacity=8, limits=limits) as bench:

            async def round_of_trouble(requests: int) -> list[int | None]:
                return await asyncio.gather(*(trouble(bench, chance) for _ in range(requests)))

            process = psutil.Process()
            before, files = len(asyncio.all_tasks()), process.num_fds()
            seen: set[int | None] = set()
            for _ in range(12):
                seen |= set(await round_of_trouble(40))
            await bench.until_idle()
            assert {200, 400, None} <= seen <= {200, 400, 429, 502, 503, 504, None}
            assert all(lease.released == 1 for lease in bench.pool.leases)
            assert set(bench.pool.in_flight.values()) == {0}
            queue = bench.app[STATE].gate.queues["assistant"]
            assert (queue.active, queue.waiting, queue.waiting_tokens) == (0, 0, 0)
            await bench.http.close()
            await bench.pool.stop()
            gc.collect()
            for _ in range(100):
                if len(asyncio.all_tasks()) <= before and process.num_fds() <= files:
                    break
                await asyncio.sleep(0.05)
            assert len(asyncio.all_tasks()) <= before
            assert process.num_fds() <= files
            assert [entry for entry in caplog.records if entry.exc_info and entry.name.startswith("lowbit")] == []

    run(scenario, timeout=60)
