"""A simulated pool: the pure policy with engines that are numbers, a clock that jumps, and faults by schedule."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from lowbit.gateway import learning
from lowbit.gateway.policy import (
    Load,
    ModelPolicy,
    Policy,
    Queue,
    Reject,
    Request,
    Route,
    Settings,
    TierHealth,
    TierPolicy,
)
from lowbit.gateway.routing import decide, maintain, urgency

GIB = 1024**3


def make_policy(
    tiers: dict[str, list[TierPolicy]], budget: int, settings: Settings | None = None, gpus: tuple[int, ...] = ()
) -> Policy:
    every = [tier for group in tiers.values() for tier in group]
    models = {
        name: ModelPolicy(name, tuple(tier.id for tier in group), settings or Settings())
        for name, group in tiers.items()
    }
    return Policy({tier.id: tier for tier in every}, models, budget, gpus)


def tier(model: str, name: str, memory: float = 1, **facts: object) -> TierPolicy:
    bits = {"bf16": 16.0, "int8": 8.0, "int4": 4.0}.get(name, 16.0)
    return TierPolicy(f"{model}@{name}", model, name, bits, int(memory * GIB), **facts)  # type: ignore[arg-type]


def gpu_bytes(held: TierHealth | TierPolicy, number: int) -> int:
    return held.gpu_memory[number] if number < len(held.gpu_memory) else 0


@dataclass
class Engine:
    """What is really the matter with a tier's engine; tests change it while time runs."""

    ttft: float = 0.1
    duration: float = 0.5
    load: float = 1.0
    unload: float = 0.2
    fails: bool = False
    breaks_off: bool = False
    refuses_load: bool = False


@dataclass
class Ticket:
    """A request under way and how it ended: ``answered@tier``, ``broken@tier`` after its first token, or a status."""

    request: Request
    tried: list[str] = field(default_factory=list)
    outcome: str | None = None
    ended: float = 0.0
    status: int = 0


class World:
    """Runs the policy as the pool does and checks at every step what must always hold."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.snapshot = learning.initial(policy, 0.0)
        self.engines = {name: Engine() for name in policy.tiers}
        self.tickets: list[Ticket] = []
        self.waiting: list[Ticket] = []
        self.running: dict[str, list[Ticket]] = {name: [] for name in policy.tiers}
        self.log: list[tuple[float, str, str]] = []
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()
        self._process = dict.fromkeys(policy.tiers, 0)
        self.now = 0.0
        self.at(0.0, self._tick)

    def at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (time, next(self._number), action))

    def ask(self, time: float, request: Request, timeout: float = 60.0) -> Ticket:
        ticket = Ticket(dataclasses.replace(request, arrived=time, deadline=time + timeout))
        self.tickets.append(ticket)
        self.at(time, lambda: self._arrive(ticket))
        return ticket

    def _arrive(self, ticket: Ticket) -> None:
        self.waiting.append(ticket)
        self._pump()

    def run(self, until: float) -> World:
        while self._agenda and self._agenda[0][0] <= until:
            self.now, _, action = heapq.heappop(self._agenda)
            action()
        self.now = until
        return self

    def feed(self, event: learning.Event) -> None:
        for change in learning.learn(self.policy, self.snapshot, event):
            self.log.append((self.now, change.event, change.tier))
        self._check()

    def _check(self) -> None:
        assert self.snapshot.memory <= self.policy.memory_budget
        for number, budget in enumerate(self.policy.gpu_budgets):
            assert sum(gpu_bytes(health, number) for health in self.snapshot.tiers.values()) <= budget
        for name, health in self.snapshot.tiers.items():
            assert 0 <= health.in_flight <= self.policy.tiers[name].concurrency
            assert health.in_flight == len(self.running[name])
            assert not (self.policy.tiers[name].pinned and health.state == "draining")
            assert (health.circuit == "open") <= (health.openings > 0)

    def _tick(self) -> None:
        oldest: dict[str, float] = {}
        for ticket in [*self.waiting, *itertools.chain.from_iterable(self.running.values())]:
            model = ticket.request.model
            oldest[model] = min(oldest.get(model, ticket.request.arrived), ticket.request.arrived)
        self.feed(learning.Tick(self.now, {}, oldest))
        for action in maintain(self.policy, self.snapshot):
            if isinstance(action, Load):
                self._load(action)
            else:
                self._drain(action.tier)
        self._pump()
        self.at(self.now + 0.5, self._tick)

    def _pump(self) -> None:
        for ticket in sorted(self.waiting, key=lambda ticket: urgency(ticket.request, self.now)):
            self.snapshot.now = self.now
            decision = decide(self.policy, self.snapshot, ticket.request, ticket.tried)
            if isinstance(decision, Route):
                self.waiting.remove(ticket)
                self._start(ticket, decision.tier)
            elif isinstance(decision, Load):
                self._load(decision)
            elif isinstance(decision, Reject):
                self.waiting.remove(ticket)
                assert decision.status in (400, 404, 502, 503)
                assert decision.retry_after is None or decision.retry_after > 0
                self._end(ticket, "refused", decision.status)
            else:
                assert isinstance(decision, Queue)
                assert decision.until > self.now

    def _load(self, decision: Load) -> None:
        for name in decision.evict:
            assert not self.policy.tiers[name].pinned
            self._drain(name, decision.tier)
        if decision.evict:
            return
        name, engine = decision.tier, self.engines[decision.tier]
        assert self.snapshot.tiers[name].state in ("cold", "failed")
        self.feed(learning.LoadStarted(name, self.now))
        self.log.append((self.now, "loading", name))
        self._process[name] += 1
        process = self._process[name]

        def finish() -> None:
            if self._process[name] != process:
                return
            if engine.refuses_load:
                self.feed(learning.LoadFailed(name, self.now, "out of memory"))
            else:
                self.feed(learning.Loaded(name, self.now))
            self._pump()

        self.at(self.now + engine.load, finish)

    def _drain(self, name: str, room_for: str | None = None) -> None:
        assert self.snapshot.tiers[name].state == "ready"
        self.feed(learning.Draining(name, self.now, room_for))
        self.log.append((self.now, "draining", name))
        self._unload_if_idle(name)

    def _unload_if_idle(self, name: str) -> None:
        if self.snapshot.tiers[name].state != "draining" or self.running[name]:
            return

        def gone() -> None:
            self.feed(learning.Unloaded(name, self.now))
            self._pump()

        self.at(self.now + self.engines[name].unload, gone)

    def _start(self, ticket: Ticket, name: str) -> None:
        health = self.snapshot.tiers[name]
        assert health.state == "ready"
        assert self.now >= health.probe_at, "routed to an open circuit"
        assert health.circuit == "closed" or health.in_flight == 0, "more than one probe"
        self.running[name].append(ticket)
        self.feed(learning.Started(name, self.now))
        engine, process, incarnation = self.engines[name], self._process[name], health.incarnation

        def first() -> None:
            if self._process[name] != process:
                return
            if engine.fails:
                self.feed(learning.Failed(name, self.now, incarnation, "status 500"))
                self._finish(ticket, name, None)
                return
            self.feed(learning.FirstToken(name, self.now, self.now - ticket.request.arrived))
            self._pump()
            self.at(self.now + engine.duration, last)

        def last() -> None:
            if self._process[name] != process:
                return
            if engine.breaks_off:
                self.feed(learning.Failed(name, self.now, incarnation, "disconnected"))
                self._finish(ticket, name, f"broken@{name}")
                return
            self.feed(learning.Answered(name, self.now, engine.duration / 20))
            self._finish(ticket, name, f"answered@{name}")

        self.at(self.now + engine.ttft, first)

    def _finish(self, ticket: Ticket, name: str, outcome: str | None) -> None:
        self.running[name].remove(ticket)
        self.feed(learning.Ended(name, self.now))
        if outcome is None:
            ticket.tried.append(name)
            self.waiting.append(ticket)
        else:
            self._end(ticket, outcome)
        self._unload_if_idle(name)
        self._pump()

    def _end(self, ticket: Ticket, outcome: str, status: int = 200) -> None:
        assert ticket.outcome is None, "ended twice"
        ticket.outcome, ticket.ended, ticket.status = outcome, self.now, status

    def crash(self, name: str, restart: float = 1.0) -> None:
        """The process of a tier dies now, with all it was doing, and is started again."""
        if self.snapshot.tiers[name].state != "ready":
            return
        self._process[name] += 1
        process = self._process[name]
        incarnation = self.snapshot.tiers[name].incarnation
        self.feed(learning.Crashed(name, self.now, "killed"))
        for ticket in list(self.running[name]):
            self.feed(learning.Failed(name, self.now, incarnation, "disconnected"))
            self._finish(ticket, name, None)

        def back() -> None:
            if self._process[name] == process:
                self.feed(learning.Loaded(name, self.now))
                self._pump()

        self.at(self.now + restart, back)
