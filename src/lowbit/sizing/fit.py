"""The best checkpoint that fits: measure, choose, quantize, and compare what was predicted with what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowbit.checkpoint import check_output
from lowbit.errors import UnsupportedError, UsageError
from lowbit.evaluation.certify import CERTIFY_TOKENS, quantize
from lowbit.pipeline.fit import (
    Fit,
    Measurement,
    check_bits,
    check_measurement,
    check_text,
    choose,
    gguf_types,
    measure,
    measure_caches,
)
from lowbit.pipeline.fit_candidates import DEFAULT_METHODS, GGUF, GGUF_BASE, UNTOUCHED, check_methods
from lowbit.pipeline.gguf_output import check_name, is_gguf_name
from lowbit.pipeline.progress import Progress, Silent
from lowbit.pipeline.quantize import QuantizeResult
from lowbit.sizing.fit_memory import Serving, check_room, choose_together, offered_caches, open_asked
from lowbit.sizing.fit_plots import draw_fit

__all__ = ["FitResult", "fit"]

CURVE_POINTS = 24
"""Budgets between the smallest and the largest choice that the plot's curve is drawn through."""


@dataclass(frozen=True, slots=True)
class FitResult:
    """What :func:`fit` chose, and the checkpoint that it made of it.

    ``predicted`` is the KL divergence in nats per token that was expected of the weights; ``result.quality`` has the
    measured one. ``serving`` is how it goes into the memory that was the budget, None for another budget.
    """

    fit: Fit
    predicted: float
    result: QuantizeResult
    measurement: Measurement
    plots: tuple[Path, ...] = ()
    serving: Serving | None = None


def fit(
    source: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    bits_per_weight: float | None = None,
    memory: int | None = None,
    context: int | str | None = None,
    max_kl: float | None = None,
    concurrency: int = 1,
    kv_dtype: str = "auto",
    gpus: int | None = None,
    format: str = "compressed-tensors",
    methods: Sequence[str] | None = None,
    candidates: Sequence[str] | None = None,
    measurements: str | Path | None = None,
    report: str | Path | None = None,
    calibration: str | Path | None = None,
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 42,
    certify_tokens: int = CERTIFY_TOKENS,
    device: str = "cpu",
    work_memory: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> FitResult:
    """Quantize ``source`` into ``out`` with the bits per module that lose least within a budget.

    The budget is ``size`` bytes on disk, ``bits_per_weight`` of the linears, or ``memory``: bytes of each of ``gpus``
    devices (0: of the host) that must hold the weights, the cache of ``concurrency`` requests of ``context`` tokens,
    and the engine (vLLM, or llama.cpp for a GGUF file), as :func:`lowbit.estimate` counts them. With a ``kv_dtype`` of
    "auto" the cache's format is chosen together with the bits, by what the engine's formats were measured to cost. A
    ``context`` of ``"4096..32768"`` or ``"auto"`` is chosen, too: the longest with which weights and cache lose no more
    than ``max_kl`` nats (default 0.01), or 5 % more than with the shortest. An ``out`` that ends in ``.gguf`` becomes a
    GGUF file.

    ``methods`` (default: :data:`lowbit.pipeline.fit_candidates.DEFAULT_METHODS`) solve the number formats
    ``candidates``; both are chosen together, module by module. ``measurements`` is a file: read if it is there, written
    if not, so that the next budget takes seconds. ``report`` is a directory for the pictures. With ``resume`` a
    directory whose quantization was interrupted is finished; give ``measurements`` too, else it is measured again.
    Raises :class:`ResourceError` for a budget that is too small, by how much; everything :func:`lowbit.quantize` raises
    besides.
    """
    progress = progress or Silent()
    if sum(budget is not None for budget in (size, bits_per_weight, memory)) != 1:
        raise UsageError("fit needs one budget: --size, --bits-per-weight or --memory")
    if bits_per_weight is not None:
        check_bits(bits_per_weight)
    if is_gguf_name(out):
        format = GGUF
    asked = None
    if memory is not None:
        asked = open_asked(
            source, memory, context=context, max_kl=max_kl, concurrency=concurrency, kv_dtype=kv_dtype, format=format,
            gpus=gpus,
        )  # fmt: skip
        check_room(asked, offered_caches(asked, kv_dtype))
    elif (context, max_kl, kv_dtype, gpus) != (None, None, "auto", None):
        raise UsageError("--context, --max-kl, --kv-dtype and --gpus belong to --memory: give that as the budget")
    _check_out(Path(out), format, resume=resume, overwrite=overwrite)
    data: dict[str, Any] = {
        "calibration": calibration, "seed": seed, "device": device, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    measurement = _measurement(
        source, measurements, progress, format=format, methods=methods, candidates=candidates, **data
    )
    serving = None
    if asked is None:
        chosen = choose(measurement, total_bytes=size, bits_per_weight=bits_per_weight)
    else:
        wanted = offered_caches(asked, kv_dtype)
        measurement, reason = _with_caches(source, measurement, wanted, measurements, progress, **data)
        known = {name: measurement.caches[name] for name in wanted if name in measurement.caches}
        chosen, serving = choose_together(asked, measurement, known, reason)
    progress.message(_told(chosen, serving))
    how = _how(source, measurement, chosen, format)
    result = quantize(
        source, out, **how, calibration=calibration, samples=samples, seq_len=seq_len, seed=seed,
        certify_tokens=certify_tokens, device=device, memory=work_memory, resume=resume, overwrite=overwrite,
        trust_remote_code=trust_remote_code, progress=progress,
    )  # fmt: skip
    plots: tuple[Path, ...] = ()
    if report is not None:
        plots = draw_fit(Path(report), measurement, chosen, curve(measurement, chosen.bytes), result.quality)
    return FitResult(chosen, chosen.divergence, result, measurement, plots, serving)


def _check_out(out: Path, format: str, *, resume: bool, overwrite: bool) -> None:
    """Raise for an output that cannot be written, before anything is measured."""
    if format == GGUF:
        if resume:
            raise UsageError("--resume has no meaning for a GGUF file: nothing is kept of an interrupted run")
        check_name(out, overwrite=overwrite)
    else:
        check_output(out, resume=resume, overwrite=overwrite)


def _how(source: str | Path, measurement: Measurement, chosen: Fit, format: str) -> dict[str, Any]:
    """What :func:`lowbit.quantize` is told to make of the choice."""
    if format == GGUF:
        return {"scheme": GGUF_BASE, "imatrix": "auto", "types": gguf_types(source, chosen)}
    return {"recipe": chosen.recipe(measurement)}


def _told(chosen: Fit, serving: Serving | None) -> str:
    told = f"chose {chosen.bits_per_weight:.3f} bits per weight: predicted KL divergence {chosen.divergence:.4g} nats"
    if serving is None:
        return told
    cache = f"{serving.kv_dtype} cache ({serving.reason})"
    return f"{told}; {cache}; {serving.context:,} tokens ({serving.context_reason})"


def _with_caches(
    source: str | Path, measurement: Measurement, wanted: Sequence[str], file: str | Path | None, progress: Progress,
    **data: Any,
) -> tuple[Measurement, str]:  # fmt: skip
    """The measurement with the divergences of the cache formats ``wanted``, and the reason why there are none."""
    missing = [name for name in wanted if name not in measurement.caches]
    if not missing:
        return measurement, ""
    try:
        found = measure_caches(source, missing, progress=progress, **data)
    except UnsupportedError as error:
        return measurement, str(error)
    measurement = replace(measurement, caches={**measurement.caches, **found})
    if file is not None:
        measurement.save(Path(file))
    return measurement, ""


def curve(measurement: Measurement, most: int = 0) -> list[Fit]:
    """The best choice at budgets from the smallest to the largest with quantized weights, or to ``most`` bytes."""
    least = sum(min(one.bytes for one in group.candidates.values()) for group in measurement.groups)
    largest = sum(
        max(one.bytes for name, one in group.candidates.items() if name not in UNTOUCHED)
        for group in measurement.groups
    )
    largest = max(largest, most - measurement.other_bytes)
    budgets = [least + (largest - least) * i // (CURVE_POINTS - 1) for i in range(CURVE_POINTS)]
    return [choose(measurement, total_bytes=measurement.other_bytes + budget) for budget in budgets]


def _measurement(
    source: str | Path,
    file: str | Path | None,
    progress: Progress,
    *,
    format: str,
    methods: Sequence[str] | None,
    candidates: Sequence[str] | None,
    **data: Any,
) -> Measurement:
    """The measurement in ``file`` if there is one and it answers the question, else a new one."""
    if format == GGUF and methods is not None:
        raise UsageError("--methods has no meaning for a GGUF file: each type has its own search")
    path = None if file is None else Path(file)
    if path is not None and path.exists():
        found = Measurement.load(path)
        if found.format != format or (methods is not None and found.methods != check_methods(methods)):
            by = f" by {', '.join(found.methods)}" if found.methods else ""
            raise UsageError(f"{path}: measured for {found.format}{by}: name another file")
        check_measurement(found, source)
        if data["calibration"] is not None:
            check_text(found, source, data["calibration"], seed=data["seed"])
        return found if candidates is None else found.only(candidates)
    work = None if path is None else path.with_name(f"{path.name}.partial")
    found = measure(
        source, progress=progress, format=format, methods=methods or DEFAULT_METHODS, candidates=candidates, work=work,
        **data,
    )  # fmt: skip
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
    return found
