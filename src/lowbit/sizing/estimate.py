"""What a model needs at each precision, and whether it fits: weights, caches, working memory, against the devices.

Reads headers and ``config.json`` only. Weights, caches and file sizes are exact; what an engine adds is its formula in
:mod:`lowbit.planning.serving`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lowbit.errors import UsageError
from lowbit.planning import Hardware, probe, tensor_parallel
from lowbit.planning.kv import llama_cpp_cache, request_bytes, token_bytes, vllm_pool
from lowbit.planning.kv_dtypes import LLAMA_CPP, VLLM, KvDtype, parse_kv_dtype
from lowbit.planning.serving import (
    BATCH_TOKENS,
    MEMORY,
    VLLM_CPU_BLOCK,
    Load,
    Served,
    largest_concurrency,
    largest_context,
)
from lowbit.planning.thumb import thumb_rules, thumb_weights
from lowbit.sizing.advice import advise
from lowbit.sizing.estimate_results import CacheEstimate, Devices, Estimate, PrecisionEstimate
from lowbit.sizing.headers import HeaderModel, open_header_model
from lowbit.sizing.making import predict_making
from lowbit.sizing.placement import device_kinds, image_encoder
from lowbit.sizing.variant import Variant
from lowbit.sizing.variants import make_variant

ENGINES = (VLLM, LLAMA_CPP)
UTILISATION: Mapping[str, float] = {VLLM: 0.92, LLAMA_CPP: 0.97}
"""Share of a device that an engine may fill: vLLM's default, and what leaves a little room."""
SCHEMES: Mapping[str, tuple[str, ...]] = {
    VLLM: ("fp32", "bf16", "int8-g128-sym", "int4-g128-sym"),
    LLAMA_CPP: ("F32", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M"),
}
"""Precisions that are shown when none is asked for."""
_DEGREES = (2, 4, 8, 16)


def estimate(
    model: str | Path | HeaderModel,
    *,
    schemes: Sequence[str] = (),
    format: str = "compressed-tensors",
    context: int | None = None,
    concurrency: int = 1,
    kv_dtype: str = "auto",
    engine: str = VLLM,
    gpus: int | None = None,
    gpu_memory: int | None = None,
    tensor_parallel: int | None = None,
    batch_tokens: int | None = None,
    like: str | None = None,
    revision: str | None = None,
    hardware: Hardware | None = None,
) -> Estimate:
    """What ``model`` (directory, GGUF file, hub id, ``demo``, or headers that are open) needs at each of ``schemes``.

    ``context`` tokens (default: 8192, or the model's maximum if that is less) for each of ``concurrency`` requests, on
    ``gpus`` of ``gpu_memory`` bytes (default: what this machine has; 0 GPUs mean its own memory), tensor-parallel over
    all of them. ``like`` names the family whose cache an unknown architecture shares. Reads no weights. Raises
    :class:`UsageError` for arguments that cannot be, and what opening the model raises.
    """
    _check(engine, concurrency, gpus, gpu_memory, context, batch_tokens)
    opened = model if isinstance(model, HeaderModel) else open_header_model(model, revision=revision, like=like)
    hardware = hardware or probe()
    devices = _devices(hardware, gpus, gpu_memory)
    degree = tensor_parallel or (devices.count if engine == VLLM and devices.gpu else 1)
    _check_degree(degree, devices)
    context = _context(context, opened)
    kv = parse_kv_dtype(kv_dtype, engine, str(opened.dtype).removeprefix("torch."))
    load = Load(context, concurrency, kv, batch_tokens or BATCH_TOKENS[engine], degree, devices.gpu)
    wanted = tuple(schemes) or _defaults(engine, opened)
    variants = [make_variant(opened, scheme, format, prefer_gguf=engine == LLAMA_CPP) for scheme in wanted]
    asked = _Asked(opened, engine, load, devices, hardware)
    return Estimate(
        model=opened.name,
        architecture=opened.description.architecture or opened.description.model_type,
        parameters=opened.parameters,
        active_parameters=opened.active_parameters,
        max_context=opened.description.max_positions,
        engine=engine,
        context=context,
        requests=concurrency,
        devices=devices,
        tensor_parallel=degree,
        cache=_cache(asked),
        precisions=tuple(_precision(asked, variant) for variant in variants),
        thumb=thumb_rules(opened.parameters, _token_bytes(opened, kv)),
        notes=_notes(asked),
    )


@dataclass(frozen=True, slots=True)
class _Asked:
    """The question, resolved."""

    model: HeaderModel
    engine: str
    load: Load
    devices: Devices
    hardware: Hardware

    @property
    def budget(self) -> int:
        """Bytes of one device that the engine may fill."""
        return int(self.devices.memory * UTILISATION[self.engine])


def _check(
    engine: str,
    concurrency: int,
    gpus: int | None,
    gpu_memory: int | None,
    context: int | None,
    batch_tokens: int | None,
) -> None:
    if engine not in ENGINES:
        raise UsageError(f"--engine {engine}: use {' or '.join(ENGINES)}")
    for flag, value, least in (
        ("--concurrency", concurrency, 1),
        ("--context", context, 1),
        ("--gpus", gpus, 0),
        ("--gpu-memory", gpu_memory, 1),
        ("--batch-tokens", batch_tokens, 1),
    ):
        if value is not None and value < least:
            raise UsageError(f"{flag} {value}: must be at least {least}")


def _check_degree(degree: int, devices: Devices) -> None:
    if degree < 1 or (devices.gpu and degree > devices.count):
        raise UsageError(f"--tensor-parallel {degree}: there are {devices.count} GPUs: use at most {devices.count}")


def _devices(hardware: Hardware, gpus: int | None, gpu_memory: int | None) -> Devices:
    found = hardware.gpus
    if gpus == 0 and gpu_memory is not None:
        raise UsageError("--gpus 0 and --gpu-memory contradict each other: leave one out")
    if gpus == 0 or (not found and gpus is None and gpu_memory is None):
        return Devices(1, hardware.memory, False, hardware.cpu_name)
    if gpu_memory is None and not found:
        raise UsageError(f"--gpus {gpus}: this machine has none, so say how large they are: --gpu-memory 24GiB")
    memory = gpu_memory or min(gpu.memory for gpu in found)
    count = gpus or (1 if gpu_memory is not None else len(found))
    name = found[0].name if found and gpu_memory is None else "GPU"
    return Devices(count, memory, True, name)


def _context(context: int | None, model: HeaderModel) -> int:
    limit = model.description.max_positions
    if context is None:
        return min(8192, limit) if limit else 8192
    if limit and context > limit:
        raise UsageError(f"--context {context}: beyond the model's maximum of {limit}: use at most {limit}")
    return context


def _defaults(engine: str, model: HeaderModel) -> tuple[str, ...]:
    own = ("stored",) if model.stored != "dense" else ()
    return own + SCHEMES[engine]


def _token_bytes(model: HeaderModel, kv: KvDtype) -> int:
    return sum(token_bytes(layer, kv) for layer in model.layers)


def _cache(asked: _Asked) -> CacheEstimate:
    layers, load = asked.model.layers, asked.load
    each = [request_bytes(layers, tokens, load.kv, load.devices) for tokens in (1024, 16_000, 128_000)]
    constant = request_bytes(layers, 0, load.kv, load.devices)
    return CacheEstimate(
        dtype=load.kv.name,
        token=sum(token_bytes(layer, load.kv, load.devices) for layer in layers),
        per_1k=each[0],
        per_16k=each[1],
        per_128k=each[2],
        request=request_bytes(layers, load.context, load.kv, load.devices),
        allocated=_allocated(asked),
        constant=constant,
    )


def _allocated(asked: _Asked) -> int:
    layers, load = asked.model.layers, asked.load
    if asked.engine == LLAMA_CPP:
        return llama_cpp_cache(layers, load.kv, load.context, load.concurrency, load.batch_tokens).bytes
    block = 16 if load.gpu else VLLM_CPU_BLOCK
    pool = vllm_pool(layers, load.kv, load.devices, load.batch_tokens, block)
    return pool.bytes(load.context, load.concurrency)


def _precision(asked: _Asked, variant: Variant) -> PrecisionEstimate:
    """One row of the table."""
    model, load = asked.model, asked.load
    known = PrecisionEstimate(
        scheme=variant.name,
        format=variant.format,
        bits=variant.bits,
        bits_per_weight=8 * variant.data / max(1, model.parameters),
        file_bytes=variant.size,
        exact=variant.exact,
        thumb=thumb_weights(model.parameters, variant.bits),
        problem=variant.problem or _unloadable(asked, variant),
    )
    if variant.problem:
        return known
    kinds = device_kinds(variant, model, load.devices)
    served = served_model(model, variant, load.devices, avx2=asked.hardware.avx2)
    memory = MEMORY[asked.engine](served, load)
    budget = asked.budget
    parallel = tensor_parallel(
        [module for module in variant.modules if module.spec is not None],
        max(1, model.description.heads),
        max(1, model.description.kv_heads),
        tuple(sorted({*_DEGREES, *([load.devices] if load.devices > 1 else [])})),
    )
    limit = model.description.max_positions or 1 << 20
    if load.devices in parallel.obstacles and not known.problem:
        known = replace(known, problem=f"tensor parallel {load.devices}: {parallel.obstacles[load.devices]}")
    fits = memory.total <= budget and not known.problem
    result = replace(
        known,
        kinds=kinds,
        parts=dict(memory.parts),
        host=memory.host,
        reclaimable=memory.reclaimable,
        budget=budget,
        free=budget - memory.total,
        fits=fits,
        tokens_left=_tokens_left(asked, budget - memory.total),
        concurrency=largest_concurrency(asked.engine, served, load, budget),
        context=largest_context(asked.engine, served, load, budget, limit),
        tensor_parallel=parallel.workable,
        obstacles=parallel.obstacles,
        making=_making(asked, variant),
    )
    return replace(result, advice=advise(asked.engine, served, load, asked.devices.memory, budget, memory))


def served_model(model: HeaderModel, variant: Variant, devices: int = 1, *, avx2: bool = True) -> Served:
    """A precision of a model as the formulas of engines take it."""
    kinds = device_kinds(variant, model, devices)
    return Served(
        shape=model.description,
        layers=model.layers,
        weights=sum(kinds.values()),
        embedding=kinds.get("embedding", 0),
        repacked=variant.repacked if avx2 else 0,
        encoder=image_encoder(model.checkpoint.config),
        merges=model.merges,
    )


def _unloadable(asked: _Asked, variant: Variant) -> str:
    is_gguf = variant.format.startswith("gguf")
    if asked.engine == LLAMA_CPP and not is_gguf:
        return "llama.cpp loads GGUF files: name a GGUF scheme such as Q4_K_M"
    if asked.engine == VLLM and is_gguf:
        return "vLLM loads no GGUF files without a plug-in: use --engine llama.cpp"
    return ""


def _tokens_left(asked: _Asked, free: int) -> int:
    """Tokens of cache that ``free`` bytes hold beyond what is asked."""
    per_token = sum(
        token_bytes(layer, asked.load.kv, asked.load.devices) for layer in asked.model.layers if not layer.window
    )
    return max(0, free // per_token) if per_token else 0


def _making(asked: _Asked, variant: Variant) -> dict[str, int]:
    """Memory and disk of quantizing with GPTQ and the default calibration."""
    planned = [replace(m, method="gptq") for m in variant.modules if m.spec is not None]
    if not planned or variant.format == "dense":
        return {}
    prediction = predict_making(asked.model, variant, asked.hardware)
    return {
        "peak_memory": prediction.peak_bytes,
        "scratch": prediction.scratch,
        "output": variant.size,
    }


def _notes(asked: _Asked) -> tuple[str, ...]:
    shape, notes = asked.model.description, []
    if shape.kv_heads and not shape.kv_lora_rank and asked.load.devices > shape.kv_heads:
        notes.append(
            f"{shape.kv_heads} key-value heads on {asked.load.devices} devices: each is kept "
            f"{asked.load.devices // shape.kv_heads} times"
        )
    if shape.kv_lora_rank and asked.load.devices > 1:
        notes.append("latent attention (MLA): the cache is kept whole on every device, not divided")
    if shape.multimodal and image_encoder(asked.model.checkpoint.config) is None:
        notes.append("the encoder's working memory is not counted: its config is not known")
    return tuple(notes)
