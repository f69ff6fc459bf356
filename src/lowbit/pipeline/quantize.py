"""Quantize a checkpoint: decide everything, check it, then stream block by block."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from lowbit import __version__
from lowbit.checkpoint import Manifest, PartialCheckpoint, check_output, read_manifest
from lowbit.errors import UnsupportedError
from lowbit.pipeline.block import Beside, BlockQuantizer, Load, ModuleReport
from lowbit.pipeline.executor import Executor, Here
from lowbit.pipeline.job import Job, plan_job
from lowbit.pipeline.kv_scales import cache_scheme
from lowbit.pipeline.progress import Progress, Silent
from lowbit.pipeline.stages import Stage
from lowbit.pipeline.store import ActivationStore
from lowbit.planning import peak_memory
from lowbit.quant import METHODS, Pace
from lowbit.quant.best import DEFAULT_BUDGET, parse_budget

TOKENS_PER_FORWARD = 2048
"""Tokens that go through a block at a time: enough for matrix products at full rate."""


_HANDFUL = 16
"""Numbers that describe a matrix rather than make it up."""


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What :func:`quantize` wrote. Sizes in bytes, times in seconds.

    ``held_out`` are int64 ``[n, seq_len]`` token ids of the calibration text that were not calibrated on; ``quality``
    is the certificate, once measured.
    """

    source: Path
    out: Path
    format: str
    method: str
    scheme: str
    modules: tuple[ModuleReport, ...]
    linear_bits_per_weight: float
    size_bytes: int
    source_bytes: int
    seconds: float
    peak_memory_bytes: int
    calibration: dict[str, Any] | None
    notes: tuple[str, ...]
    held_out: torch.Tensor | None = None
    quality: dict[str, Any] | None = None

    @property
    def starved(self) -> tuple[str, ...]:
        """Experts that saw too few tokens and were solved without statistics."""
        return tuple(module.name for module in self.modules if module.starved)


def quantize(
    source: str | Path,
    out: str | Path,
    *,
    progress: Progress | None = None,
    resume: bool = False,
    overwrite: bool = False,
    executor: Executor | None = None,
    **settings: Any,
) -> QuantizeResult:
    """Quantize the checkpoint ``source`` into the directory ``out``.

    ``executor`` has the workers (None: this process); the bytes do not depend on it.

    ``settings`` are the fields of :class:`lowbit.pipeline.job.Settings`. Nothing is written before every check has
    passed; ``out`` appears only when it is complete. A run that was stopped goes on with ``resume`` and ends with the
    same bytes. Raises a :class:`lowbit.errors.LowbitError` for anything that is the user's to mend.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    check_output(Path(out), resume=resume, overwrite=overwrite)
    executor = executor or Here()
    with plan_job(source, Path(out), settings) as job, torch.no_grad():
        if executor.apart:
            _refuse_apart(job)
        for note in job.notes:
            progress.message(note)
        with PartialCheckpoint.create(Path(out), job.fingerprint, resume=resume, overwrite=overwrite) as partial:
            reports = _reports(Path(out)) if partial.finished else _run(job, partial, progress, executor)
            found = _notes(reports)
            if not partial.finished:
                _finish(job, partial, reports)
        for note in found:
            progress.message(note)
        target = Path(out)
        weights = sum(report.weights for report in reports)
        return QuantizeResult(
            source=job.checkpoint.path,
            out=target,
            format=job.codec.name,
            method=job.recipe.method,
            scheme=str(job.recipe.spec),
            modules=tuple(reports),
            linear_bits_per_weight=sum(r.bits_per_weight * r.weights for r in reports) / max(1, weights),
            size_bytes=sum(file.stat().st_size for file in target.glob("*.safetensors")),
            source_bytes=job.checkpoint.total_bytes,
            seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory(),
            calibration=job.calibration_record(),
            notes=(*job.notes, *found),
            held_out=job.held_out,
        )


def _refuse_apart(job: Job) -> None:
    """Raise for what cannot be shared out to workers with the same result."""
    if job.model.device.type != "cpu":
        raise UnsupportedError("--ray: workers compute on processors", ["add --device cpu, or leave --ray out"])
    reasons = {
        "block": "it tunes a block on all batches at once",
        "candidates": "what it tries depends on the time that is left",
    }
    for name, entry in job.plan.items():
        if entry is not None and (reason := reasons.get(METHODS[entry.method].scope)) is not None:
            raise UnsupportedError(
                f"{name}: method {entry.method} on several workers", [f"{reason}: use another, or leave --ray out"]
            )


def _run(job: Job, partial: PartialCheckpoint, progress: Progress, executor: Executor) -> list[ModuleReport]:
    """Stream the blocks that the journal does not have yet; returns the reports of all."""
    reports = [ModuleReport(**record) for entry in partial.journal for record in entry.get("modules", [])]
    done = len(partial.journal)
    count = len(job.model.block_names)
    progress.start(f"{job.recipe.method} {job.recipe.spec}", count)
    stores = _stores(job, partial.scratch) if job.calibration is not None else None
    if done == 0:
        if stores is not None:
            _embed(job, stores)
        partial.commit_part(0, job.shell_tensors(), {"modules": []})
        done = 1
    stages: dict[tuple[str, ...], list[Stage]] = {}
    pace = _pace(job, partial)
    for index in range(count):
        name = job.model.stored_name(job.model.block_names[index])
        if index + 1 < done:
            progress.advance(name, resumed="yes")
            continue
        began = time.perf_counter()
        job.prefetch(index + 1)
        spent = pace.spent
        block = _quantize_block(job, index, stores, stages, progress, pace, executor)
        tensors = block.tensors()
        block.reports = [_as_stored(report, tensors) for report in block.reports]
        record: dict[str, Any] = {"modules": [report.to_json() for report in block.reports]}
        if pace.spent > spent:
            record["seconds"] = pace.spent - spent
        partial.commit_part(index + 1, tensors, record)
        reports += block.reports
        progress.advance(name, **_fields(job, block.reports, time.perf_counter() - began))
        # Two blocks are never to be in memory at once, and a block refers to itself: nobody else lets go of it.
        del block, tensors
        gc.collect()
    progress.close()
    if stores is not None:
        for store in (*stores.states, *stores.beside):
            store.close()
    return reports


def _as_stored(report: ModuleReport, tensors: Mapping[str, torch.Tensor]) -> ModuleReport:
    """``report`` with the bits that its weights take in the file, padding included.

    Arrays count that grow with the matrix: no bias, no shapes, no scale of the inputs.
    """
    inside = {
        name.removeprefix(f"{report.name}."): t for name, t in tensors.items() if name.startswith(f"{report.name}.")
    }
    stored = sum(t.nbytes for name, t in inside.items() if name != "bias" and t.numel() > _HANDFUL)
    return replace(report, bits_per_weight=8 * stored / report.weights)


def _pace(job: Job, partial: PartialCheckpoint) -> Pace:
    """The time that methods with candidates have left, after what the journal says was spent."""
    sizes = {
        name: shape[0] * shape[1]
        for name, shape in job.model.linear_shapes().items()
        if (entry := job.plan[name]) is not None and METHODS[entry.method].scope == "candidates"
    }
    solved = {record["name"] for entry in partial.journal for record in entry.get("modules", [])}
    spent = sum(float(entry.get("seconds", 0.0)) for entry in partial.journal)
    seconds = parse_budget(job.recipe.budget or str(job.recipe.options.get("budget", DEFAULT_BUDGET)))
    return Pace(seconds, sum(sizes.values()), spent, sum(size for name, size in sizes.items() if name in solved))


def _reports(out: Path) -> list[ModuleReport]:
    """The reports of a run that an earlier process finished."""
    manifest = read_manifest(out)
    return [] if manifest is None else [ModuleReport(name=name, **rest) for name, rest in manifest.modules.items()]


@dataclass(frozen=True, slots=True)
class _Stores:
    """Hidden states before and after a block, of the quantized model and, where it runs ``beside``, the float one."""

    states: tuple[ActivationStore, ...]
    beside: tuple[ActivationStore, ...]


def _stores(job: Job, scratch: Path) -> _Stores:
    assert job.calibration is not None
    samples, length = job.calibration.ids.shape
    shape = (samples, length, job.model.hidden_size, job.model.dtype)
    names = ("states-0", "states-1", "float-0", "float-1")[: 4 if job.needs_reference else 2]
    stores = tuple(ActivationStore(scratch / f"{name}.bin", *shape) for name in names)
    return _Stores(stores[:2], stores[2:])


def _batches(job: Job) -> list[tuple[int, int]]:
    """``(first sample, samples)`` of each forward."""
    assert job.calibration is not None
    samples, length = job.calibration.ids.shape
    size = max(1, TOKENS_PER_FORWARD // length)
    return [(first, min(size, samples - first)) for first in range(0, samples, size)]


def _embed(job: Job, stores: _Stores) -> None:
    assert job.calibration is not None
    written = (*stores.states[:1], *stores.beside[:1])
    for first, count in _batches(job):
        embedded = job.model.embed(job.calibration.ids[first : first + count])
        for store in written:
            store.write(first, embedded)
    for store in written:
        store.sync()


def _loads(job: Job, store: ActivationStore) -> list[Load]:
    return [lambda first=first, count=count: store.read(first, count) for first, count in _batches(job)]  # type: ignore[misc]


def _quantize_block(
    job: Job,
    index: int,
    stores: _Stores | None,
    stages: dict[tuple[str, ...], list[Stage]],
    progress: Progress,
    pace: Pace,
    executor: Executor,
) -> BlockQuantizer:
    tokens = 0 if job.calibration is None else job.calibration.ids.numel()
    block = BlockQuantizer(
        job.model, index, job.block_plan(index), job.recipe, job.codec, tokens, progress, pace, executor
    )
    if stores is None:
        block.solve_without_statistics()
        return block
    target = stores.states[(index + 1) % 2]
    loads = _loads(job, stores.states[index % 2])
    kind = tuple(block.linears)
    if kind not in stages:
        stages[kind] = block.stages(loads[0])
    firsts = [first for first, _ in _batches(job)]
    beside = None
    if stores.beside:
        outputs = stores.beside[(index + 1) % 2]
        beside = Beside(
            _loads(job, stores.beside[index % 2]),
            lambda batch, output: outputs.write(firsts[batch], output),
            _loads(job, outputs),
        )
    block.run(
        loads,
        lambda batch, output: target.write(firsts[batch], output),
        stages=stages[kind],
        keep=job.decisions.keep_states,
        group_limit=job.decisions.group_limit,
        beside=beside,
    )
    for store in (target, *stores.beside[(index + 1) % 2 :][:1]):
        store.sync()
    return block


def _fields(job: Job, reports: Sequence[ModuleReport], seconds: float) -> dict[str, float | str]:
    """What the progress bar shows beside a finished block."""
    fields: dict[str, float | str] = {"memory": float(psutil.Process().memory_info().rss)}
    errors = [report.error for report in reports if report.error is not None]
    if errors:
        fields["error"] = sum(errors) / len(errors)
    if job.calibration is not None:
        fields["tokens_per_second"] = job.calibration.ids.numel() / max(seconds, 1e-9)
    return fields


def _notes(reports: Sequence[ModuleReport]) -> list[str]:
    notes = []
    if starved := [report.name for report in reports if report.starved]:
        notes.append(
            f"{len(starved)} experts saw too few calibration tokens and were rounded without statistics "
            f"(first: {starved[0]}): more or more varied --samples reach them"
        )
    if raised := [r for r in reports if r.damping is not None and r.damping > 0.0101]:
        most = max(report.damping or 0 for report in raised)
        notes.append(f"{len(raised)} modules needed more damping than asked for (most: {most:.3f})")
    if late := sum(bool(report.left_out) for report in reports):
        notes.append(f"{late} modules were solved with fewer candidates: time ran out (--budget)")
    if dropped := sum(report.dropped for report in reports):
        notes.append(f"{dropped} calibration rows were not finite and were left out")
    return notes


def _finish(job: Job, partial: PartialCheckpoint, reports: Sequence[ModuleReport]) -> None:
    """Write config, manifest and tokenizer, and let the output directory appear."""
    config = {k: v for k, v in job.checkpoint.config.items() if k not in ("quantization_config", "compression_config")}
    quantization = job.codec.config(job.specs(), job.left_dense(), inputs=job.inputs(), details=job.details())
    if quantization:
        if job.recipe.kv_cache is not None:
            quantization["kv_cache_scheme"] = cache_scheme(job.recipe.kv_cache)
        config["quantization_config"] = quantization
    manifest = Manifest(
        fingerprint=job.fingerprint,
        lowbit_version=__version__,
        source=job.source_record(),
        recipe=job.recipe.to_dict(),
        calibration=job.calibration_record(),
        modules={report.name: {k: v for k, v in report.to_json().items() if k != "name"} for report in reports},
        expert_coverage=job.coverage(reports),
    )
    partial.finish(config, manifest=manifest, copy_files=job.checkpoint.auxiliary_files())
