"""What a deployment of a serve configuration needs, found out once for every kind of deploy files.

Models are mounted read-only at :data:`MODELS` and the configuration is rewritten to find them there. Keys stay out of
all files: only the names of the variables that hold them appear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit import __version__
from lowbit.checkpoint.location import is_hub_id
from lowbit.engines.presets import ENGINES
from lowbit.errors import LowbitError, UsageError
from lowbit.gateway.config import ServeConfig, TierConfig
from lowbit.ops.text_files import as_yaml
from lowbit.planning.serving import shared_memory, shm_advice

__all__ = ["CACHE", "CONFIG", "MODELS", "PORT", "USER", "Deployment", "plan_deployment"]

MODELS = "/models"
CONFIG = "/etc/lowbit/serve.yaml"
CACHE = "/var/cache/lowbit"
PORT = 8000
USER = 10001
"""The user and group of the images: no root, no account of the host."""
DEFAULT_KEY = "LOWBIT_KEY"

_GIB = 1 << 30
_GATEWAY = 1 * _GIB
"""Memory beside the engines: the gateway, and the process that prepares models."""
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_GPU_ENGINES = frozenset({"vllm", "sglang", "lmdeploy", "tensorrt-llm", "tgi", "mlc"})


@dataclass(frozen=True, slots=True)
class Deployment:
    """Everything that a writer of deploy files puts in.

    ``config`` is the rewritten configuration as YAML, ``models`` what is mounted (path on this machine by path in the
    container), ``secrets`` the variables that hold keys,
    ``scrape_key`` the one for Prometheus (None where the gateway wants no key), ``memory`` and ``shm`` bytes,
    ``gpus`` devices, ``ready``
    seconds that loading may take, ``queue_target`` waiting requests per replica beyond which another one is started.
    """

    name: str
    image: str
    config: str
    models: Mapping[str, Path]
    secrets: tuple[str, ...]
    scrape_key: str | None
    memory: int
    cpus: float
    gpus: int
    shm: int
    ready: int
    replicas: int
    max_replicas: int
    queue_target: int


def plan_deployment(
    config: ServeConfig,
    *,
    name: str = "lowbit",
    image: str | None = None,
    memory: int | None = None,
    cpus: float | None = None,
    gpus: int | None = None,
    replicas: int = 1,
    max_replicas: int = 4,
) -> Deployment:
    """Find it out: memory by the planner where neither flag nor configuration says it.

    Raises :class:`UsageError` for a configuration that holds a key in plain text or cannot be served elsewhere, and
    where memory is not known.
    """
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?", name):
        raise UsageError(f"--name {name!r}: lower-case letters, digits and '-' only, at most 42, e.g. lowbit")
    if image is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*", image):
        raise UsageError(f"--image {image!r} is no name of an image")
    if not 1 <= replicas <= max_replicas:
        raise UsageError(f"--replicas {replicas} and --max-replicas {max_replicas}: 1 ≤ replicas ≤ max-replicas")
    _refuse_secrets(config)
    devices = gpus if gpus is not None else max(map(_devices, _tiers(config)))
    models, rewritten = _mounts(config)
    needed = memory or config.memory or _planned(config, devices)
    secrets = _secrets(config)
    scrape_key = next((key.removeprefix("env:") for key in config.api_keys if key.startswith("env:")), DEFAULT_KEY)
    rewritten |= {"host": "0.0.0.0", "port": PORT, "memory": needed}
    if not config.api_keys and not config.insecure:
        rewritten["api_keys"] = [f"env:{DEFAULT_KEY}"]
        secrets = (*secrets, DEFAULT_KEY)
    limit = config.limits.queue_requests
    return Deployment(
        name=name,
        image=image or f"lowbit:{__version__}-{'cuda' if devices else 'cpu'}",
        config=as_yaml(rewritten),
        models=models,
        secrets=tuple(dict.fromkeys(secrets)),
        scrape_key=scrape_key if config.api_keys or not config.insecure else None,
        memory=needed + _GATEWAY,
        cpus=cpus or float(config.threads or 2) * len(config.models),
        gpus=devices,
        shm=shm_advice(max(1, devices)) * _GIB if devices > 1 else max(shared_memory(1), 64 << 20),
        ready=int(max(tier.ready_timeout for tier in _tiers(config))),
        replicas=replicas,
        max_replicas=max_replicas,
        queue_target=max(1, min(limit // 4, 2 * sum(tier.concurrency for tier in _tiers(config)))),
    )


def _tiers(config: ServeConfig) -> list[TierConfig]:
    return [tier for model in config.models.values() for tier in model.tiers]


def _devices(tier: TierConfig) -> int:
    """GPUs that a tier asks for: as many as it is split over, none where its engine runs on the processor."""
    split = (tier.flags.tensor_parallel or 1) * (tier.flags.pipeline_parallel or 1) // max(1, len(tier.nodes))
    if split > 1 or tier.engine in _GPU_ENGINES:
        return split if tier.url is None else 0
    return 1 if tier.flags.gpu_layers else 0


def _refuse_secrets(config: ServeConfig) -> None:
    for model, each in config.models.items():
        for tier in each.tiers:
            for variable, value in tier.env.items():
                if _SECRET.search(variable) and value:
                    raise UsageError(
                        f"{model}@{tier.name}: env {variable} holds a secret in plain text: take it out; engines "
                        "inherit the gateway's environment, and deploy files name the variable"
                    )
            if tier.path is not None and tier.engine != "ollama" and not _is_somewhere(tier.path):
                raise UsageError(f"{model}@{tier.name}: {tier.path}: no such file or directory to mount")


def _is_somewhere(path: str) -> bool:
    """Whether a tier's path is here, or reads like the id of a hub model."""
    return path == "demo" or Path(path).expanduser().exists() or is_hub_id(path)


def _secrets(config: ServeConfig) -> tuple[str, ...]:
    named = [key.removeprefix("env:") for key in config.api_keys if key.startswith("env:")]
    named += [tier.api_key.removeprefix("env:") for tier in _tiers(config) if tier.api_key]
    return tuple(named)


def _mounts(config: ServeConfig) -> tuple[dict[str, Path], dict[str, Any]]:
    """Local paths by their place in the container, and the configuration that names those places."""
    places: dict[str, Path] = {}
    content = config.model_dump(mode="json", exclude_defaults=True)

    def move(text: str) -> str:
        path = Path(text).expanduser()
        if text == "demo" or not path.exists():
            return text
        path = path.resolve()
        inside = f"{MODELS}/{path.name}"
        number = 1
        while places.get(inside, path) != path:
            number += 1
            inside = f"{MODELS}/{number}-{path.name}"
        places[inside] = path
        return inside

    for name, model in config.models.items():
        for tier, written in zip(model.tiers, content["models"][name]["tiers"], strict=True):
            if tier.path is not None and (tier.engine == "auto" or tier.engine in ENGINES or tier.engine == "encoder"):
                written["path"] = move(tier.path)
            for key in ("draft_model", "mmproj"):
                if getattr(tier.flags, key) is not None:
                    written["flags"][key] = move(getattr(tier.flags, key))
    content.pop("logs", None)  # in the cache directory, which is a volume
    return places, content


def _planned(config: ServeConfig, devices: int) -> int:
    """Bytes of host memory by the planner: of every model, its largest tier."""
    from lowbit.sizing.estimate import estimate

    total = 0
    for name, model in config.models.items():
        sizes = []
        for tier in model.tiers:
            if tier.memory is not None or tier.path is None:
                sizes.append(tier.memory or 0)
                continue
            try:
                found = estimate(
                    tier.path,
                    engine="vllm" if tier.engine == "vllm" else "llama.cpp",
                    context=tier.context,
                    concurrency=tier.concurrency,
                    gpus=0,
                )
            except LowbitError as error:
                raise UsageError(f"{name}@{tier.name}: memory is not known ({error}): give --memory SIZE") from error
            largest = max(found.precisions, key=lambda each: each.file_bytes)
            sizes.append(sum(largest.parts.values()) + largest.host)
        total += max(sizes)
    if not total:
        raise UsageError("memory is not known, since every tier runs elsewhere: give --memory SIZE")
    return -(-total * 10 // 9 // (1 << 20)) * (1 << 20)
