"""A place in an engine for one request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from aiohttp import ClientSession

from lowbit.engines.process import Supervisor
from lowbit.gateway import learning
from lowbit.gateway.launch import TierPlan
from lowbit.gateway.policy import Request
from lowbit.gateway.protocol import Failure

__all__ = ["PoolLease"]


class Lender(Protocol):
    """What a lease tells the pool that made it, and asks of it."""

    @property
    def session(self) -> ClientSession:
        """The client session to all engines."""
        ...

    def now(self) -> float:
        """Monotonic seconds."""
        ...

    def feed(self, event: learning.Event) -> None:
        """Something was learned about a tier."""
        ...

    def heard_first(self, lease: PoolLease, seconds: float) -> None:
        """The first token came."""
        ...

    def heard_failure(self, lease: PoolLease, failure: Failure) -> None:
        """The engine did not do its part."""
        ...

    def heard_end(self, lease: PoolLease) -> None:
        """The place is free again."""
        ...


class PoolLease:
    """See :class:`lowbit.gateway.protocol.Lease`; made by the pool."""

    __slots__ = ("_base_url", "_plan", "_pool", "_released", "_reported", "incarnation", "request", "supervisor")

    def __init__(
        self, pool: Lender, plan: TierPlan, supervisor: Supervisor | None, incarnation: int, request: Request
    ) -> None:
        self._pool, self._plan = pool, plan
        self.supervisor, self.incarnation, self.request = supervisor, incarnation, request
        self._base_url = plan.url if supervisor is None else supervisor.base_url
        self._released = self._reported = False

    @property
    def model(self) -> str:
        """The model's name."""
        return self._plan.policy.model

    @property
    def tier(self) -> str:
        """The tier's name."""
        return self._plan.policy.name

    @property
    def tier_id(self) -> str:
        """``model@tier``."""
        return self._plan.policy.id

    @property
    def engine(self) -> str:
        """The kind of engine."""
        return self._plan.facts.engine

    @property
    def base_url(self) -> str:
        """Where the engine listened when the lease was made."""
        return self._base_url or ""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers that the engine wants."""
        return self._plan.headers

    @property
    def upstream_model(self) -> str:
        """What the engine calls the model."""
        return self._plan.upstream_model

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer."""
        return self._plan.context

    @property
    def tools(self) -> bool | None:
        """Whether the model can be told of tools."""
        return self._plan.facts.tools

    @property
    def kl(self) -> float | None:
        """Measured KL divergence from the original."""
        return self._plan.policy.kl

    @property
    def session(self) -> ClientSession:
        """The client session of the pool."""
        return self._pool.session

    def first_token(self, seconds: float) -> None:
        """The first token came."""
        self.progress()
        self._pool.heard_first(self, seconds)

    def progress(self) -> None:
        """Bytes came."""
        if self.supervisor is not None:
            self.supervisor.progress()

    def done(self, tokens: int, seconds: float) -> None:
        """The answer is complete."""
        if not self._reported:
            self._reported = True
            itl = seconds / (tokens - 1) if tokens > 1 and seconds > 0 else None
            self._pool.feed(learning.Answered(self.tier_id, self._pool.now(), itl))

    def failed(self, failure: Failure) -> None:
        """The engine did not do its part; ``cancelled`` counts against nobody."""
        if not self._reported:
            self._reported = True
            if failure != "cancelled":
                self._pool.heard_failure(self, failure)

    def release(self) -> None:
        """Give the place back. Idempotent."""
        if not self._released:
            self._released = True
            self._pool.heard_end(self)
