"""Quantize a checkpoint to a GGUF file: decide everything, check it, then stream tensor by tensor."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lowbit.calibration import CalibrationSet
from lowbit.checkpoint import Checkpoint
from lowbit.codecs import module_plan, open_model, stored_format
from lowbit.codecs.gguf.architectures import ExportPlan, export_plan
from lowbit.codecs.gguf.imatrix import ImportanceMatrix, read_imatrix
from lowbit.codecs.gguf.mixes import (
    Mix,
    choose_types,
    find_mix,
    is_mix,
    may_quantize,
    needs_importance,
    parse_overrides,
)
from lowbit.errors import CheckpointError, UnsupportedError, UsageError
from lowbit.formats import PRESETS
from lowbit.formats.ggml import GgmlType
from lowbit.pipeline.gguf_output import Output, SourceHashes, check_name, importance_keys, is_gguf_name, named
from lowbit.pipeline.gguf_stream import Task
from lowbit.pipeline.imatrix import collect, is_encoder, refuse_encoder, unseen_experts
from lowbit.pipeline.job import DEMO, calibration_data, compute_device
from lowbit.pipeline.progress import Progress, Silent
from lowbit.pipeline.quantize import QuantizeResult
from lowbit.pipeline.recipe import suggestion
from lowbit.pipeline.streamed import StreamedModel
from lowbit.planning import peak_memory, probe

__all__ = ["AUTO", "GGUF_ONLY", "GgufSettings", "is_for_gguf", "quantize_gguf"]

AUTO = "auto"
"""``--imatrix auto``: collect the importance matrix from the calibration text first."""

GGUF_ONLY = ("imatrix", "types", "pure", "split_bytes")
"""Settings that only a GGUF file has."""

_UNWEIGHTED = ("token_embd.weight", "output.weight")


@dataclass(frozen=True, slots=True)
class GgufSettings:
    """What a user can ask of a GGUF file.

    ``scheme`` is a mix such as ``Q4_K_M``; ``imatrix`` a file, ``auto`` or None; ``types`` are ``REGEX=TYPE`` texts;
    ``pure`` gives all matrices one type; ``split_bytes`` bounds each file. The others are those of
    :class:`lowbit.pipeline.job.Settings`; ``calibration`` feeds ``imatrix="auto"`` and the certificate.
    """

    scheme: str | None = None
    imatrix: str | Path | None = None
    types: Sequence[str] = ()
    pure: bool = False
    split_bytes: int | None = None
    calibration: str | Path | None = None
    samples: int = 128
    seq_len: int = 2048
    seed: int = 42
    device: str = "auto"
    memory: int | None = None
    held_out_tokens: int = 4096
    revision: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> GgufSettings:
        """Settings from keyword arguments, those that are None or empty left out.

        Raises :class:`UsageError` for one that has no meaning for a GGUF file.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        given = {
            name: value
            for name, value in values.items()
            if not (value is None or value == [] or (value is False and name != "symmetric"))
        }
        for name in given:
            if name in _ELSEWHERE:
                flag = _FLAGS.get(name, name).replace("_", "-")
                raise UsageError(f"--{flag} has no meaning for a GGUF file: {_ELSEWHERE[name]}")
            if name not in names:
                raise UsageError(f"quantize: unknown argument {name!r}{suggestion(name, names)}")
        return cls(**given)


_FLAGS = {"symmetric": "sym/--asym"}
_SCHEME = "its scheme decides (--scheme Q4_K_M, --type REGEX=TYPE)"
_ELSEWHERE = {
    "method": "each type has its own search, weighted by --imatrix",
    **dict.fromkeys(("bits", "group_size", "symmetric"), _SCHEME),
    "ordering": "columns keep their order",
    **dict.fromkeys(("transform", "rotate", "sparsity", "pruner"), "the weights are rounded as they are"),
    "all_experts": "lowbit imatrix counts what each expert saw",
    "kv_cache": "llama.cpp takes the type of its cache when it starts",
    "recipe": "use --scheme and --type REGEX=TYPE",
    "skip": "keep tensors as floats with --type REGEX=F16",
    "format": "the name of the output says what it is",
    "target": "the file is for llama.cpp",
    "resume": "nothing is kept of an interrupted run: start it again",
}


def is_for_gguf(out: str | Path, scheme: str | None, format: str | None) -> bool:
    """Whether a request is for a GGUF file: by the name of the output, the format, or a scheme that only GGUF has."""
    only = scheme is not None and is_mix(scheme) and scheme.strip().upper() not in PRESETS
    return is_gguf_name(out) or format == "gguf" or only


def quantize_gguf(
    source: str | Path,
    out: str | Path,
    *,
    progress: Progress | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> QuantizeResult:
    """Quantize the checkpoint ``source`` (in any format that lowbit reads) to the GGUF file ``out``.

    ``settings`` are the fields of :class:`GgufSettings`. Nothing is written before every check has passed; ``out``
    appears when it is complete. Raises a :class:`lowbit.errors.LowbitError` for anything that is the user's to mend.
    """
    started = time.perf_counter()
    progress, out = progress or Silent(), Path(out)
    chosen = GgufSettings.of(settings)
    mix = find_mix(chosen.scheme or "Q4_K_M")
    check_name(out, overwrite=overwrite)
    with (
        open_model(
            source,
            revision=chosen.revision,
            allow_pickle=chosen.allow_pickle,
            trust_remote_code=chosen.trust_remote_code,
        ) as checkpoint,
        SourceHashes(checkpoint) as hashes,
        torch.no_grad(),
    ):
        job = _plan(source, checkpoint, out, mix, chosen, overwrite)
        vocabulary = job.output.vocabulary()
        job.notes += [*job.output.export.notes, *vocabulary.notes]
        if chosen.imatrix == AUTO or (_wants_text(source, chosen) and not is_encoder(job.output.export)):
            _calibrate(job, progress)
        for note in job.notes:
            progress.message(note)
        written = job.output.write(vocabulary, progress, f"GGUF {mix.name}", hashes)
        method = "weighted search" if job.matrix is not None else "search"
        reports = job.output.reports(written, method)
        job.output.write_manifest(written, source, job.recipe(), job.calibration_record(), reports)
        weights = sum(report.weights for report in reports)
        return QuantizeResult(
            source=checkpoint.path,
            out=written.files[0].path,
            format="gguf",
            method=method,
            scheme=mix.name,
            modules=reports,
            linear_bits_per_weight=sum(r.bits_per_weight * r.weights for r in reports) / max(1, weights),
            size_bytes=written.size,
            source_bytes=checkpoint.total_bytes,
            seconds=time.perf_counter() - started,
            peak_memory_bytes=peak_memory(),
            calibration=job.calibration_record(),
            notes=tuple(job.notes),
            held_out=job.held_out,
        )


@dataclass(slots=True)
class _Job:
    """One job, ready to run; :func:`_calibrate` adds the data."""

    source: str | Path
    settings: GgufSettings
    mix: Mix
    output: Output
    notes: list[str]
    matrix: ImportanceMatrix | None = None
    calibration: CalibrationSet | None = None
    held_out: torch.Tensor | None = None

    def recipe(self) -> dict[str, Any]:
        """How the file was made, for the manifest."""
        record: dict[str, Any] = {"format": "gguf", "scheme": self.mix.name, "pure": self.settings.pure}
        record["types"] = list(self.settings.types)
        if self.matrix is not None:
            record["imatrix"] = {
                "file": _imatrix_name(self.settings),
                "datasets": list(self.matrix.datasets),
                "entries": len(self.matrix),
                "chunks": self.matrix.chunks,
            }
        return record

    def calibration_record(self) -> dict[str, Any] | None:
        """Name, hash and size of the calibration set, where it was used."""
        if self.calibration is None or self.settings.imatrix != AUTO:
            return None
        samples, seq_len = self.calibration.ids.shape
        return {
            "name": self.calibration.name,
            "sha256": self.calibration.sha256,
            "samples": samples,
            "seq_len": seq_len,
            "tokens": self.calibration.ids.numel(),
            "seed": self.settings.seed,
        }

    def use(self, matrix: ImportanceMatrix) -> None:
        """Weigh the tensors by ``matrix`` and record it in the file."""
        self.matrix = matrix
        tasks = [replace(task, importance=_importance(task, matrix)) for task in self.output.tasks]
        dataset = matrix.datasets[-1] if matrix.datasets else ""
        extra = importance_keys(_imatrix_name(self.settings), dataset, len(matrix), matrix.chunks)
        self.output = replace(self.output, tasks=tasks, extra=extra)


def _plan(
    source: str | Path, checkpoint: Checkpoint, out: Path, mix: Mix, settings: GgufSettings, overwrite: bool
) -> _Job:
    """Decide everything that needs no data; raises before any work if it cannot work."""
    plan = module_plan(checkpoint)
    export = named(export_plan(checkpoint, plan), source)
    overrides = parse_overrides(settings.types)
    types = choose_types(
        mix,
        export.tensors,
        export.metadata,
        has_imatrix=settings.imatrix is not None,
        overrides=overrides,
        pure=settings.pure,
    )
    if settings.imatrix == AUTO:
        refuse_encoder(export, str(checkpoint.path))
    if settings.imatrix is None:
        _ask_for_importance(mix, types)
    tasks = [Task(tensor, types[tensor.name]) for tensor in export.tensors]
    output = Output(out, checkpoint, plan, export, tasks, mix.file_type, settings.split_bytes, overwrite)
    job = _Job(source, settings, mix, output, _fallback_notes(mix, export, types, settings))
    if plan:
        job.notes.append(
            f"the source is quantized already ({stored_format(plan)}), and its rounding stays in the weights: "
            "lowbit convert carries codes over as they are where they fit"
        )
    if settings.imatrix is not None and settings.imatrix != AUTO:
        matrix = read_imatrix(settings.imatrix)
        job.notes += _check_imatrix(matrix, Path(settings.imatrix), mix, tasks)
        job.use(matrix)
    output.check()
    return job


def _wants_text(source: str | Path, settings: GgufSettings) -> bool:
    """Whether text is to be kept for the certificate (that of the demo model has its own)."""
    return settings.calibration is not None and settings.held_out_tokens > 0 and str(source) != DEMO


def _calibrate(job: _Job, progress: Progress) -> None:
    """Read the calibration text, keep some of it for the certificate, and collect the importance matrix if asked."""
    settings = job.settings
    checkpoint = job.output.checkpoint
    device = compute_device(settings.device)
    model = StreamedModel(checkpoint, device=device, trust_remote_code=settings.trust_remote_code)
    chosen = DEMO if settings.calibration is None and str(job.source) == DEMO else settings.calibration
    job.calibration, job.held_out = calibration_data(
        chosen,
        model,
        settings.memory or probe().available // 2,
        samples=settings.samples,
        seq_len=settings.seq_len,
        seed=settings.seed,
        held_out_tokens=settings.held_out_tokens,
        trust_remote_code=settings.trust_remote_code,
    )
    if settings.imatrix != AUTO:
        return
    job.notes += job.calibration.notes
    matrix = collect(model, job.calibration.ids, job.output.export.tensors, job.calibration.name, progress)
    if unseen := unseen_experts(matrix):
        job.notes.append(
            f"{len(unseen)} expert matrices saw no calibration token and are rounded evenly (first: {unseen[0]}): "
            "more or more varied --samples reach them"
        )
    job.use(matrix)


def _imatrix_name(settings: GgufSettings) -> str:
    return AUTO if settings.imatrix == AUTO else Path(str(settings.imatrix)).name


def _ask_for_importance(mix: Mix, types: Mapping[str, GgmlType]) -> None:
    for name, kind in types.items():
        if needs_importance(mix, name, kind):
            raise UnsupportedError(
                f"{mix.name}: {name} as {kind} is worthless without an importance matrix",
                ["add --imatrix auto (with --calibration TEXT), or --imatrix FILE"],
            )


def _check_imatrix(matrix: ImportanceMatrix, path: Path, mix: Mix, tasks: Sequence[Task]) -> list[str]:
    """Refuse a matrix that belongs to another model or leaves out what cannot do without; returns notes."""
    quantized = [task for task in tasks if may_quantize(task.tensor) and task.tensor.name not in _UNWEIGHTED]
    missing = []
    try:
        for task in quantized:
            if _importance(task, matrix) is None:
                missing.append(task)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if quantized and len(missing) == len(quantized):
        raise CheckpointError(
            f"{path}: none of its {len(matrix)} entries is for a tensor of this model "
            f"({next(iter(matrix.values))}; the model has {quantized[0].tensor.name}): it was made for another one"
        )
    for task in missing:
        if needs_importance(mix, task.tensor.name, task.type):
            raise UnsupportedError(
                f"{path}: has no entry for {task.tensor.name}, worthless as {task.type} without one",
                [f"collect it again with lowbit imatrix, or --type '{task.tensor.name}=Q4_K'"],
            )
    if not missing:
        return []
    return [
        f"{len(missing)} of {len(quantized)} matrices are not in the importance matrix and are rounded evenly "
        f"(first: {missing[0].tensor.name})"
    ]


def _importance(task: Task, matrix: ImportanceMatrix) -> npt.NDArray[np.float32] | None:
    if not may_quantize(task.tensor):
        return None
    shape = task.tensor.shape
    return matrix.importance(task.tensor.name, shape[0] if len(shape) == 3 else 1, shape[-1])


def _fallback_notes(mix: Mix, export: ExportPlan, types: Mapping[str, GgmlType], settings: GgufSettings) -> list[str]:
    """A line where the rows of many tensors do not fit the scheme's blocks."""
    base = mix.base_type
    odd = [t for t in export.tensors if may_quantize(t) and not base.fits(t.shape[-1])]
    if not odd or settings.types:
        return []
    used = sorted({str(types[tensor.name]) for tensor in odd})
    return [
        f"{len(odd)} matrices have rows that are no multiple of {base.block_size} (first: {odd[0].name}, "
        f"{odd[0].shape[-1]}) and are stored as {', '.join(used)} instead of {base}"
    ]
