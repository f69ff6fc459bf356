"""What the routes need of a pool of engines: the pool itself and the fakes of tests both satisfy it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from lowbit.gateway.policy import Request, Snapshot

if TYPE_CHECKING:
    from aiohttp import ClientSession

__all__ = ["EngineInfo", "Failure", "Lease", "ModelInfo", "PoolListener", "PoolProtocol", "RefusedError", "TierInfo"]

Failure: TypeAlias = Literal["connect", "disconnected", "status", "timeout", "garbage", "cancelled"]
"""Why an engine did not answer: could not be reached; closed the connection; 5xx; no byte in time; an answer that is
not what the protocol says; the client left (which counts against nobody)."""


class RefusedError(Exception):
    """The policy's refusal of a request, for the client: status, code, message, ``Retry-After`` in seconds or None."""

    def __init__(self, status: int, code: str, message: str, retry_after: float | None = None) -> None:
        self.status, self.code, self.message, self.retry_after = status, code, message, retry_after
        super().__init__(message)


class Lease(Protocol):
    """A place in one engine for one request. :meth:`release` is to be called once, in a ``finally``."""

    @property
    def model(self) -> str:
        """The model's name."""

    @property
    def tier(self) -> str:
        """The tier's name: ``int8``."""

    @property
    def tier_id(self) -> str:
        """``model@tier``: what ``tried`` of :meth:`PoolProtocol.acquire` lists."""

    @property
    def engine(self) -> str:
        """The kind of engine: ``llama.cpp``, ``vllm``, ``encoder``, ``openai`` …"""

    @property
    def base_url(self) -> str:
        """``http://127.0.0.1:41234`` without ``/v1`` and without a slash at the end."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers that the engine wants: ``Authorization`` for one behind a url."""

    @property
    def upstream_model(self) -> str:
        """What the engine calls the model, for the body's ``model``."""

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer that one request may have; None where unknown."""

    @property
    def tools(self) -> bool | None:
        """Whether the model can be told of tools; None where unknown."""

    @property
    def kl(self) -> float | None:
        """Measured KL divergence of the tier from the original, nats per token."""

    @property
    def session(self) -> ClientSession:
        """The client session to ask the engine with (no timeout of its own, connections kept)."""

    def first_token(self, seconds: float) -> None:
        """The first token came, ``seconds`` after the request arrived."""

    def progress(self) -> None:
        """Bytes came: the engine does not hang. Cheap: call it for every chunk."""

    def done(self, tokens: int, seconds: float) -> None:
        """The answer is complete: tokens of it, and seconds from the first to the last."""

    def failed(self, failure: Failure) -> None:
        """The engine did not answer as it should."""

    def release(self) -> None:
        """Give the place back; what was not reported done or failed counts as cancelled. Idempotent."""


@dataclass(frozen=True, slots=True)
class TierInfo:
    """One tier for people and for ``/v1/models``; ``gpu_memory`` are planned bytes of each GPU by number,
    ``tools`` whether the model can be told of tools (None: not known)."""

    id: str
    name: str
    engine: str
    bits: float
    memory: int
    kl: float | None
    context: int | None
    error: float | None = None
    gpu_memory: tuple[int, ...] = ()
    tools: bool | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model: tiers in order of preference, and what else it answers to. ``kind`` says which routes it serves."""

    name: str
    tiers: tuple[TierInfo, ...]
    aliases: tuple[str, ...] = ()
    kind: Literal["chat", "embedding", "rerank"] = "chat"
    created: int = 0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """One engine that runs: for metrics and the status page; ``resident_bytes`` are 0 where not measured yet."""

    tier_id: str
    engine: str
    base_url: str
    pid: int | None
    restarts: int
    resident_bytes: int
    headers: Mapping[str, str] = field(default_factory=dict)


class PoolListener(Protocol):
    """Hears of what happens in the pool, for metrics and logs. ``event`` is one of ``fallback``, ``degraded``,
    ``recovered``, ``circuit_opened``, ``circuit_closed``, ``loading``, ``ready``, ``load_failed``, ``unloaded``,
    ``crashed``, ``hung``, ``restarted``; ``details`` are plain values.
    """

    def __call__(self, event: str, tier_id: str, details: Mapping[str, Any]) -> None:
        """Called in the event loop; must not block."""


class PoolProtocol(Protocol):
    """Engines, and the policy over them."""

    def now(self) -> float:
        """The clock of :class:`Request` and :class:`Snapshot`: monotonic seconds."""

    def snapshot(self) -> Snapshot:
        """The state at this moment."""

    def models(self) -> Sequence[ModelInfo]:
        """All models, in the configuration's order."""

    def resolve(self, name: str) -> tuple[str, str | None]:
        """``assistant@int8``, ``assistant`` or an alias as (model, tier or None).

        Raises :class:`RefusedError` (404, ``model_not_found``) with the nearest name for one that is not there.
        """

    def engines(self) -> Sequence[EngineInfo]:
        """The engines that run."""

    def capacity(self, model: str) -> int:
        """Requests that the model's present tiers answer at a time: admission lets no more than a few above it in."""

    def subscribe(self, listener: PoolListener) -> None:
        """Call ``listener`` for every event from now on."""

    async def start(self) -> None:
        """Begin: load what is pinned; comes back at once, ``/ready`` looks at the snapshot."""

    async def stop(self, drain: float = 30.0) -> None:
        """Wait up to ``drain`` seconds for requests under way, then end every engine."""

    async def acquire(self, request: Request, tried: Sequence[str] = ()) -> Lease:
        """A place for ``request`` in a tier that is not in ``tried``; waits, loads and evicts as the policy says.

        Cancel the call when the client leaves. Raises :class:`RefusedError`.
        """
