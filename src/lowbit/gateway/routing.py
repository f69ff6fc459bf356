"""Which tier answers a request, what is loaded and what makes room: pure decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lowbit.gateway.policy import (
    INFINITY,
    Decision,
    Load,
    ModelPolicy,
    Policy,
    Queue,
    Reject,
    Request,
    Route,
    Snapshot,
    TierHealth,
    TierPolicy,
)
from lowbit.gateway.room import Room, added, beyond, fits, pool_name, taken

__all__ = ["Action", "Unload", "decide", "maintain", "serving_order", "urgency"]

_BITS = {"high": 16.0, "medium": 8.0, "low": 0.0}
_ASK_AGAIN = 1.0
_AGING = 10.0
_ACTIVE = 60.0


@dataclass(frozen=True, slots=True)
class Unload:
    """Drain this tier and end its engine."""

    tier: str
    reason: str


Action: TypeAlias = Load | Unload


def urgency(request: Request, now: float) -> tuple[float, float]:
    """Sort key of waiting requests: priority plus one for every 10 s of waiting, then age; smallest goes first."""
    return -(request.priority + (now - request.arrived) / _AGING), request.arrived


def decide(policy: Policy, snapshot: Snapshot, request: Request, tried: Sequence[str] = ()) -> Decision:
    """What to do with ``request`` now, after the tiers in ``tried`` (with repetitions) have failed it.

    A tier that is ready and has a place wins over one that would have to be loaded; a tier that is ready and full is
    waited for (that objectives are missed is the level's affair, not a request's). When every tier has failed it once,
    one whose circuit still stands is asked again, up to ``attempts``: an engine that crashed may be back.
    """
    now = snapshot.now
    model = policy.models.get(request.model)
    if model is None:
        return Reject(404, "model_not_found", f"no model {request.model!r} is served here")
    if now >= request.deadline:
        return Reject(503, "timeout", f"model {model.name!r}: no place came free before the deadline", _ASK_AGAIN)
    wanted = _wanted(policy, snapshot, model, request)
    if isinstance(wanted, Reject):
        return wanted
    if len(tried) >= model.settings.attempts:
        return Reject(502, "engine_failed", f"model {model.name!r}: {len(tried)} attempts failed", _ASK_AGAIN)
    left = [tier for tier in wanted if tier.id not in tried] or wanted
    usable = [tier for tier in left if now >= snapshot.tiers[tier.id].probe_at]
    if not usable:
        wait = min(snapshot.tiers[tier.id].probe_at for tier in left) - now
        reasons = "; ".join(f"{tier.name}: {snapshot.tiers[tier.id].reason or 'failing'}" for tier in left)
        return Reject(503, "engine_unavailable", f"model {model.name!r} is unavailable ({reasons})", max(wait, 0.1))
    return _choose(policy, snapshot, model, request, usable)


def _choose(
    policy: Policy, snapshot: Snapshot, model: ModelPolicy, request: Request, usable: Sequence[TierPolicy]
) -> Decision:
    """A place in the first tier that has one, or else how to get one."""
    again = min(snapshot.now + _ASK_AGAIN, request.deadline)
    waiting: str | None = None
    for tier in usable:
        health = snapshot.tiers[tier.id]
        if health.state == "ready":
            if not _busy_probe(health) and health.in_flight < tier.concurrency:
                return Route(tier.id)
            waiting = waiting or tier.id
            if health.circuit == "closed" and not request.speed:
                break
    if waiting is not None:
        return Queue(again, waiting)
    for tier in usable:
        if snapshot.tiers[tier.id].state in ("loading", "draining"):
            return Queue(again, tier.id)
    waited = snapshot.now - request.arrived
    first = usable[0]
    answer = _make_room(policy, snapshot, first, waited, model.settings.patience, model.settings.grace)
    return Queue(min(answer.until, request.deadline), first.id) if isinstance(answer, Queue) else answer


def _busy_probe(health: TierHealth) -> bool:
    """Whether the one request that probes a circuit is under way."""
    return health.circuit != "closed" and health.in_flight > 0


def serving_order(snapshot: Snapshot, model: ModelPolicy) -> tuple[str, ...]:
    """The model's tiers from its present level down, then those above it, nearest first."""
    level = snapshot.levels[model.name].index
    return model.tiers[level:] + model.tiers[:level][::-1]


def _wanted(policy: Policy, snapshot: Snapshot, model: ModelPolicy, request: Request) -> list[TierPolicy] | Reject:
    """The tiers that satisfy the request and can ever be loaded, best first; or why there is none."""
    tiers = [policy.tiers[name] for name in serving_order(snapshot, model)]
    names = ", ".join(policy.tiers[name].name for name in model.tiers)
    if request.tier is not None:
        tiers = [tier for tier in tiers if tier.name == request.tier]
        if not tiers:
            return Reject(404, "model_not_found", f"model {model.name!r} has no tier {request.tier!r}, only {names}")
    if request.precision is not None:
        least = _BITS[request.precision]
        tiers = sorted((tier for tier in tiers if tier.bits >= least), key=lambda tier: tier.bits)
        if not tiers:
            return Reject(
                400,
                "precision_unavailable",
                f"model {model.name!r} has no tier of {request.precision} precision: {names}",
            )
    if request.memory_limit is not None:
        tiers = [tier for tier in tiers if tier.footprint <= request.memory_limit]
        if not tiers:
            least_memory = min(policy.tiers[name].footprint for name in model.tiers)
            return Reject(
                400,
                "memory_limit",
                f"model {model.name!r}: no tier within {request.memory_limit} bytes; the smallest takes {least_memory}",
            )
    if request.speed:
        tiers.sort(key=lambda tier: _speed(snapshot.tiers[tier.id], tier))
    possible = [tier for tier in tiers if _fits_ever(policy, tier)]
    if not possible:
        return Reject(503, "insufficient_memory", _lack(policy, model, min(tiers, key=lambda tier: tier.footprint)))
    return possible


def _lack(policy: Policy, model: ModelPolicy, tier: TierPolicy) -> str:
    """Why a tier can never be loaded."""
    free = taken(policy.room, _fixed(policy, tier))
    pool = beyond(tier.room, free)[0]
    budget = policy.room[pool] if pool < len(policy.room) else 0
    what = f"model {model.name!r} needs {tier.room[pool]} bytes of {pool_name(pool)}, there are {budget}"
    return what if pool >= len(free) or free[pool] == budget else f"{what}, {budget - free[pool]} of them pinned"


def _speed(health: TierHealth, tier: TierPolicy) -> tuple[bool, float]:
    """Sort key: measured inter-token latency; unmeasured ones after, by bytes, which decoding must read per token."""
    return (health.ewma_itl is None, health.ewma_itl if health.ewma_itl is not None else float(tier.footprint))


def _fits_ever(policy: Policy, tier: TierPolicy) -> bool:
    """Whether the tier fits beside everything that is never evicted."""
    return tier.remote or fits(tier.room, taken(policy.room, _fixed(policy, tier)))


def _fixed(policy: Policy, tier: TierPolicy) -> Room:
    """What a tier can never have; pinned ones fit together, which was checked at the start."""
    if tier.pinned:
        return ()
    return added([other.room for other in policy.tiers.values() if other.pinned])


def _make_room(
    policy: Policy,
    snapshot: Snapshot,
    tier: TierPolicy,
    waited: float,
    patience: float,
    grace: float,
    among: Sequence[str] | None = None,
) -> Load | Queue:
    """Load ``tier``, evicting the least recently used where it does not fit; or wait until that may be done.

    Idle tiers go when they have been unused for ``grace`` seconds, or the request has waited for ``patience``; busy
    ones then too, if they had as long a turn themselves, so that two models that do not fit together take turns. Those
    that hold nothing of what is short stay. ``among`` limits the victims.
    """
    now = snapshot.now
    free = taken(policy.room, snapshot.held)
    if snapshot.reserved not in (None, tier.id) and now < snapshot.reserved_until:
        rest = taken(free, policy.tiers[str(snapshot.reserved)].room)
        return Load(tier.id) if fits(tier.room, rest) else Queue(now + _ASK_AGAIN, tier.id)
    if fits(tier.room, free):
        return Load(tier.id)
    free = added([free, *(health.room for health in snapshot.tiers.values() if health.state == "draining")])
    if fits(tier.room, free):
        return Queue(now + _ASK_AGAIN, tier.id)
    patient = waited < patience
    victims: list[str] = []
    for name in sorted(snapshot.tiers, key=lambda name: _eviction_order(snapshot.tiers[name])):
        health = snapshot.tiers[name]
        if health.state != "ready" or policy.tiers[name].pinned or name == tier.id:
            continue
        if not _holds(health, beyond(tier.room, free)):
            continue
        if among is not None and name not in among:
            continue
        busy = health.in_flight > 0 or health.queued > 0
        if (patient and (busy or now - health.last_used < grace)) or (busy and now - health.changed_at < patience):
            continue
        victims.append(name)
        free = added([free, health.room])
        if fits(tier.room, free):
            return Load(tier.id, _needed(snapshot, victims, tier.room, free))
    if victims and not patient and among is None:
        # the rest will have had its turn soon; to wait for all at once could be to wait for ever
        return Load(tier.id, tuple(victims))
    return Queue(now + min(_ASK_AGAIN, max(patience - waited, 0.05)), tier.id)


def _eviction_order(health: TierHealth) -> tuple[bool, float]:
    return (health.in_flight > 0 or health.queued > 0, health.last_used)


def _holds(health: TierHealth, pools: Sequence[int]) -> bool:
    """Whether a tier holds bytes of one of the pools."""
    room = health.room
    return any(pool < len(room) and room[pool] > 0 for pool in pools)


def _needed(snapshot: Snapshot, victims: Sequence[str], wanted: Room, free: Room) -> tuple[str, ...]:
    """The victims without those whose memory is not needed after all, sparing the most recently used first; ``free``
    counts theirs."""
    kept = []
    for name in reversed(victims):
        without = taken(free, snapshot.tiers[name].room)
        if fits(wanted, without):
            free = without
        else:
            kept.append(name)
    return tuple(reversed(kept))


def maintain(policy: Policy, snapshot: Snapshot) -> tuple[Action, ...]:
    """What to do in the background: load what is pinned and what an active model should be served by, unload the idle.

    Unloading comes first, and loads come one at a time: each changes the memory that the next would count on.
    """
    actions: list[Action] = []
    for tier in policy.tiers.values():
        health = snapshot.tiers[tier.id]
        settings = policy.models[tier.model].settings
        idle = health.state == "ready" and health.in_flight == 0 and health.queued == 0
        if tier.pinned or tier.remote or not idle or settings.idle_unload is None:
            continue
        if snapshot.now - health.last_used >= settings.idle_unload:
            actions.append(Unload(tier.id, f"unused for {settings.idle_unload:g} s"))
    if not actions:
        actions += _over_budget(policy, snapshot)
    if not actions and not any(health.state == "loading" for health in snapshot.tiers.values()):
        loads = (_background_load(policy, snapshot, model) for model in policy.models.values())
        actions += [load for load in loads if load is not None][:1]
    return tuple(actions)


def _over_budget(policy: Policy, snapshot: Snapshot) -> list[Action]:
    """Unload the least recently used idle tiers while engines hold more than they were planned to."""
    going = added([health.room for health in snapshot.tiers.values() if health.state == "draining"])
    excess = taken(taken(snapshot.held, policy.room), going)
    actions: list[Action] = []
    for name in sorted(snapshot.tiers, key=lambda name: snapshot.tiers[name].last_used):
        health = snapshot.tiers[name]
        idle = health.state == "ready" and health.in_flight == 0 and health.queued == 0
        over = [pool for pool, size in enumerate(excess) if size > 0]
        if not over:
            break
        if idle and _holds(health, over) and not policy.tiers[name].pinned:
            actions.append(Unload(name, "engines hold more memory than planned"))
            excess = taken(excess, health.room)
    return actions


def _background_load(policy: Policy, snapshot: Snapshot, model: ModelPolicy) -> Load | None:
    """The pinned tier that is missing, or the one of the present level if the model is active and it is not there.

    The latter makes room only among the model's other tiers, and never for one whose last load failed: what works is
    not given up for what may not.
    """
    now, settings = snapshot.now, model.settings
    for name in model.tiers:
        if policy.tiers[name].pinned and _loadable(snapshot.tiers[name], now):
            answer = _make_room(policy, snapshot, policy.tiers[name], INFINITY, 0.0, 0.0)
            return answer if isinstance(answer, Load) else None
    last = max(snapshot.tiers[name].last_used for name in model.tiers)
    tier = policy.tiers[model.tiers[snapshot.levels[model.name].index]]
    health = snapshot.tiers[tier.id]
    if now - last > _ACTIVE or not _loadable(health, now) or not _fits_ever(policy, tier):
        return None
    if settings.idle_unload is not None and now - last >= settings.idle_unload:
        return None
    among = model.tiers if health.openings == 0 else ()
    absent = now - max(snapshot.levels[model.name].changed_at, health.changed_at, health.probe_at)
    answer = _make_room(policy, snapshot, tier, absent, settings.dwell, settings.grace, among)
    return answer if isinstance(answer, Load) else None


def _loadable(health: TierHealth, now: float) -> bool:
    return health.state in ("cold", "failed") and now >= health.probe_at
