"""What an estimate says, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lowbit.planning.thumb import ThumbRules
from lowbit.sizing.advice import Advice

SEGMENTS = (
    "embedding",
    "attention",
    "mlp",
    "experts",
    "encoder",
    "head",
    "other",
    "kv cache",
    "activations",
    "graphs",
    "engine",
)
"""Parts of a bar, in order."""


@dataclass(frozen=True, slots=True)
class Devices:
    """What serves: ``count`` GPUs of ``memory`` bytes each, or with ``gpu`` False the host's own memory."""

    count: int
    memory: int
    gpu: bool
    name: str


@dataclass(frozen=True, slots=True)
class CacheEstimate:
    """Key-value cache and states. ``token`` are bytes that one more token costs one request while no window is full;
    ``per_1k``, ``per_16k``, ``per_128k`` bytes for 1024, 16,000 and 128,000 tokens; ``request`` and ``allocated`` for
    the context asked: of one request by arithmetic alone, of all as the engine rounds, on one device."""

    dtype: str
    token: int
    per_1k: int
    per_16k: int
    per_128k: int
    request: int
    allocated: int
    constant: int


@dataclass(frozen=True, slots=True)
class PrecisionEstimate:
    """One precision on the devices.

    ``file_bytes``      all weight files; ``exact`` to the byte
    ``kinds``           bytes of weights on one device by kind of module
    ``parts``           bytes on one device: weights, kv cache, activations, graphs, engine
    ``host``            bytes in host memory beside GPUs; ``reclaimable`` mapped pages that the system can take back
    ``budget``          bytes of a device that the engine may fill; ``free`` what is left of them (negative: missing)
    ``tokens_left``     tokens of cache that still fit
    ``concurrency``, ``context``  the largest that fit, the other as asked; 0 if none
    ``tensor_parallel`` degrees that load; ``obstacles`` why another does not
    ``thumb``           what the rule of thumb says, bytes
    ``making``          peak memory, scratch and output of ``lowbit quantize``, in bytes; empty where nothing is made
    ``problem``         why there is no such file, or the engine does not load it; empty otherwise
    """

    scheme: str
    format: str
    bits: float
    bits_per_weight: float
    file_bytes: int
    exact: bool
    kinds: Mapping[str, int] = field(default_factory=dict)
    parts: Mapping[str, int] = field(default_factory=dict)
    host: int = 0
    reclaimable: int = 0
    budget: int = 0
    free: int = 0
    fits: bool = False
    tokens_left: int = 0
    concurrency: int = 0
    context: int = 0
    tensor_parallel: tuple[int, ...] = ()
    obstacles: Mapping[int, str] = field(default_factory=dict)
    thumb: int = 0
    making: Mapping[str, int] = field(default_factory=dict)
    advice: Advice | None = None
    problem: str = ""

    @property
    def total(self) -> int:
        """Bytes that one device must have."""
        return sum(self.parts.values())

    @property
    def segments(self) -> dict[str, int]:
        """Bytes by part for a picture, weights divided by kind of module; norms and routers count as other."""
        found = dict.fromkeys(SEGMENTS, 0)
        for kind, size in self.kinds.items():
            found[kind if kind in found else "other"] += size
        for part, size in self.parts.items():
            if part != "weights":
                found[part] += size
        return {part: size for part, size in found.items() if size}


@dataclass(frozen=True, slots=True)
class Estimate:
    """What :func:`estimate` found; sizes in bytes."""

    model: str
    architecture: str
    parameters: int
    active_parameters: int
    max_context: int
    engine: str
    context: int
    requests: int
    devices: Devices
    tensor_parallel: int
    cache: CacheEstimate
    precisions: tuple[PrecisionEstimate, ...]
    thumb: ThumbRules
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values, each precision with its total."""
        values = asdict(self)
        for entry, precision in zip(values["precisions"], self.precisions, strict=True):
            entry["total"] = precision.total
            entry["obstacles"] = {str(degree): reason for degree, reason in precision.obstacles.items()}
        return values

    @property
    def fitting(self) -> tuple[PrecisionEstimate, ...]:
        """The precisions that fit, in the order asked."""
        return tuple(entry for entry in self.precisions if entry.fits)
