"""Makes every tier ready to be loaded and finds out what the policy must know of it, in a process of its own.

``python -m lowbit.gateway.prepare`` reads a configuration from standard input and writes facts to standard output, as
JSON; progress goes to standard error. The gateway itself never imports torch: it stays small, starts at once, and a
conversion that runs out of memory does not take it along.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError, UnsupportedError, UsageError
from lowbit.gateway.config import ModelConfig, ServeConfig, TierConfig
from lowbit.gateway.known_facts import cache_directory, known_facts, remember_facts
from lowbit.gateway.launch import TierFacts

__all__ = ["find_facts", "prepare"]

_SCHEMES = {"int4": "Q4_K_M", "int5": "Q5_K_M", "int6": "Q6_K", "int8": "Q8_0", "fp16": "F16", "bf16": "BF16"}
_DEFAULT_CONTEXT = 8192
"""Tokens of each request where nobody says otherwise and the model was made for as many."""
_PROCESS = 16 * 1024**2
"""What an engine holds beside what the planner counts: the process that guards it."""
_ENCODER_PROCESS = 600 * 1024**2


async def prepare(config: ServeConfig, *, quiet: bool = False) -> dict[str, TierFacts]:
    """Facts by tier id: those that are known, and the others by running this module as a process.

    Its progress appears on standard error unless ``quiet``. Raises the error that it met as :class:`UsageError`.
    Cancelling ends it.
    """
    known = known_facts(config)
    if len(known) == sum(len(model.tiers) for model in config.models.values()):
        return known
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lowbit.gateway.prepare", *(["--quiet"] if quiet else [])),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        output, _ = await process.communicate(config.model_dump_json().encode())
    except asyncio.CancelledError:
        process.terminate()
        await process.wait()
        raise
    try:
        answer = json.loads(output)
    except ValueError:
        raise UsageError(
            f"preparing the models ended with status {process.returncode}: out of memory? Try a smaller model first"
        ) from None
    if "error" in answer:
        raise UsageError(answer["error"])
    facts = {name: TierFacts(**values) for name, values in answer["facts"].items()}
    remember_facts(config, facts)
    return facts


def find_facts(config: ServeConfig, say: Callable[[str], None]) -> dict[str, TierFacts]:
    """Do it: convert and quantize what has to be, read headers and manifests, plan memory."""
    facts = known_facts(config)
    for name, model in config.models.items():
        for tier in model.tiers:
            tier_id = f"{name}@{tier.name}"
            try:
                facts[tier_id] = facts.get(tier_id) or _facts(model, tier, partial(_say_of, say, tier_id))
            except LowbitError as error:
                raise UsageError(f"{tier_id}: {error}") from error
    return facts


def _say_of(say: Callable[[str], None], tier_id: str, text: str) -> None:
    say(f"{tier_id}: {text}")


def _facts(model: ModelConfig, tier: TierConfig, say: Callable[[str], None]) -> TierFacts:
    from lowbit.checkpoint.location import locate

    named = str(tier.path)
    if tier.engine == "ollama":  # which keeps models in a store of its own, under names of its own
        return TierFacts(tier.engine, named, bits=tier.known_bits())
    path = Path(named).expanduser() if named.endswith(".gguf") else locate(named)
    engine = _engine(model, tier, path)
    if engine == "encoder":
        return TierFacts(
            engine, str(path), 2 * _weight_bytes(path) + _ENCODER_PROCESS, 8.0 if tier.quantize == "int8" else 32.0
        )
    source = path
    if engine == "llama.cpp" and (path.suffix != ".gguf" or tier.quantize):
        path = _gguf(tier, path, say)
    elif tier.quantize:
        path = _quantized_directory(tier, path, say)
    return _describe(engine, tier, source, path)


def _engine(model: ModelConfig, tier: TierConfig, path: Path) -> str:
    """The engine for a checkpoint: as told, or by what it is and what is installed here."""
    from lowbit.planning.hardware import probe

    if tier.engine != "auto":
        return tier.engine
    if path.suffix == ".gguf":
        return "llama.cpp"
    if model.kind != "chat":
        return "encoder"
    if tier.python is not None or (importlib.util.find_spec("vllm") is not None and probe().gpus):
        return "vllm"
    return "llama.cpp"


def _gguf(tier: TierConfig, source: Path, say: Callable[[str], None]) -> Path:
    """A GGUF file of the checkpoint, made once: its own codes and values, or quantized if that is asked for."""
    import lowbit

    scheme = _SCHEMES.get(tier.quantize.lower(), tier.quantize) if tier.quantize else None
    out = _cached(source, f"{scheme or 'as-it-is'}.gguf", say)
    if out.exists():
        return out
    say(f"writing it as GGUF{f' {scheme}' if scheme else ''} once, to {out}")
    if scheme is not None:
        lowbit.quantize(str(tier.path), str(out), scheme=scheme)
        return out
    try:
        lowbit.convert(str(tier.path), str(out))
    except UnsupportedError as error:
        say(f"{error}; its values go as F16, in more memory")
        lowbit.quantize(str(tier.path), str(out), scheme="F16", certify_tokens=0)
    return out


def _quantized_directory(tier: TierConfig, source: Path, say: Callable[[str], None]) -> Path:
    import lowbit

    scheme = {"int4": "W4A16", "int8": "W8A16"}.get(str(tier.quantize), str(tier.quantize))
    out = _cached(source, scheme, say)
    if not out.exists():
        say(f"quantizing it to {scheme} once, to {out}")
        lowbit.quantize(str(tier.path), str(out), scheme=scheme)
    return out


def _cached(source: Path, name: str, say: Callable[[str], None]) -> Path:
    """Where the result for ``source`` is kept, by the hash of its content."""
    say("reading it to see whether it has been converted before")
    directory = cache_directory() / "served" / _content_hash(source)[:32]
    directory.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", source.name) or "model"
    return directory / f"{stem}-{name}"


def _content_hash(source: Path) -> str:
    """sha256 over names and contents of the checkpoint's files."""
    from lowbit.checkpoint.files import hash_file

    files = [source] if source.is_file() else sorted(path for path in source.iterdir() if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        if path.suffix in (".md", ".txt") or path.name == ".gitattributes":
            continue
        digest.update(f"{path.name}\0{hash_file(path).sha256}\0".encode())
    return digest.hexdigest()


def _describe(engine: str, tier: TierConfig, source: Path, path: Path) -> TierFacts:
    """Memory by the planner, quality by the certificate, context by the model."""
    from lowbit.checkpoint.manifest import read_manifest
    from lowbit.sizing.estimate import estimate

    manifest = read_manifest(path)
    kl = _certified(path)
    if kl is None and path != source and tier.quantize is None:
        original = read_manifest(source)
        # the very codes or values of the source: what holds for it holds here
        kl = _certified(source) if original is not None and original.modules else 0.0
    planner = engine if engine in ("vllm", "llama.cpp") else "vllm"
    first = estimate(str(path), engine=planner, context=tier.context, concurrency=tier.concurrency, gpus=0)
    context = tier.context or (min(first.max_context or _DEFAULT_CONTEXT, _DEFAULT_CONTEXT))
    if first.context != context:
        first = estimate(str(path), engine=planner, context=context, concurrency=tier.concurrency, gpus=0)
    size = _weight_bytes(path)
    precision = min(first.precisions, key=lambda each: abs(each.file_bytes - size))  # the one it is stored in
    return TierFacts(
        engine,
        str(path),
        sum(precision.parts.values()) + precision.host + _PROCESS,
        precision.bits,
        kl,
        _weight_error(manifest.modules if manifest is not None else {}),
        context if engine == "llama.cpp" else tier.context or first.max_context,
    )


def _weight_bytes(path: Path) -> int:
    """Bytes of a GGUF file (all its parts), or of a directory's safetensors."""
    if path.is_file():
        stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem)
        parts = [each for each in path.parent.glob("*.gguf") if re.sub(r"-\d{5}-of-\d{5}$", "", each.stem) == stem]
        return sum(each.stat().st_size for each in parts)
    return sum(each.stat().st_size for each in path.rglob("*.safetensors"))


def _certified(path: Path) -> float | None:
    """KL divergence of a checkpoint's certificate."""
    from lowbit.checkpoint.manifest import read_manifest

    manifest = read_manifest(path)
    quality = manifest.quality if manifest is not None else None
    return None if quality is None else quality.get("kl_divergence")


def _weight_error(modules: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The mean relative error of the quantized modules, by their weights."""
    measured = [module for module in modules.values() if "weight_error" in module]
    pairs = [(float(module["weight_error"]), int(module.get("weights", 1))) for module in measured]
    total = sum(count for _, count in pairs)
    return sum(error * count for error, count in pairs) / total if total else None


def main(arguments: list[str]) -> int:
    """Read the configuration, write the facts."""
    quiet = "--quiet" in arguments
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes to standard error
    say: Callable[[str], None] = (lambda text: None) if quiet else lambda text: print(text, file=sys.stderr, flush=True)
    try:
        config = ServeConfig.model_validate_json(sys.stdin.read())
        found = find_facts(config, say)
    except LowbitError as error:
        json.dump({"error": str(error)}, answers)
        answers.close()
        return 2
    json.dump({"facts": {name: dataclasses.asdict(each) for name, each in found.items()}}, answers)
    answers.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
