"""The pool of engines: it carries events to the policy and the policy's decisions to the engines, and decides nothing.

Everything happens in one event loop; between two awaits the snapshot is consistent.
"""

from __future__ import annotations

import asyncio
import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from lowbit.engines.process import Supervisor, SupervisorEvent
from lowbit.errors import LowbitError
from lowbit.gateway import learning
from lowbit.gateway.config import ServeConfig
from lowbit.gateway.launch import TierPlan, serving_policy
from lowbit.gateway.lease import PoolLease
from lowbit.gateway.log import LOGGER
from lowbit.gateway.policy import Load, Policy, Reject, Request, Route, Snapshot
from lowbit.gateway.protocol import (
    EngineInfo,
    Failure,
    Lease,
    ModelInfo,
    PoolListener,
    PoolProtocol,
    RefusedError,
    TierInfo,
)
from lowbit.gateway.routing import decide, maintain, urgency

__all__ = ["Lease", "Pool", "PoolProtocol"]

_BACKGROUND = "pool"
_TICK = 0.5
_MEASURE_EVERY = 10
"""Ticks between two measurements of the engines' memory."""
_SETTLE = 0.15
"""Seconds in which the end of a process is noticed after it closed its connections."""


@dataclass(eq=False, slots=True)
class _Waiter:
    request: Request
    tried: tuple[str, ...]
    future: asyncio.Future[PoolLease]
    wants: str | None = None

    def kind(self) -> tuple[object, ...]:
        """Requests of one kind get the same decision, but for their age."""
        request = self.request
        limits = (request.tier, request.precision, request.memory_limit, request.speed)
        return (request.model, *limits, self.tried)


class Pool:
    """Engines of a configuration, under its policy; ``plans`` by tier id, ``memory_budget`` and those
    of the GPUs in bytes."""

    def __init__(
        self,
        config: ServeConfig,
        plans: Mapping[str, TierPlan],
        memory_budget: int,
        gpu_budgets: tuple[int, ...] = (),
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.policy: Policy = serving_policy(config, plans, memory_budget, gpu_budgets)
        self._config, self._plans, self._clock = config, plans, clock
        self._state = learning.initial(self.policy, clock())
        self._engines: dict[str, Supervisor] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._unloading: set[str] = set()
        self._waiters: list[_Waiter] = []
        self._unanswered: dict[PoolLease, None] = {}
        self._listeners: list[PoolListener] = []
        self._session: aiohttp.ClientSession | None = None
        self._pumping = False
        self._wake: asyncio.TimerHandle | None = None
        self._closing = False
        self._created = int(time.time())
        self._names = {alias: name for name, model in config.models.items() for alias in (name, *model.aliases)}

    # what the routes ask

    def now(self) -> float:
        """Monotonic seconds."""
        return self._clock()

    def snapshot(self) -> Snapshot:
        """The state at this moment."""
        return self._state.copy(self._clock())

    @property
    def session(self) -> aiohttp.ClientSession:
        """The client session to all engines."""
        if self._session is None:
            raise RuntimeError("the pool has not been started")
        return self._session

    def models(self) -> Sequence[ModelInfo]:
        """All models, in the configuration's order."""
        return [
            ModelInfo(
                name,
                tuple(self._tier_info(tier_id) for tier_id in self.policy.models[name].tiers),
                tuple(model.aliases),
                model.kind,
                self._created,
            )
            for name, model in self._config.models.items()
        ]

    def _tier_info(self, tier_id: str) -> TierInfo:
        plan = self._plans[tier_id]
        tier = plan.policy
        return TierInfo(
            tier_id,
            tier.name,
            plan.facts.engine,
            tier.bits,
            tier.memory,
            tier.kl,
            plan.context,
            plan.facts.error,
            tier.gpu_memory,
            plan.facts.tools,
        )

    def resolve(self, name: str) -> tuple[str, str | None]:
        """(model, tier or None) of ``assistant@int8``, ``assistant`` or an alias."""
        if name in self._names:
            return self._names[name], None
        base, separator, tier = name.rpartition("@")
        if separator and base in self._names:
            model = self._names[base]
            if f"{model}@{tier}" in self.policy.tiers:
                return model, tier
        known = [*self._names, *self.policy.tiers]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(self._config.models))}"
        raise RefusedError(404, "model_not_found", f"no model {name!r} is served here: {hint}")

    def engines(self) -> Sequence[EngineInfo]:
        """The engines that run, and those elsewhere."""
        running = [
            EngineInfo(
                tier_id,
                self._plans[tier_id].facts.engine,
                supervisor.base_url,
                supervisor.pid,
                supervisor.restarted,
                self._state.tiers[tier_id].resident,
                self._plans[tier_id].headers,
            )
            for tier_id, supervisor in self._engines.items()
        ]
        elsewhere = [
            EngineInfo(tier_id, plan.facts.engine, plan.url, None, 0, 0, plan.headers)
            for tier_id, plan in self._plans.items()
            if plan.url is not None
        ]
        return running + elsewhere

    def capacity(self, model: str) -> int:
        """Requests that the model's tiers that are up answer at a time, at least those of its largest tier."""
        tiers = [self.policy.tiers[tier_id] for tier_id in self.policy.models[model].tiers]
        up = [tier.concurrency for tier in tiers if self._state.tiers[tier.id].state == "ready"]
        return max(sum(up), max(tier.concurrency for tier in tiers))

    def subscribe(self, listener: PoolListener) -> None:
        """Call ``listener`` for every event from now on."""
        self._listeners.append(listener)

    # life

    async def start(self) -> None:
        """Begin: what is pinned is loaded in the background."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30.0),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10.0),
            auto_decompress=True,
        )
        self._spawn(self._background(), _BACKGROUND)

    async def stop(self, drain: float = 30.0) -> None:
        """Refuse new requests, wait for those under way, end every engine."""
        self._closing = True
        for waiter in self._waiters:
            if not waiter.future.done():
                waiter.future.set_exception(RefusedError(503, "shutting_down", "the server is shutting down", 5.0))
        end = self._clock() + drain
        while self._clock() < end and any(health.in_flight for health in self._state.tiers.values()):
            await asyncio.sleep(0.05)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(supervisor.stop() for supervisor in self._engines.values()))
        self._engines.clear()
        if self._wake is not None:
            self._wake.cancel()
        if self._session is not None:
            await self._session.close()
            self._session = None

    # requests

    async def acquire(self, request: Request, tried: Sequence[str] = ()) -> PoolLease:
        """A place for ``request``; waits as the policy says. Raises :class:`RefusedError`."""
        if self._closing:
            raise RefusedError(503, "shutting_down", "the server is shutting down", 5.0)
        model = self.policy.models.get(request.model)
        if tried and model is not None and set(model.tiers) <= set(tried):
            await asyncio.sleep(_SETTLE)
        if not self._waiters:  # nobody to overtake
            self._state.now = self._clock()
            decision = decide(self.policy, self._state, request, tried)
            if isinstance(decision, Route):
                return self._lease(decision.tier, request)
        waiter = _Waiter(request, tuple(tried), asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        self._pump()
        try:
            return await waiter.future
        except asyncio.CancelledError:
            if waiter.future.done() and not waiter.future.cancelled() and waiter.future.exception() is None:
                waiter.future.result().release()
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _pump(self) -> None:
        """Ask the policy about every request that waits, the most urgent first, and do what it says."""
        self._pumping = False
        if not self._waiters or self._closing:
            return
        now = self._clock()
        until = now + 60.0
        queued: set[tuple[object, ...]] = set()
        for waiter in sorted(self._waiters, key=lambda waiter: urgency(waiter.request, now)):
            if waiter.future.done():
                continue
            until = min(until, waiter.request.deadline)
            if waiter.kind() in queued and waiter.request.deadline > now:
                continue
            self._state.now = now
            decision = decide(self.policy, self._state, waiter.request, waiter.tried)
            if isinstance(decision, Route):
                waiter.future.set_result(self._lease(decision.tier, waiter.request))
            elif isinstance(decision, Reject):
                waiter.future.set_exception(
                    RefusedError(decision.status, decision.code, decision.message, decision.retry_after)
                )
            else:
                queued.add(waiter.kind())
                waiter.wants = decision.tier
                if isinstance(decision, Load):
                    self._load(decision)
                else:
                    until = min(until, decision.until)
        self._waiters = [waiter for waiter in self._waiters if not waiter.future.done()]
        self._wake_at(until)

    def _wake_at(self, until: float) -> None:
        if self._wake is not None:
            self._wake.cancel()
        if self._waiters:
            delay = max(0.01, until - self._clock())
            self._wake = asyncio.get_running_loop().call_later(delay, self._pump)

    def _pump_soon(self) -> None:
        if not self._pumping:
            self._pumping = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _lease(self, tier_id: str, request: Request) -> PoolLease:
        supervisor = self._engines.get(tier_id)
        incarnation = self._state.tiers[tier_id].incarnation
        lease = PoolLease(self, self._plans[tier_id], supervisor, incarnation, request)
        self.feed(learning.Started(tier_id, self._clock()))
        if request.stream:
            self._unanswered[lease] = None
        if supervisor is not None:
            if not supervisor.busy:
                supervisor.progress()
            supervisor.busy += 1
        return lease

    # what leases tell

    def heard_first(self, lease: PoolLease, seconds: float) -> None:
        """The first token of ``lease`` came."""
        self._unanswered.pop(lease, None)
        self.feed(learning.FirstToken(lease.tier_id, self._clock(), seconds))

    def heard_failure(self, lease: PoolLease, failure: Failure) -> None:
        """Count a failure; a lost connection only if its process still runs when that is known."""
        event = learning.Failed(lease.tier_id, self._clock(), lease.incarnation, failure)
        if failure in ("connect", "disconnected") and lease.supervisor is not None and not self._closing:
            asyncio.get_running_loop().call_later(_SETTLE, self.feed, event)
        else:
            self.feed(event)

    def heard_end(self, lease: PoolLease) -> None:
        """The place of ``lease`` is free."""
        self._unanswered.pop(lease, None)
        if lease.supervisor is not None:
            lease.supervisor.busy -= 1
        self.feed(learning.Ended(lease.tier_id, self._clock()))
        health = self._state.tiers[lease.tier_id]
        if health.state == "draining" and health.in_flight == 0:
            self._unload(lease.tier_id)

    def feed(self, event: learning.Event) -> None:
        """Teach the policy, tell the listeners what changed, and look at the waiting requests again."""
        for change in learning.learn(self.policy, self._state, event):
            self._tell(change.event, change.tier, change.details)
        if self._waiters and not isinstance(event, (learning.Started, learning.Tick)):
            self._pump_soon()

    def _tell(self, event: str, tier_id: str, details: Mapping[str, Any]) -> None:
        for listener in self._listeners:
            listener(event, tier_id, details)

    # engines

    def _spawn(self, work: Any, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        """Nothing that the pool does for itself may fail unheard."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            LOGGER.error("bug", exc_info=error, extra={"fields": {"task": task.get_name()}})
            if task.get_name() == _BACKGROUND and not self._closing:
                self._spawn(self._background(after=_TICK), _BACKGROUND)

    def _load(self, decision: Load) -> None:
        for victim in decision.evict:
            self._drain(victim, room_for=decision.tier, reason=f"makes room for {decision.tier}")
        if decision.evict:
            return
        self.feed(learning.LoadStarted(decision.tier, self._clock()))
        self._tell("loading", decision.tier, {})
        self._spawn(self._load_tier(decision.tier), f"load {decision.tier}")

    async def _load_tier(self, tier_id: str) -> None:
        spec = self._plans[tier_id].spec
        if spec is None:
            raise RuntimeError(f"{tier_id} has no engine of its own to load")
        began = self._clock()
        try:
            supervisor = Supervisor(spec, self.session, lambda event, reason: self._on_engine(tier_id, event, reason))
            self._engines[tier_id] = supervisor
            await supervisor.start()
        except (LowbitError, OSError) as error:
            failed = self._engines.pop(tier_id, None)
            if failed is not None:
                await failed.stop()
            self.feed(learning.LoadFailed(tier_id, self._clock(), str(error)))
            self._tell("load_failed", tier_id, {"reason": str(error)})
            return
        self.feed(learning.Loaded(tier_id, self._clock()))
        self._tell("ready", tier_id, {"seconds": round(self._clock() - began, 3)})

    def _on_engine(self, tier_id: str, event: SupervisorEvent, reason: str) -> None:
        """What the supervisor of a running engine reports."""
        now = self._clock()
        self._tell("load_failed" if event == "failed" else event, tier_id, {"reason": reason})
        if event == "restarted":
            self.feed(learning.Loaded(tier_id, now))
        elif event == "failed":
            self._spawn(self._give_up(tier_id, reason), f"give up {tier_id}")
        elif self._state.tiers[tier_id].state == "draining":
            self._unload(tier_id)
        else:
            self.feed(learning.Crashed(tier_id, now, reason))

    async def _give_up(self, tier_id: str, reason: str) -> None:
        supervisor = self._engines.pop(tier_id, None)
        if supervisor is not None:
            await supervisor.stop()
            self.feed(learning.LoadFailed(tier_id, self._clock(), reason))

    def _drain(self, tier_id: str, *, room_for: str | None, reason: str) -> None:
        self.feed(learning.Draining(tier_id, self._clock(), room_for))
        self._tell("draining", tier_id, {"reason": reason})
        if self._state.tiers[tier_id].in_flight == 0:
            self._unload(tier_id)

    def _unload(self, tier_id: str) -> None:
        if tier_id not in self._unloading:
            self._unloading.add(tier_id)
            self._spawn(self._unload_tier(tier_id), f"unload {tier_id}")

    async def _unload_tier(self, tier_id: str) -> None:
        supervisor = self._engines.get(tier_id)
        try:
            if supervisor is not None:
                await supervisor.stop()
                self._engines.pop(tier_id, None)
        finally:
            self._unloading.discard(tier_id)
        self.feed(learning.Unloaded(tier_id, self._clock()))
        self._tell("unloaded", tier_id, {})

    async def _background(self, after: float = 0.0) -> None:
        """Every half second: let time pass for the policy, do its maintenance, now and then measure memory."""
        ticks = 0
        while True:
            await asyncio.sleep(_TICK if ticks else after)
            now = self._clock()
            self.feed(learning.Tick(now, *self._pressure()))
            for action in maintain(self.policy, self._state):
                if isinstance(action, Load):
                    self._load(action)
                else:
                    self._drain(action.tier, room_for=None, reason=action.reason)
            self._pump()
            ticks += 1
            if ticks % _MEASURE_EVERY == 0:
                for tier_id, supervisor in list(self._engines.items()):
                    memory = await asyncio.to_thread(supervisor.resident_bytes)
                    self.feed(learning.Measured(tier_id, now, memory))

    def _pressure(self) -> tuple[dict[str, int], dict[str, float]]:
        """Requests waiting by tier, and the arrival of each model's oldest request without a token."""
        queued: dict[str, int] = {}
        oldest: dict[str, float] = {}
        for waiter in self._waiters:
            if waiter.wants is not None:
                queued[waiter.wants] = queued.get(waiter.wants, 0) + 1
        for request in (*(each.request for each in self._waiters), *(each.request for each in self._unanswered)):
            oldest[request.model] = min(oldest.get(request.model, request.arrived), request.arrived)
        return queued, oldest
