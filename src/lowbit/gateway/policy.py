"""The data of the serving policy: what is fixed, what changes, what is asked and what is answered.

The policy itself is three functions. :func:`lowbit.gateway.routing.decide` for a request and
:func:`lowbit.gateway.routing.maintain` for the background change nothing; :func:`lowbit.gateway.learning.learn` changes
the snapshot by what an event teaches. No clock, no input or output, no chance: the time is in the snapshot and in each
event. The pool does nothing but carry events and decisions, so that a simulation that does the same tests exactly what
runs.

The rules, from the four services that people write by hand:

- *which tier*: named, or required (precision, memory limit, speed), or by the model's order from its present level;
- *fallback*: a circuit that opened is passed over until its cool-down ends; then one request probes it;
- *degradation*: the level of a model steps down while its objectives are missed, and climbs back (``learning``);
- *memory*: a tier is loaded only where it fits, into host memory and into each GPU's; the least recently used idle
  tiers that hold what is short make room, a busy one is drained only for a request that has waited for ``patience``
  seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import Literal, TypeAlias

from lowbit.gateway.room import Room, added

__all__ = [
    "Circuit",
    "Decision",
    "Level",
    "Load",
    "ModelPolicy",
    "Policy",
    "Precision",
    "Queue",
    "Reject",
    "Request",
    "Route",
    "Settings",
    "Snapshot",
    "TierHealth",
    "TierPolicy",
    "TierState",
]

TierState: TypeAlias = Literal["cold", "loading", "ready", "draining", "failed"]
Circuit: TypeAlias = Literal["closed", "open", "half_open"]
Precision: TypeAlias = Literal["high", "medium", "low"]

INFINITY = float("inf")


@dataclass(frozen=True, slots=True)
class TierPolicy:
    """What is fixed about one tier.

    ``id`` is ``model@tier``; ``bits`` of its weights (16, 8, 4 …); ``memory`` the bytes of host memory it takes when
    loaded, 0 for an engine elsewhere, and ``gpu_memory`` those of each GPU by number; ``concurrency`` the requests it
    answers at a time; ``kl`` its measured divergence from the original in nats per token, None where nobody measured;
    ``remote`` engines are always there: neither loaded nor evicted.
    """

    id: str
    model: str
    name: str
    bits: float = 16.0
    memory: int = 0
    concurrency: int = 4
    kl: float | None = None
    pinned: bool = False
    remote: bool = False
    gpu_memory: tuple[int, ...] = ()

    @property
    def room(self) -> Room:
        """Bytes by pool: host, then each GPU."""
        return (self.memory, *self.gpu_memory)

    @property
    def footprint(self) -> int:
        """Bytes in all pools together."""
        return self.memory + sum(self.gpu_memory)

    @property
    def precision(self) -> Precision:
        """The class of precision: high from 16 bits, medium from 8, else low."""
        return "high" if self.bits >= 16 else "medium" if self.bits >= 8 else "low"


@dataclass(frozen=True, slots=True)
class Settings:
    """The numbers of a model's policy; seconds, and a share where nothing else is said.

    ``failures``         consecutive failures that open a circuit
    ``cooldown``         until an open circuit is probed; doubles with each opening in a row, up to ``max_cooldown``
    ``ttft``, ``itl``    objectives for time to first token and inter-token latency; None: none
    ``degrade_after``    time that an objective must be missed before the level steps down
    ``recover_after``    time that objectives must be met, with ``margin``, before it climbs
    ``dwell``            least time between two changes of level; doubles when a climb fails, up to ``max_dwell``
    ``margin``           share of an objective under which it counts as met with ease
    ``idle_unload``      unused for so long, a tier that is not pinned is unloaded; None: never
    ``patience``         wait after which a busy tier of another model is drained to make room
    ``grace``            time since its last use for which a tier is not evicted, short of patience
    ``attempts``         engines asked at most for one request, the first included
    """

    failures: int = 3
    cooldown: float = 10.0
    max_cooldown: float = 300.0
    ttft: float | None = None
    itl: float | None = None
    degrade_after: float = 10.0
    recover_after: float = 60.0
    dwell: float = 30.0
    max_dwell: float = 600.0
    margin: float = 0.7
    idle_unload: float | None = None
    patience: float = 5.0
    grace: float = 2.0
    attempts: int = 3


@dataclass(frozen=True, slots=True)
class ModelPolicy:
    """A model: its tiers' ids in order of preference, and its settings."""

    name: str
    tiers: tuple[str, ...]
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True, slots=True)
class Policy:
    """All that is fixed: tiers by id, models by name, bytes that loaded tiers share: of host memory, of each GPU."""

    tiers: Mapping[str, TierPolicy]
    models: Mapping[str, ModelPolicy]
    memory_budget: int
    gpu_budgets: tuple[int, ...] = ()

    @property
    def room(self) -> Room:
        """Bytes by pool: host, then each GPU."""
        return (self.memory_budget, *self.gpu_budgets)


@dataclass(slots=True)
class TierHealth:
    """What is known of one tier at a moment. Changed in place, four times for each request: a copy would cost more than
    the rest of the policy.

    ``memory`` and ``gpu_memory`` are what it holds now, of the host and of each GPU (reserved from the start of loading
    until the process is gone), ``resident`` what its processes were last measured to hold of the host's (0: not yet);
    ``openings`` counts openings of the circuit without a success between them; ``cooldown`` is the present cool-down;
    averages are exponential, in seconds, None until measured; ``measured_at`` is when they were last fed;
    ``incarnation`` counts its processes; ``changed_at`` is when ``state`` last changed.
    """

    state: TierState = "cold"
    circuit: Circuit = "closed"
    consecutive_failures: int = 0
    opened_at: float = -INFINITY
    openings: int = 0
    cooldown: float = 0.0
    in_flight: int = 0
    queued: int = 0
    memory: int = 0
    resident: int = 0
    ewma_ttft: float | None = None
    ewma_itl: float | None = None
    measured_at: float = -INFINITY
    last_used: float = -INFINITY
    pinned: bool = False
    incarnation: int = 0
    changed_at: float = -INFINITY
    reason: str = ""
    gpu_memory: tuple[int, ...] = ()

    @property
    def room(self) -> Room:
        """Bytes by pool: host, then each GPU."""
        return (self.memory, *self.gpu_memory)

    @property
    def probe_at(self) -> float:
        """When an open circuit may be probed; -inf where it is not open."""
        return self.opened_at + self.cooldown if self.circuit == "open" else -INFINITY


@dataclass(frozen=True, slots=True)
class Level:
    """How far a model has stepped down: ``index`` into its order, when that changed, and since when objectives are
    missed or met with ease (None: they are not). ``dwell`` is the time it stays at least; ``climbed`` says whether the
    last change was a climb. ``oldest_wait`` is when the oldest request still without a token arrived.
    """

    index: int = 0
    changed_at: float = -INFINITY
    missed_since: float | None = None
    met_since: float | None = None
    dwell: float = 0.0
    climbed: bool = False
    oldest_wait: float | None = None


_HEALTH = attrgetter(*(item.name for item in fields(TierHealth)))


@dataclass(slots=True)
class Snapshot:
    """Everything that changes: the time, the health of each tier by id, the level of each model by name.

    While tiers are drained to make room for ``reserved``, until ``reserved_until``, the memory is kept for it.
    """

    now: float
    tiers: dict[str, TierHealth]
    levels: dict[str, Level]
    memory_budget: int
    reserved: str | None = None
    reserved_until: float = -INFINITY
    gpu_budgets: tuple[int, ...] = ()

    def copy(self, now: float) -> Snapshot:
        """The same at ``now``, for keeping."""
        tiers = {name: TierHealth(*_HEALTH(health)) for name, health in self.tiers.items()}
        return replace(self, now=now, tiers=tiers, levels=dict(self.levels))

    @property
    def memory(self) -> int:
        """Bytes of host memory held by all tiers."""
        return sum(health.memory for health in self.tiers.values())

    @property
    def held(self) -> Room:
        """Bytes held by all tiers in each pool: host, then each GPU."""
        return added([health.room for health in self.tiers.values()])


@dataclass(frozen=True, slots=True)
class Request:
    """What a client wants. ``tier`` names one; else ``precision`` is the least it takes, ``memory_limit`` the most
    bytes the tier may hold in all, ``speed`` prefers the fastest. ``priority``: higher goes first; waiting raises it.
    ``arrived`` and ``deadline`` are times on the snapshot's clock; ``tokens_estimate`` covers prompt and answer;
    ``stream`` says whether a first token will be seen before the whole answer.
    """

    model: str
    tier: str | None = None
    precision: Precision | None = None
    memory_limit: int | None = None
    speed: bool = False
    priority: int = 0
    tokens_estimate: int = 0
    arrived: float = 0.0
    deadline: float = INFINITY
    stream: bool = True


@dataclass(frozen=True, slots=True)
class Route:
    """Send it to this tier now."""

    tier: str


@dataclass(frozen=True, slots=True)
class Load:
    """Load this tier, after draining those in ``evict``; while there are any, ask again when they are gone."""

    tier: str
    evict: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Queue:
    """Nothing to do yet: ask again at the next event, or at ``until`` if none comes. ``tier`` is the one waited for."""

    until: float
    tier: str | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """An answer to the client: HTTP status, code in OpenAI's error shape, message, seconds to wait or None."""

    status: int
    code: str
    message: str
    retry_after: float | None = None


Decision: TypeAlias = Route | Load | Queue | Reject
