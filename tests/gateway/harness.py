"""A gateway over fake engines, in the test's own event loop; an engine that must die runs as a process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import ClientSession, web
from fake_engine import Engine
from fake_engine import make_app as make_engine
from fake_pool import FakePool, Tier

from lowbit.gateway.app import make_app
from lowbit.gateway.config import ServeConfig, parse_config

ENGINE_FILE = Path(__file__).with_name("fake_engine.py")


@asynccontextmanager
async def running(app: web.Application) -> AsyncIterator[str]:
    """Serve an application on a free port; gives its url."""
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def engine_process(*arguments: str) -> AsyncIterator[tuple[str, subprocess.Popen[str]]]:
    """A fake engine in a process of its own."""
    command = [sys.executable, str(ENGINE_FILE), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = await asyncio.to_thread(process.stdout.readline)
        yield f"http://127.0.0.1:{line.split()[1]}", process
    finally:
        process.kill()
        process.wait()


def make_config(**settings: Any) -> ServeConfig:
    tiers = [{"name": "int4", "url": "http://127.0.0.1:1"}]
    return parse_config({"models": {"assistant": {"tiers": tiers}}, **settings})


@dataclass
class Bench:
    """What a test has in its hands."""

    url: str
    app: web.Application
    pool: FakePool
    engines: list[Engine]
    http: ClientSession

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        async with self.http.post(self.url + path, json=body, **options) as response:
            return response.status, await response.json()

    async def stream(self, path: str, body: Any, **options: Any) -> str:
        """All bytes of a stream."""
        async with self.http.post(self.url + path, json={**body, "stream": True}, **options) as response:
            assert response.status == 200, await response.text()
            return await response.text()

    async def until_idle(self) -> None:
        """Wait until nothing is under way, in engines or pool."""
        for _ in range(100):
            if not any(engine.active for engine in self.engines) and not any(self.pool.in_flight.values()):
                return
            await asyncio.sleep(0.02)
        raise AssertionError("something is still under way")


@asynccontextmanager
async def gateway(
    engines: Sequence[Engine] = (),
    tiers: Sequence[Tier] | None = None,
    capacity: int = 64,
    more: bool = False,
    **settings: Any,
) -> AsyncIterator[Bench]:
    """A gateway over ``engines`` as tiers int8, int4, … of the model ``assistant``, and over ``tiers``.

    With ``more``, the first engine also answers as the models ``embedder`` and ``ranker``.
    """
    async with AsyncExitStack() as stack:
        engines = list(engines) or ([Engine()] if tiers is None else [])
        urls = [await stack.enter_async_context(running(make_engine(engine))) for engine in engines]
        names = ("int8", "int4", "int3", "int2")
        made = [
            Tier(name, url, engine.dialect, engine.context, kl=0.01 * (index + 1))
            for index, (name, url, engine) in enumerate(zip(names, urls, engines, strict=False))
        ]
        others = [("embedder", "embedding"), ("ranker", "rerank")] if more else []
        made += [Tier("fp32", urls[0], model=model, kind=kind) for model, kind in others]
        pool = FakePool([*made, *(tiers or ())], capacity)
        app = make_app(pool, make_config(**settings))
        url = await stack.enter_async_context(running(app))
        http = await stack.enter_async_context(ClientSession())
        yield Bench(url, app, pool, engines, http)


def run(scenario: Callable[[], Awaitable[None]], timeout: float = 30.0) -> None:
    """Run a test's coroutine, not for ever."""

    async def limited() -> None:
        await asyncio.wait_for(scenario(), timeout)

    asyncio.run(limited())
