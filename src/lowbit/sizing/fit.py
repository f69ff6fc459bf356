"""The best checkpoint that fits: measure, choose, quantize, and compare what was predicted with what came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.checkpoint import check_output
from lowbit.errors import ResourceError, UsageError
from lowbit.evaluation.certify import CERTIFY_TOKENS, quantize
from lowbit.pipeline.fit import (
    GGUF,
    GGUF_BASE,
    UNTOUCHED,
    Fit,
    Measurement,
    check_measurement,
    choose,
    gguf_types,
    measure,
)
from lowbit.pipeline.gguf_output import check_name, is_gguf_name
from lowbit.pipeline.progress import Progress, Silent
from lowbit.pipeline.quantize import QuantizeResult
from lowbit.planning.kv_dtypes import LLAMA_CPP, VLLM
from lowbit.sizing.estimate import estimate
from lowbit.sizing.fit_plots import draw_fit

__all__ = ["FitResult", "fit"]

CURVE_POINTS = 24
"""Budgets between the smallest and the largest choice that the plot's curve is drawn through."""


@dataclass(frozen=True, slots=True)
class FitResult:
    """What :func:`fit` chose, and the checkpoint that it made of it.

    ``predicted`` is the KL divergence in nats per token that was expected; ``result.quality`` has the measured one.
    """

    fit: Fit
    predicted: float
    result: QuantizeResult
    measurement: Measurement
    plots: tuple[Path, ...] = ()


def fit(
    source: str | Path,
    out: str | Path,
    *,
    size: int | None = None,
    bits_per_weight: float | None = None,
    memory: int | None = None,
    context: int | None = None,
    concurrency: int = 1,
    kv_dtype: str = "auto",
    format: str = "compressed-tensors",
    method: str = "gptq",
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
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> FitResult:
    """Quantize ``source`` into ``out`` with the bits per module that lose least within a budget.

    The budget is ``size`` bytes on disk, ``bits_per_weight`` of the linears, or ``memory``: bytes of a device that must
    hold the weights, the cache of ``concurrency`` requests of ``context`` tokens in ``kv_dtype``, and the engine
    (vLLM, or llama.cpp for a GGUF file), as :func:`lowbit.estimate` counts them. An ``out`` that ends in ``.gguf``
    becomes a GGUF file.

    ``measurements`` is a file: read if it is there, written if not, so that the next budget takes seconds.
    ``report`` is a directory for the pictures. Raises :class:`ResourceError` for a budget that is too small, by how
    much; everything :func:`lowbit.quantize` raises besides.
    """
    progress = progress or Silent()
    if sum(budget is not None for budget in (size, bits_per_weight, memory)) != 1:
        raise UsageError("fit needs one budget: --size, --bits-per-weight or --memory")
    if is_gguf_name(out):
        format = GGUF
    if memory is not None:
        size = _room(source, memory, context, concurrency, kv_dtype, format, progress)
    if format == GGUF:
        check_name(Path(out), overwrite=overwrite)
    else:
        check_output(Path(out), resume=False, overwrite=overwrite)
    measurement = _measurement(
        source, measurements, progress, format=format, method=method, candidates=candidates, calibration=calibration,
        seed=seed, device=device, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    chosen = choose(measurement, total_bytes=size, bits_per_weight=bits_per_weight)
    progress.message(
        f"chose {chosen.bits_per_weight:.3f} bits per weight: predicted KL divergence {chosen.divergence:.4g} nats"
    )
    if format == GGUF:
        how: dict[str, Any] = {"scheme": GGUF_BASE, "imatrix": "auto", "types": gguf_types(source, chosen)}
    else:
        how = {"recipe": chosen.recipe(measurement)}
    result = quantize(
        source, out, **how, calibration=calibration, samples=samples, seq_len=seq_len, seed=seed,
        certify_tokens=certify_tokens, device=device, memory=work_memory, overwrite=overwrite,
        trust_remote_code=trust_remote_code, progress=progress,
    )  # fmt: skip
    plots: tuple[Path, ...] = ()
    if report is not None:
        plots = draw_fit(Path(report), measurement, chosen, curve(measurement), result.quality)
    return FitResult(chosen, chosen.divergence, result, measurement, plots)


def _room(
    source: str | Path,
    memory: int,
    context: int | None,
    concurrency: int,
    kv_dtype: str,
    format: str,
    progress: Progress,
) -> int:
    """Bytes that weights may take of ``memory`` beside everything else."""
    engine = LLAMA_CPP if format == GGUF else VLLM
    scheme = GGUF_BASE if format == GGUF else "int4-g128-sym"
    estimated = estimate(
        source,
        schemes=[scheme],
        format="compressed-tensors" if format == GGUF else format,
        context=context,
        concurrency=concurrency,
        kv_dtype=kv_dtype,
        engine=engine,
        gpus=1,
        gpu_memory=memory,
    )
    precision = estimated.precisions[0]
    if not precision.parts:
        raise UsageError(precision.problem)
    others = precision.total - precision.parts["weights"]
    room = precision.budget - others
    told = f"{estimated.context:,} tokens for {concurrency} and {estimated.engine} take {others / 2**30:.2f} GiB"
    if room <= 0:
        raise ResourceError(
            f"--memory: {told}, {-room / 2**30:.2f} GiB more than the engine may use of {memory / 2**30:.2f} GiB: "
            "lower --context or --concurrency, or a smaller --kv-dtype"
        )
    progress.message(f"{told}; {room / 2**30:.2f} GiB are left for weights")
    return room


def curve(measurement: Measurement) -> list[Fit]:
    """The best choice at budgets from the smallest to the largest."""
    least = sum(min(one.bytes for one in group.candidates.values()) for group in measurement.groups)
    largest = sum(
        max(one.bytes for name, one in group.candidates.items() if name not in UNTOUCHED)
        for group in measurement.groups
    )
    budgets = [least + (largest - least) * i // (CURVE_POINTS - 1) for i in range(CURVE_POINTS)]
    return [choose(measurement, total_bytes=measurement.other_bytes + budget) for budget in budgets]


def _measurement(source: str | Path, file: str | Path | None, progress: Progress, **settings: Any) -> Measurement:
    path = None if file is None else Path(file)
    if path is not None and path.exists():
        found = Measurement.load(path)
        if (found.format, found.method) != (settings["format"], settings["method"]):
            raise UsageError(f"{path}: measured for {found.format} by {found.method}: name another file")
        check_measurement(found, source)
        return found
    found = measure(source, progress=progress, **settings)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found.save(path)
    return found
