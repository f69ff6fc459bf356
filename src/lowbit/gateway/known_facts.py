"""What was found out about checkpoints before, so that a gateway starts again at once: kept until a file changes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import lowbit
from lowbit.cache import cache_directory
from lowbit.gateway.config import ModelConfig, ServeConfig, TierConfig
from lowbit.gateway.launch import TierFacts
from lowbit.gateway.placement import Device

__all__ = ["known_facts", "remember_facts"]


def known_facts(config: ServeConfig, devices: Sequence[Device] = ()) -> dict[str, TierFacts]:
    """Facts by tier id of those tiers whose files and GPUs are as they were, and of engines elsewhere."""
    found = {}
    for name, model in config.models.items():
        for tier in model.tiers:
            facts = _known(model, tier, devices)
            if facts is not None:
                found[f"{name}@{tier.name}"] = facts
    return found


def remember_facts(config: ServeConfig, facts: dict[str, TierFacts], devices: Sequence[Device] = ()) -> None:
    """Keep facts for the next time; a cache that cannot be written is no harm."""
    for name, model in config.models.items():
        for tier in model.tiers:
            entry = _entry(model, tier, devices)
            if entry is None or f"{name}@{tier.name}" not in facts:
                continue
            found = facts[f"{name}@{tier.name}"]
            content = {"facts": dataclasses.asdict(found), "files": _stamps(Path(str(found.path)))}
            try:
                entry.parent.mkdir(parents=True, exist_ok=True)
                draft = entry.with_suffix(f".{os.getpid()}")
                draft.write_text(json.dumps(content), encoding="utf-8")
                draft.replace(entry)
            except OSError:
                return


def _known(model: ModelConfig, tier: TierConfig, devices: Sequence[Device]) -> TierFacts | None:
    if tier.path is None:
        return TierFacts("openai" if tier.engine == "auto" else tier.engine, kl=tier.kl, bits=tier.known_bits())
    entry = _entry(model, tier, devices)
    if entry is None:
        return None
    try:
        content = json.loads(entry.read_text(encoding="utf-8"))
        facts = TierFacts(**content["facts"])
        return facts if content["files"] == _stamps(Path(str(facts.path))) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _entry(model: ModelConfig, tier: TierConfig, devices: Sequence[Device]) -> Path | None:
    """The file of a tier's facts, by everything they depend on; None for a model that is not on this disk."""
    if tier.path is None:
        return None
    path = Path(lowbit.__file__).parent / "demo" / "model" if tier.path == "demo" else Path(tier.path).expanduser()
    stamps = _stamps(path)
    if not stamps:
        return None
    asked = tier.model_dump(include={"path", "quantize", "engine", "python", "context", "concurrency", "kv_dtype"})
    if devices:
        split = {"gpu_layers", "tensor_parallel", "pipeline_parallel"}
        asked |= {"gpus": tier.gpus, "flags": tier.flags.model_dump(include=split)}
        asked |= {"devices": [(device.name, device.memory, device.budget >> 30) for device in devices]}
    text = json.dumps([lowbit.__version__, model.kind, asked, str(path.resolve()), stamps], sort_keys=True)
    return cache_directory() / "facts" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def _stamps(path: Path) -> list[list[str | int]]:
    """Name, size and time of change of a file and its manifest, or of all files of a directory."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path, path.with_suffix(".lowbit.json")]
        stats = [(file.name, file.stat()) for file in files if file.is_file()]
    except OSError:
        return []
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
