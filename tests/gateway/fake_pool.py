"""A pool over engines that run already, with no policy: tiers in order, one failed is passed over for this request."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import ClientSession, TCPConnector

from lowbit.gateway.policy import Level, Request, Snapshot, TierHealth
from lowbit.gateway.protocol import EngineInfo, Lease, ModelInfo, PoolListener, RefusedError, TierInfo


@dataclass
class FakeLease:
    pool: FakePool
    model: str
    tier: str
    engine: str
    base_url: str
    upstream_model: str
    context: int | None
    kl: float | None
    session: ClientSession
    tools: bool | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    reports: list[tuple[str, Any]] = field(default_factory=list)
    released: int = 0

    @property
    def tier_id(self) -> str:
        return f"{self.model}@{self.tier}"

    def first_token(self, seconds: float) -> None:
        self.reports.append(("first_token", seconds))

    def progress(self) -> None:
        pass

    def done(self, tokens: int, seconds: float) -> None:
        self.reports.append(("done", tokens))

    def failed(self, failure: str) -> None:
        self.reports.append(("failed", failure))

    def release(self) -> None:
        if not self.released:
            self.pool.in_flight[self.tier_id] -= 1
        self.released += 1


@dataclass
class Tier:
    """What the fake pool knows of a tier: where its engine listens, and what is said of it."""

    name: str
    url: str
    engine: str = "llama.cpp"
    context: int | None = 4096
    kl: float | None = None
    model: str = "assistant"
    kind: Any = "chat"


class FakePool:
    """Satisfies PoolProtocol."""

    def __init__(self, tiers: Sequence[Tier], capacity: int = 64) -> None:
        self.tiers = list(tiers)
        self.leases: list[FakeLease] = []
        self.in_flight = {f"{tier.model}@{tier.name}": 0 for tier in tiers}
        self.state = dict.fromkeys(self.in_flight, "ready")
        self.requests: list[Request] = []
        self.limit = capacity
        self.keep = True
        self._session: ClientSession | None = None
        self._listeners: list[PoolListener] = []

    def now(self) -> float:
        return time.monotonic()

    def snapshot(self) -> Snapshot:
        healths = {
            tier: TierHealth(state=self.state[tier], in_flight=count, memory=1000)  # type: ignore[arg-type]
            for tier, count in self.in_flight.items()
        }
        return Snapshot(self.now(), healths, {model.name: Level() for model in self.models()}, 10_000)

    def models(self) -> Sequence[ModelInfo]:
        names = dict.fromkeys(tier.model for tier in self.tiers)
        return [
            ModelInfo(
                name,
                tuple(
                    TierInfo(f"{name}@{t.name}", t.name, t.engine, 4.0, 1000, t.kl, t.context)
                    for t in self.tiers
                    if t.model == name
                ),
                kind=next(t.kind for t in self.tiers if t.model == name),
            )
            for name in names
        ]

    def resolve(self, name: str) -> tuple[str, str | None]:
        model, _, tier = name.partition("@")
        known = self.in_flight if tier else {each.model for each in self.tiers}
        if name not in known:
            raise RefusedError(404, "model_not_found", f"there is no model {name!r}; did you mean 'assistant'?")
        return model, tier or None

    def engines(self) -> Sequence[EngineInfo]:
        return [EngineInfo(f"{t.model}@{t.name}", t.engine, t.url, 1, 0, 12345) for t in self.tiers]

    def capacity(self, model: str) -> int:
        return self.limit

    def subscribe(self, listener: PoolListener) -> None:
        self._listeners.append(listener)

    async def start(self) -> None:
        self._session = ClientSession(connector=TCPConnector(limit=0, keepalive_timeout=4.0))

    async def stop(self, drain: float = 30.0) -> None:
        if self._session is not None:
            await self._session.close()

    async def acquire(self, request: Request, tried: Sequence[str] = ()) -> Lease:
        if self.keep:
            self.requests.append(request)
        for tier in self.tiers:
            tier_id = f"{tier.model}@{tier.name}"
            if tier.model != request.model or tier_id in tried or request.tier not in (None, tier.name):
                continue
            assert self._session is not None
            lease = FakeLease(
                self, tier.model, tier.name, tier.engine, tier.url, "fake", tier.context, tier.kl, self._session
            )
            self.in_flight[tier_id] += 1
            if self.keep:
                self.leases.append(lease)
            return lease
        raise RefusedError(503, "no_tier", f"no tier of {request.model!r} can answer", 5.0)
