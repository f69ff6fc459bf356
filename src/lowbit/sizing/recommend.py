"""The best way to serve a model on given devices: precision, method, cache, engine, flags, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lowbit.errors import ResourceError, UsageError
from lowbit.planning import Hardware, probe
from lowbit.planning.choice import LIMITS, Candidate, Choice, Measured, Quality, choose, told_loss
from lowbit.planning.kv_dtypes import LLAMA_CPP, VLLM, parse_kv_dtype
from lowbit.planning.thumb import select_bits
from lowbit.sizing.advice import told_size
from lowbit.sizing.estimate import estimate
from lowbit.sizing.estimate_results import Estimate, PrecisionEstimate
from lowbit.sizing.headers import open_header_model
from lowbit.sizing.measurements import best, find_measurements

_NOTABLE = 5 << 20
"""Bytes below which less memory is not worth a word."""
_SCHEMES = {
    VLLM: ("bf16", "int8-g128-sym", "int4-g128-sym", "int4-g32-sym"),
    LLAMA_CPP: ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K"),
}
_CACHES = {VLLM: ("auto", "fp8"), LLAMA_CPP: ("auto", "q8_0")}


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What :func:`recommend` advises.

    ``reasons``    by decision: engine, precision, method, kv cache, devices
    ``runner_up``  the next best, in words, and ``instead`` when to take it
    ``commands``   to make it and to serve it
    ``thumb``      what the rule-of-thumb selector says (bits, or None) and why
    ``candidates`` everything that was compared, the chosen one among them
    """

    model: str
    quality: Quality
    engine: str
    scheme: str
    format: str
    bits: float
    method: str
    kv_dtype: str
    flags: tuple[str, ...]
    reasons: dict[str, str]
    runner_up: str
    instead: str
    commands: tuple[str, ...]
    warnings: tuple[str, ...]
    thumb: tuple[int | None, str]
    measured: tuple[str, ...]
    precision: PrecisionEstimate
    estimate: Estimate
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate:
        """The candidate that was chosen."""
        return next(one for one in self.candidates if (one.scheme, one.kv_dtype) == (self.scheme, self.kv_dtype))

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return asdict(self) | {"precision": {**asdict(self.precision), "total": self.precision.total}}


def recommend(
    model: str | Path,
    *,
    memory: int | None = None,
    context: int | None = None,
    concurrency: int = 1,
    quality: Quality = "balanced",
    engine: str | None = None,
    kv_dtype: str = "auto",
    gpus: int | None = None,
    tensor_parallel: int | None = None,
    batch_tokens: int | None = None,
    measured: Sequence[str | Path] = (),
    like: str | None = None,
    revision: str | None = None,
    hardware: Hardware | None = None,
) -> Recommendation:
    """The best way to serve ``concurrency`` requests of ``context`` tokens in ``memory`` bytes of each device.

    Devices are those of this machine, or ``gpus`` of them (0: the CPU). Precisions are judged by certificates of the
    model's quantized copies (beside it, and in the directories ``measured``), else by what their width usually costs;
    ``quality`` says what may be lost. Raises :class:`ResourceError` with what is missing where nothing fits, and what
    estimating raises.
    """
    if quality not in LIMITS:
        raise UsageError(f"--quality {quality}: use {', '.join(LIMITS)}")
    hardware = hardware or probe()
    on_gpu = bool(gpus) or (gpus is None and bool(hardware.gpus))
    if memory is not None and not on_gpu:
        hardware = replace(hardware, memory=memory)
    chosen_engine, why = _engine(engine, on_gpu)
    opened = open_header_model(model, revision=revision, like=like)
    certificates = find_measurements(model, measured)
    caches = _CACHES[chosen_engine] if kv_dtype == "auto" else (kv_dtype,)
    results = {
        cache: estimate(
            opened,
            schemes=_schemes(chosen_engine, opened.stored),
            context=context,
            concurrency=concurrency,
            kv_dtype=cache,
            engine=chosen_engine,
            gpus=gpus if on_gpu else 0,
            gpu_memory=memory if on_gpu else None,
            tensor_parallel=tensor_parallel,
            batch_tokens=batch_tokens,
            hardware=hardware,
        )
        for cache in caches
    }
    candidates = [
        _candidate(result, entry, chosen_engine, cache, best(certificates.get(entry.scheme, ())))
        for cache, result in results.items()
        for entry in result.precisions
        if not entry.problem
    ]
    if not candidates:
        reasons = [entry.problem for entry in next(iter(results.values())).precisions if entry.problem]
        raise ResourceError(f"{model}: {chosen_engine} serves no precision of it: {reasons[0] if reasons else 'none'}")
    choice = choose(candidates, quality, opened.parameters)
    if choice.chosen is None:
        raise ResourceError(_shortage(choice, results))
    result = results[_cache_key(choice.chosen, results)]
    return _recommendation(model, quality, choice, choice.chosen, result, certificates, why, tuple(candidates))


def _engine(asked: str | None, on_gpu: bool) -> tuple[str, str]:
    if asked is not None:
        return asked, "asked for"
    if on_gpu:
        return VLLM, "GPUs: continuous batching, paged cache and kernels for 4-bit weights"
    return LLAMA_CPP, (
        "no GPU: measured on a CPU, llama.cpp generates several times faster than vLLM's build for it "
        "(25 against 4 tokens a second for one request of a 1.1B model)"
    )


def _schemes(engine: str, stored: str) -> tuple[str, ...]:
    """What can be chosen: a model that is quantized already stays as it is."""
    return _SCHEMES[engine] if stored == "dense" else ("stored",)


def _candidate(
    result: Estimate, entry: PrecisionEstimate, engine: str, cache: str, measured: Measured | None
) -> Candidate:
    kind = parse_kv_dtype(cache, engine)
    return Candidate(entry.scheme, entry.bits, result.cache.dtype, kind.bits, entry.total, entry.budget, measured)


def _cache_key(chosen: Candidate, results: dict[str, Estimate]) -> str:
    return next(cache for cache, result in results.items() if result.cache.dtype == chosen.kv_dtype)


def _shortage(choice: Choice, results: dict[str, Estimate]) -> str:
    """By how much nothing fits, and what would make it fit."""
    closest = choice.runner_up
    assert closest is not None  # there are candidates, or this is not asked
    result = next(entry for entry in results.values() if entry.cache.dtype == closest.kv_dtype)
    entry = next(entry for entry in result.precisions if entry.scheme == closest.scheme)
    device = result.devices
    ways = []
    if entry.concurrency:
        ways.append(f"--concurrency {entry.concurrency}")
    if entry.context:
        ways.append(f"--context {entry.context}")
    whole = closest.total / (closest.budget / device.memory)
    ways.append(f"devices of {told_size(whole, up=True)}")
    if device.gpu and entry.tensor_parallel[-1:] > (result.tensor_parallel,):
        ways.append(f"more GPUs (tensor parallel works up to {entry.tensor_parallel[-1]})")
    return (
        f"{result.model}: nothing fits in {told_size(device.memory)}: {closest.scheme} with a {closest.kv_dtype} "
        f"cache, the smallest, lacks {told_size(closest.missing, digits=2)} for {result.requests} requests of "
        f"{result.context} tokens; this would do: {', or '.join(ways)}"
    )


def _recommendation(
    model: str | Path,
    quality: Quality,
    choice: Choice,
    chosen: Candidate,
    result: Estimate,
    certificates: dict[str, list[Measured]],
    why_engine: str,
    candidates: tuple[Candidate, ...],
) -> Recommendation:
    entry = next(entry for entry in result.precisions if entry.scheme == chosen.scheme)
    method, why_method = _method(entry, chosen)
    reasons = {"engine": why_engine, **choice.reasons, "method": why_method, "devices": _devices(result)}
    flags = entry.advice.flags if entry.advice else ()
    made = _name(model, chosen.scheme)
    instead, when = _runner_up(choice, result.parameters)
    eight = next((e for e in result.precisions if round(e.bits) == 8), entry)
    four = next((e for e in result.precisions if round(e.bits) == 4), entry)
    room = entry.budget - (entry.total - entry.parts["weights"])
    return Recommendation(
        model=str(model),
        quality=quality,
        engine=result.engine,
        scheme=chosen.scheme,
        format=entry.format,
        bits=entry.bits,
        method=method,
        kv_dtype=chosen.kv_dtype,
        flags=flags,
        reasons=reasons,
        runner_up=instead,
        instead=when,
        commands=_commands(model, made, entry, method, result.engine, flags),
        warnings=choice.warnings,
        thumb=select_bits(eight.thumb, four.thumb, room, critical=quality == "high"),
        measured=tuple(sorted({found.name for entries in certificates.values() for found in entries})),
        precision=entry,
        estimate=result,
        candidates=candidates,
    )


def _method(entry: PrecisionEstimate, chosen: Candidate) -> tuple[str, str]:
    if entry.scheme == "stored" or entry.format == "dense" or entry.bits >= 15:
        return "none", "nothing is quantized"
    if chosen.measured is not None and chosen.measured.method:
        return chosen.measured.method, f"the least divergence measured at {chosen.scheme} ({chosen.measured.name})"
    if entry.format == "gguf":
        if entry.bits < 4:
            return "gguf", "below 4 bits with an importance matrix: lowbit imatrix first"
        return "gguf", "llama.cpp's types, rounded by lowbit's own search"
    if entry.bits >= 8:
        return "rtn", "at 8 bits rounding loses next to nothing, so no calibration is needed"
    return "gptq", "at 4 bits GPTQ takes back most of what rounding loses; calibrate on text like the task"


def _devices(result: Estimate) -> str:
    device = result.devices
    if not device.gpu:
        return f"{device.name}, {told_size(device.memory)}"
    return f"{device.count} × {device.name} of {told_size(device.memory)}, tensor parallel {result.tensor_parallel}"


def _runner_up(choice: Choice, parameters: int) -> tuple[str, str]:
    other, chosen = choice.runner_up, choice.chosen
    if other is None or chosen is None:
        return "", ""
    name = f"{other.scheme} with a {other.kv_dtype} cache"
    if other.bits > chosen.bits:
        return name, f"if accuracy matters more than room: {told_loss(other, parameters)}"
    freed = chosen.total - other.total
    gain = (
        f"{told_size(freed, digits=2)} less on each device" if freed > _NOTABLE else "smaller files, but no less memory"
    )
    return name, f"if room matters more: {gain}; {told_loss(other, parameters)}"


def _name(model: str | Path, scheme: str) -> str:
    return f"{Path(model).name.removesuffix('.json').removesuffix('.gguf')}-{scheme}"


def _commands(
    model: str | Path, made: str, entry: PrecisionEstimate, method: str, engine: str, flags: Sequence[str]
) -> tuple[str, ...]:
    served = str(model)
    commands = []
    if entry.format == "gguf" and entry.scheme != "stored":
        served = f"{made}.gguf"
        commands.append(f"lowbit quantize {model} {served} --scheme {entry.scheme}")
    elif method not in ("none", ""):
        served = made
        commands.append(
            f"lowbit quantize {model} {made} --scheme {entry.scheme} --method {method} --format {entry.format}"
        )
    program = "llama-server -m" if engine == LLAMA_CPP else "vllm serve"
    commands.append(" ".join([program, served, *flags]))
    return tuple(commands)
