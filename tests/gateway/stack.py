"""The whole gateway over real processes: fake engines started, watched and ended by the pool."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from aiohttp import ClientError, ClientSession, TCPConnector
from harness import running

from lowbit.gateway.app import make_app
from lowbit.gateway.config import ServeConfig, parse_config
from lowbit.gateway.launch import TierFacts, plan_tiers
from lowbit.gateway.pool import Pool

FAKE = Path(__file__).with_name("fake_engine.py")
MIB = 1024**2


def fake_tier(name: str, *arguments: str, memory: int = 100 * MIB, **settings: Any) -> dict[str, Any]:
    command = [sys.executable, str(FAKE), "--port", "{port}", "--model", name, *arguments]
    return {"name": name, "command": command, "memory": memory, "ready_timeout": 30.0, **settings}


@dataclass
class Stack:
    """A gateway, its pool, and everything it told its listeners."""

    url: str
    pool: Pool
    http: ClientSession
    events: list[tuple[str, str]] = field(default_factory=list)

    async def chat(self, model: str, **body: Any) -> tuple[int, dict[str, Any], Any]:
        """Status, headers and JSON of a chat that is not streamed."""
        request = {"model": model, "messages": [{"role": "user", "content": "hi"}], **body}
        async with self.http.post(f"{self.url}/v1/chat/completions", json=request) as response:
            return response.status, dict(response.headers), await response.json()

    async def stream(self, model: str, **body: Any) -> tuple[int, str, str | None]:
        """(status, text, error) of a streamed chat; ``error`` where the stream says so or breaks off."""
        request = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": True, **body}
        text, error, done = "", None, False
        async with self.http.post(f"{self.url}/v1/chat/completions", json=request) as response:
            if response.status != 200:
                return response.status, "", (await response.json())["error"]["message"]
            try:
                async for line in response.content:
                    if not line.startswith(b"data: "):
                        continue
                    if line.strip() == b"data: [DONE]":
                        done = True
                        continue
                    event = json.loads(line[6:])
                    error = event.get("error", {}).get("message") if "error" in event else error
                    for choice in event.get("choices", []):
                        text += choice["delta"].get("content") or ""
            except ClientError as broken:
                error = str(broken) or "broken"
        return 200, text, error if error or done else "no [DONE]"

    async def fault(self, tier_id: str, kind: str | None, count: int | None = None, **settings: Any) -> None:
        """Break the engine of a tier."""
        engine = next(each for each in self.pool.engines() if each.tier_id == tier_id)
        async with self.http.post(
            f"{engine.base_url}/fault", json={"kind": kind, "count": count, **settings}
        ) as answer:
            assert answer.status == 200

    def pid(self, tier_id: str) -> int:
        pid = next(each.pid for each in self.pool.engines() if each.tier_id == tier_id)
        assert pid is not None
        return pid

    def state(self, tier_id: str) -> str:
        return self.pool.snapshot().tiers[tier_id].state

    async def until(self, condition: Callable[[], bool], seconds: float = 15.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"did not happen in time; {self.events}"
            await asyncio.sleep(0.02)

    async def ready(self, *tier_ids: str) -> None:
        await self.until(lambda: all(self.state(tier_id) == "ready" for tier_id in tier_ids))


def configured(models: dict[str, Any], **settings: Any) -> ServeConfig:
    return parse_config({"models": models, **settings})


@asynccontextmanager
async def stack(config: ServeConfig, memory: int = 1024 * MIB, logs: Path | None = None) -> AsyncIterator[Stack]:
    """A gateway that runs; afterwards no engine, task or request may be left."""
    facts = {
        f"{name}@{tier.name}": TierFacts("openai") for name, model in config.models.items() for tier in model.tiers
    }
    pool = Pool(config, plan_tiers(config, facts, logs), memory)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    async with ClientSession(connector=TCPConnector(limit=0)) as http, running(make_app(pool, config)) as url:
        made = Stack(url, pool, http)
        pool.subscribe(lambda event, tier_id, details: made.events.append((event, tier_id)))
        yield made
    left = {child.pid for child in psutil.Process().children(recursive=True)} - before
    assert not left, "processes were left behind"
    assert all(health.in_flight == 0 for health in pool.snapshot().tiers.values())
