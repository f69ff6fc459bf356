"""What an event teaches: the snapshot after it. Pure; circuits and levels are kept here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    "changes",
    "initial",
    "observe",
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
    """Bytes that the engine's processes really hold."""

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
    return Snapshot(now, tiers, levels, policy.memory_budget)


def observe(policy: Policy, snapshot: Snapshot, event: Event) -> Snapshot:
    """The snapshot after ``event``."""
    if isinstance(event, Tick):
        return _tick(policy, snapshot, event)
    tier = policy.tiers[event.tier]
    health = _HANDLERS[type(event)](policy.models[tier.model].settings, tier, snapshot.tiers[event.tier], event)
    now = max(snapshot.now, event.now)
    snapshot = replace(snapshot, now=now, tiers={**snapshot.tiers, event.tier: health})
    if isinstance(event, Draining) and event.room_for is not None:
        return replace(snapshot, reserved=event.room_for, reserved_until=now + _RESERVED)
    if isinstance(event, LoadStarted) and snapshot.reserved == event.tier:
        return replace(snapshot, reserved=None)
    return snapshot


def _started(settings: Settings, tier: TierPolicy, health: TierHealth, event: Started) -> TierHealth:
    circuit = "half_open" if health.circuit == "open" else health.circuit
    return replace(health, circuit=circuit, in_flight=health.in_flight + 1, last_used=event.now)


def _first_token(settings: Settings, tier: TierPolicy, health: TierHealth, event: FirstToken) -> TierHealth:
    # A probe's first token lets the others in; failures are forgotten only when an answer is complete, so that an
    # engine that breaks off every answer is found out.
    circuit = "closed" if health.circuit == "half_open" else health.circuit
    ttft = _average(health.ewma_ttft, event.seconds)
    return replace(health, circuit=circuit, ewma_ttft=ttft, measured_at=event.now)


def _answered(settings: Settings, tier: TierPolicy, health: TierHealth, event: Answered) -> TierHealth:
    if event.itl is not None:
        health = replace(health, ewma_itl=_average(health.ewma_itl, event.itl), measured_at=event.now)
    if health.circuit == "open":  # of a request from before it opened
        return health
    return replace(health, circuit="closed", consecutive_failures=0, openings=0, cooldown=0.0, reason="")


def _failed(settings: Settings, tier: TierPolicy, health: TierHealth, event: Failed) -> TierHealth:
    if event.incarnation != health.incarnation or health.state not in ("ready", "draining"):
        return health  # a process that is gone: its end was counted once, by Crashed
    return _count_failure(settings, health, event.now, event.reason)


def _count_failure(settings: Settings, health: TierHealth, now: float, reason: str) -> TierHealth:
    if health.circuit == "open":
        return health
    health = replace(health, consecutive_failures=health.consecutive_failures + 1, reason=reason)
    if health.circuit == "half_open" or health.consecutive_failures >= settings.failures:
        return _open(settings, health, now, settings.cooldown)
    return health


def _open(settings: Settings, health: TierHealth, now: float, cooldown: float) -> TierHealth:
    cooldown = min(cooldown * 2.0 ** min(health.openings, 30), max(settings.max_cooldown, cooldown))
    return replace(health, circuit="open", opened_at=now, openings=health.openings + 1, cooldown=cooldown)


def _ended(settings: Settings, tier: TierPolicy, health: TierHealth, event: Ended) -> TierHealth:
    return replace(health, in_flight=max(0, health.in_flight - 1), last_used=event.now)


def _load_started(settings: Settings, tier: TierPolicy, health: TierHealth, event: LoadStarted) -> TierHealth:
    return replace(health, state="loading", memory=tier.memory, changed_at=event.now)


def _loaded(settings: Settings, tier: TierPolicy, health: TierHealth, event: Loaded) -> TierHealth:
    return replace(
        health,
        state="ready",
        circuit="closed" if health.circuit == "closed" else "half_open",
        incarnation=health.incarnation + 1,
        last_used=event.now,
        changed_at=event.now,
        ewma_ttft=None,
        ewma_itl=None,
        measured_at=-INFINITY,
    )


def _load_failed(settings: Settings, tier: TierPolicy, health: TierHealth, event: LoadFailed) -> TierHealth:
    health = replace(health, state="failed", memory=0, changed_at=event.now, reason=event.reason)
    return _open(settings, health, event.now, settings.cooldown * _LOAD_COOLDOWN)


def _draining(settings: Settings, tier: TierPolicy, health: TierHealth, event: Draining) -> TierHealth:
    return replace(health, state="draining", changed_at=event.now)


def _unloaded(settings: Settings, tier: TierPolicy, health: TierHealth, event: Unloaded) -> TierHealth:
    return replace(health, state="cold", memory=0, changed_at=event.now)


def _crashed(settings: Settings, tier: TierPolicy, health: TierHealth, event: Crashed) -> TierHealth:
    health = replace(_count_failure(settings, health, event.now, event.reason), reason=event.reason)
    return replace(health, state="loading", changed_at=event.now)


def _measured(settings: Settings, tier: TierPolicy, health: TierHealth, event: Measured) -> TierHealth:
    if health.state in ("cold", "failed"):
        return health
    return replace(health, memory=max(tier.memory, event.memory))


_HANDLERS: Mapping[type, Callable[[Settings, TierPolicy, TierHealth, Any], TierHealth]] = {
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


def _tick(policy: Policy, snapshot: Snapshot, event: Tick) -> Snapshot:
    now = max(snapshot.now, event.now)
    tiers = {
        name: health
        if health.queued == event.queued.get(name, 0)
        else replace(health, queued=event.queued.get(name, 0))
        for name, health in snapshot.tiers.items()
    }
    levels = dict(snapshot.levels)
    for name, model in policy.models.items():
        level = _watch(
            model.settings, levels[name], tiers[model.tiers[levels[name].index]], now, event.oldest.get(name)
        )
        index = _next_index(model.settings, level, model.tiers, tiers, now)
        if index != level.index:
            level = _move(model.settings, level, index, now)
            entered = tiers[model.tiers[index]]
            tiers[model.tiers[index]] = replace(entered, ewma_ttft=None, ewma_itl=None, measured_at=-INFINITY)
        levels[name] = level
    draining = any(health.state == "draining" for health in tiers.values())
    until = now + _RESERVED if draining and now < snapshot.reserved_until else snapshot.reserved_until
    return replace(snapshot, now=now, tiers=tiers, levels=levels, reserved_until=until)


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


@dataclass(frozen=True, slots=True)
class Change:
    """Something for the log and the metrics: ``event`` of :class:`lowbit.gateway.protocol.PoolListener`."""

    event: str
    tier: str
    details: Mapping[str, Any]


def changes(policy: Policy, before: Snapshot, after: Snapshot) -> list[Change]:
    """What became different between two snapshots, of what people want to hear about."""
    found = []
    for name, new in after.tiers.items():
        old = before.tiers[name]
        if old is new or old.circuit == new.circuit:
            continue
        if new.circuit == "open":
            details = {"reason": new.reason, "failures": new.consecutive_failures, "cooldown": new.cooldown}
            found.append(Change("circuit_opened", name, details))
        elif new.circuit == "closed":
            found.append(Change("circuit_closed", name, {}))
    for name, level in after.levels.items():
        old_index = before.levels[name].index
        if level.index != old_index:
            tiers = policy.models[name].tiers
            event = "degraded" if level.index > old_index else "recovered"
            found.append(Change(event, tiers[level.index], {"from": tiers[old_index], "model": name}))
    return found
