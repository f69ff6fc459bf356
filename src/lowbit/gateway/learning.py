"""What an event teaches: circuits and levels are kept here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from lowbit.gateway.policy import INFINITY, Level, Policy, Settings, Snapshot, TierHealth, TierPolicy

__all__ = [
    "Answered",
    "Change",
    "Crashed",
    "Draining",
    "Ended",
    "Event",
    "Failed",
    "FirstToken",
    "LoadFailed",
    "LoadStarted",
    "Loaded",
    "Measured",
    "Started",
    "Tick",
    "Unloaded",
    "initial",
    "learn",
]

_SMOOTHING = 0.3
_RESERVED = 2.0
"""Seconds for which memory is kept for the tier that others were drained for, once they are gone."""
_LOAD_COOLDOWN = 3.0
"""A load that failed is tried again after so many times the cool-down: it costs more than a request."""


@dataclass(frozen=True, slots=True)
class _TierEvent:
    """Something that happened to a tier at a time."""

    tier: str
    now: float


@dataclass(frozen=True, slots=True)
class Started(_TierEvent):
    """A request went to the tier; it ends with exactly one :class:`Ended`."""


@dataclass(frozen=True, slots=True)
class FirstToken(_TierEvent):
    """The first token of an answer came ``seconds`` after the request arrived here."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Answered(_TierEvent):
    """An answer is complete; ``itl`` is its mean time between tokens, None for fewer than two."""

    itl: float | None = None


@dataclass(frozen=True, slots=True)
class Failed(_TierEvent):
    """The engine failed a request that it had been given in its ``incarnation``."""

    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Ended(_TierEvent):
    """A place came free."""


@dataclass(frozen=True, slots=True)
class LoadStarted(_TierEvent):
    """An engine is being started; its memory counts from now on."""


@dataclass(frozen=True, slots=True)
class Loaded(_TierEvent):
    """The engine is up and has answered its warm-up."""


@dataclass(frozen=True, slots=True)
class LoadFailed(_TierEvent):
    """It did not come up, and no process is left."""

    reason: str


@dataclass(frozen=True, slots=True)
class Draining(_TierEvent):
    """It gets no more requests and ends when those it has are answered; what it frees is kept for ``room_for``."""

    room_for: str | None = None


@dataclass(frozen=True, slots=True)
class Unloaded(_TierEvent):
    """Its process is gone."""


@dataclass(frozen=True, slots=True)
class Crashed(_TierEvent):
    """Its process ended by itself, or was ended because it hung, and is being started again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Measured(_TierEvent):
    """Bytes of host memory that the engine's processes really hold."""

    memory: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time went by: requests waiting for each tier, and when each model's oldest request without a token arrived."""

    now: float
    queued: Mapping[str, int]
    oldest: Mapping[str, float]


Event: TypeAlias = (
    Started
    | FirstToken
    | Answered
    | Failed
    | Ended
    | LoadStarted
    | Loaded
    | LoadFailed
    | Draining
    | Unloaded
    | Crashed
    | Measured
    | Tick
)


def initial(policy: Policy, now: float) -> Snapshot:
    """Nothing loaded, nothing known; engines elsewhere count as ready."""
    tiers = {
        tier.id: TierHealth(state="ready" if tier.remote else "cold", pinned=tier.pinned)
        for tier in policy.tiers.values()
    }
    levels = {name: Level(dwell=model.settings.dwell) for name, model in policy.models.items()}
    return Snapshot(now, tiers, levels, policy.memory_budget, gpu_budgets=policy.gpu_budgets)


@dataclass(frozen=True, slots=True)
class Change:
    """Something for the log and the metrics: ``event`` of :class:`lowbit.gateway.protocol.PoolListener`."""

    event: str
    tier: str
    details: Mapping[str, Any]


def learn(policy: Policy, snapshot: Snapshot, event: Event) -> Sequence[Change]:
    """Bring ``snapshot`` up to date with ``event``; what became different of what people want to hear about."""
    if isinstance(event, Tick):
        return _tick(policy, snapshot, event)
    tier = policy.tiers[event.tier]
    health = snapshot.tiers[event.tier]
    circuit = health.circuit
    _HANDLERS[type(event)](policy.models[tier.model].settings, tier, health, event)
    if event.now > snapshot.now:
        snapshot.now = event.now
    if isinstance(event, Draining) and event.room_for is not None:
        snapshot.reserved, snapshot.reserved_until = event.room_for, snapshot.now + _RESERVED
    elif isinstance(event, LoadStarted) and snapshot.reserved == event.tier:
        snapshot.reserved = None
    return () if health.circuit == circuit else _circuit_changed(event.tier, health)


def _circuit_changed(tier: str, health: TierHealth) -> Sequence[Change]:
    if health.circuit == "closed":
        return (Change("circuit_closed", tier, {}),)
    if health.circuit == "half_open":
        return ()
    details = {"reason": health.reason, "failures": health.consecutive_failures, "cooldown": health.cooldown}
    return (Change("circuit_opened", tier, details),)


def _started(settings: Settings, tier: TierPolicy, health: TierHealth, event: Started) -> None:
    if health.circuit == "open":
        health.circuit = "half_open"
    health.in_flight += 1
    health.last_used = event.now


def _first_token(settings: Settings, tier: TierPolicy, health: TierHealth, event: FirstToken) -> None:
    # A probe's first token lets the others in; failures are forgotten only when an answer is complete, so that an
    # engine that breaks off every answer is found out.
    if health.circuit == "half_open":
        health.circuit = "closed"
    health.ewma_ttft = _average(health.ewma_ttft, event.seconds)
    health.measured_at = event.now


def _answered(settings: Settings, tier: TierPolicy, health: TierHealth, event: Answered) -> None:
    if event.itl is not None:
        health.ewma_itl = _average(health.ewma_itl, event.itl)
        health.measured_at = event.now
    if health.circuit == "open":  # of a request from before it opened
        return
    health.circuit, health.reason = "closed", ""
    health.consecutive_failures = health.openings = 0
    health.cooldown = 0.0


def _failed(settings: Settings, tier: TierPolicy, health: TierHealth, event: Failed) -> None:
    # of a process that is gone nothing is counted: its end was, once, by Crashed
    if event.incarnation == health.incarnation and health.state in ("ready", "draining"):
        _count_failure(settings, health, event.now, event.reason)


def _count_failure(settings: Settings, health: TierHealth, now: float, reason: str) -> None:
    if health.circuit == "open":
        return
    health.consecutive_failures += 1
    health.reason = reason
    if health.circuit == "half_open" or health.consecutive_failures >= settings.failures:
        _open(settings, health, now, settings.cooldown)


def _open(settings: Settings, health: TierHealth, now: float, cooldown: float) -> None:
    health.circuit, health.opened_at = "open", now
    health.cooldown = min(cooldown * 2.0 ** min(health.openings, 30), max(settings.max_cooldown, cooldown))
    health.openings += 1


def _ended(settings: Settings, tier: TierPolicy, health: TierHealth, event: Ended) -> None:
    health.in_flight = max(0, health.in_flight - 1)
    health.last_used = event.now


def _load_started(settings: Settings, tier: TierPolicy, health: TierHealth, event: LoadStarted) -> None:
    health.state, health.changed_at = "loading", event.now
    health.memory, health.gpu_memory, health.resident = tier.memory, tier.gpu_memory, 0


def _loaded(settings: Settings, tier: TierPolicy, health: TierHealth, event: Loaded) -> None:
    health.state, health.changed_at, health.last_used = "ready", event.now, event.now
    if health.circuit == "open":
        health.circuit = "half_open"
    health.incarnation += 1
    _forget_speed(health)


def _forget_speed(health: TierHealth) -> None:
    health.ewma_ttft = health.ewma_itl = None
    health.measured_at = -INFINITY


def _load_failed(settings: Settings, tier: TierPolicy, health: TierHealth, event: LoadFailed) -> None:
    health.state, health.changed_at, health.reason = "failed", event.now, event.reason
    health.memory, health.gpu_memory, health.resident = 0, (), 0
    _open(settings, health, event.now, settings.cooldown * _LOAD_COOLDOWN)


def _draining(settings: Settings, tier: TierPolicy, health: TierHealth, event: Draining) -> None:
    health.state, health.changed_at = "draining", event.now


def _unloaded(settings: Settings, tier: TierPolicy, health: TierHealth, event: Unloaded) -> None:
    health.state, health.changed_at = "cold", event.now
    health.memory, health.gpu_memory, health.resident = 0, (), 0


def _crashed(settings: Settings, tier: TierPolicy, health: TierHealth, event: Crashed) -> None:
    _count_failure(settings, health, event.now, event.reason)
    health.state, health.changed_at, health.reason = "loading", event.now, event.reason
    health.resident = 0


def _measured(settings: Settings, tier: TierPolicy, health: TierHealth, event: Measured) -> None:
    if health.state not in ("cold", "failed"):
        health.resident = event.memory
        health.memory = max(tier.memory, event.memory)


_HANDLERS: Mapping[type, Callable[[Settings, TierPolicy, TierHealth, Any], None]] = {
    Started: _started,
    FirstToken: _first_token,
    Answered: _answered,
    Failed: _failed,
    Ended: _ended,
    LoadStarted: _load_started,
    Loaded: _loaded,
    LoadFailed: _load_failed,
    Draining: _draining,
    Unloaded: _unloaded,
    Crashed: _crashed,
    Measured: _measured,
}


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + _SMOOTHING * (new - old)


def _tick(policy: Policy, snapshot: Snapshot, event: Tick) -> Sequence[Change]:
    now = snapshot.now = max(snapshot.now, event.now)
    tiers, changes = snapshot.tiers, []
    for name, health in tiers.items():
        health.queued = event.queued.get(name, 0)
    for name, model in policy.models.items():
        before = snapshot.levels[name]
        level = _watch(model.settings, before, tiers[model.tiers[before.index]], now, event.oldest.get(name))
        index = _next_index(model.settings, level, model.tiers, tiers, now)
        if index != level.index:
            level = _move(model.settings, level, index, now)
            _forget_speed(tiers[model.tiers[index]])
            kind = "degraded" if index > before.index else "recovered"
            details = {"from": model.tiers[before.index], "model": name}
            changes.append(Change(kind, model.tiers[index], details))
        snapshot.levels[name] = level
    if now < snapshot.reserved_until and any(health.state == "draining" for health in tiers.values()):
        snapshot.reserved_until = now + _RESERVED
    return changes


def _watch(settings: Settings, level: Level, health: TierHealth, now: float, oldest: float | None) -> Level:
    """The level with its times since objectives are missed, or met with ease; neither while its tier is not ready."""
    level = replace(level, oldest_wait=oldest)
    if health.state != "ready":
        return replace(level, missed_since=None, met_since=None)
    fresh = now - health.measured_at <= 2 * settings.degrade_after
    worst = 0.0
    if settings.ttft:
        worst = max(worst, (now - oldest if oldest is not None else 0.0) / settings.ttft)
        worst = max(worst, (health.ewma_ttft or 0.0) / settings.ttft if fresh else 0.0)
    if settings.itl and fresh:
        worst = max(worst, (health.ewma_itl or 0.0) / settings.itl)
    missed = (level.missed_since if level.missed_since is not None else now) if worst > 1 else None
    met = (level.met_since if level.met_since is not None else now) if worst <= settings.margin else None
    return replace(level, missed_since=missed, met_since=met)


def _next_index(
    settings: Settings, level: Level, order: tuple[str, ...], tiers: Mapping[str, TierHealth], now: float
) -> int:
    """Where the level should be: one step down, one step up, or where it is."""
    held = now - level.changed_at
    if level.missed_since is not None and now - level.missed_since >= settings.degrade_after and held >= settings.dwell:
        lower = (index for index in range(level.index + 1, len(order)) if tiers[order[index]].circuit == "closed")
        return next(lower, level.index)
    at_ease = level.met_since is not None and now - level.met_since >= settings.recover_after
    if level.index and at_ease and held >= level.dwell and tiers[order[level.index - 1]].circuit != "open":
        return level.index - 1
    return level.index


def _move(settings: Settings, level: Level, index: int, now: float) -> Level:
    """The level after a step. A climb that had to be taken back soon makes the next one wait twice as long."""
    down = index > level.index
    dwell = level.dwell
    if down:
        in_vain = level.climbed and now - level.changed_at < 2 * level.dwell + settings.degrade_after
        dwell = min(2 * level.dwell, max(settings.max_dwell, settings.dwell)) if in_vain else settings.dwell
    return Level(index, now, dwell=dwell, climbed=not down, oldest_wait=level.oldest_wait)
