"""Store a checkpoint as a GGUF file without quantizing it: floats as floats, integer grids code by code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint import Checkpoint, read_manifest
from lowbit.codecs import StoredModule, module_plan, open_model, stored_format
from lowbit.codecs.codec import StoredBlocks, StoredGrid
from lowbit.codecs.conversion import ConversionResult, convert_checkpoint
from lowbit.codecs.fitting import is_centred
from lowbit.codecs.gguf.architectures import ExportTensor, export_plan
from lowbit.codecs.gguf.mixes import MIXES, choose_types, find_mix
from lowbit.codecs.reading import local_tensors
from lowbit.errors import UnsupportedError, UsageError
from lowbit.formats.ggml import GGML_TYPES, GgmlType
from lowbit.formats.ggml.grids import BLOCK, Rounding, grid_type
from lowbit.formats.spec import IntSpec
from lowbit.pipeline.gguf_output import Output, SourceHashes, WrittenModel, check_name, is_gguf_name, named
from lowbit.pipeline.gguf_stream import Task
from lowbit.pipeline.progress import Progress, Silent
from lowbit.pipeline.streamed import model_dtype

__all__ = ["GGUF_DTYPES", "convert", "convert_to_gguf"]

GGUF_DTYPES: Mapping[str, str] = {
    "bf16": "BF16",
    "bfloat16": "BF16",
    "f16": "F16",
    "fp16": "F16",
    "float16": "F16",
    "f32": "F32",
    "fp32": "F32",
    "float32": "F32",
    "q8_0": "Q8_0",
}
"""Spellings of ``--dtype`` for a GGUF file, and the mix that each stands for."""

_BY_DTYPE = {torch.bfloat16: "BF16", torch.float16: "F16"}
_ORDERS = ("g_idx", "weight_g_idx")
_ZEROS = ("qzeros", "weight_zero_point")
_WAY_OUT = "requantize it: lowbit quantize SOURCE OUT.gguf --scheme Q4_K_M"


def convert(
    source: str | Path,
    out: str | Path,
    format: str | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    split_bytes: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ConversionResult:
    """Store the checkpoint ``source`` in another format: a GGUF file if ``out`` ends in ``.gguf``, else a directory.

    See :func:`convert_to_gguf` and :func:`lowbit.codecs.conversion.convert_checkpoint`.
    """
    shared: dict[str, Any] = {
        "overwrite": overwrite,
        "revision": revision,
        "allow_pickle": allow_pickle,
        "trust_remote_code": trust_remote_code,
        "progress": progress,
    }
    if format == "gguf" or (format is None and is_gguf_name(out)):
        if resume:
            raise UsageError("--resume has no meaning for a GGUF file: start the conversion again")
        return convert_to_gguf(source, out, dtype, split_bytes=split_bytes, **shared)
    if is_gguf_name(out):
        raise UsageError(f"{out}: --format {format} makes a directory: leave --format out, or name a directory")
    if split_bytes is not None:
        raise UsageError("--split-size is for GGUF files: end the output in .gguf")
    if format is None:
        raise UsageError(f"which --format for {out}? Or end its name in .gguf for a GGUF file")
    return convert_checkpoint(source, out, format, dtype, resume=resume, **shared)


def convert_to_gguf(
    source: str | Path,
    out: str | Path,
    dtype: str | torch.dtype | None = None,
    *,
    split_bytes: int | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ConversionResult:
    """Write the checkpoint ``source`` to the GGUF file ``out``.

    Quantized weights keep their codes in Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0; only their scales are rounded to float16, and
    the notes of the result say what that changes. A GPTQ, AWQ or compressed-tensors grid that does not fit raises
    :class:`UnsupportedError` with the reason, before anything is written. Weights that are not quantized are stored as
    ``dtype`` (f16, bf16, f32 or q8_0; default: the model's).
    """
    out = Path(out)
    progress = progress or Silent()
    check_name(out, overwrite=overwrite)
    with (
        open_model(
            source, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
        ) as checkpoint,
        SourceHashes(checkpoint) as hashes,
        torch.no_grad(),
    ):
        plan = module_plan(checkpoint)
        export = named(export_plan(checkpoint, plan), source)
        base = find_mix(_base(checkpoint, dtype))
        chosen = choose_types(base, export.tensors, export.metadata)
        carried = _carried(checkpoint, plan, export.tensors)
        tasks = [Task(t, carried.get(t.name, chosen[t.name]), carry=t.name in carried) for t in export.tensors]
        output = Output(out, checkpoint, plan, export, tasks, _file_type(tasks, base.file_type), split_bytes, overwrite)
        output.check()
        vocabulary = output.vocabulary()
        written = output.write(vocabulary, progress, "converting to GGUF", hashes)
        outcome = _outcome(written, tasks)
        recipe = _recipe(checkpoint, plan, outcome, base.name)
        origin = read_manifest(checkpoint.path)
        reports = output.reports(written, "carried over")
        output.write_manifest(written, source, recipe, origin.calibration if origin else None, reports)
    return ConversionResult(
        out=written.files[0].path,
        source_format=stored_format(plan),
        format="gguf",
        modules=len(plan),
        regridded=0,
        exact=outcome.exact,
        notes=(*export.notes, *vocabulary.notes, *outcome.notes),
    )


def _base(checkpoint: Checkpoint, dtype: str | torch.dtype | None) -> str:
    """Name of the mix for what is not quantized."""
    if dtype is None:
        return _BY_DTYPE.get(model_dtype(checkpoint), "F32")
    name = str(dtype).removeprefix("torch.").lower()
    if name not in GGUF_DTYPES:
        raise UsageError(f"unknown dtype {dtype!r} of a GGUF file: use f16, bf16, f32 or q8_0")
    return GGUF_DTYPES[name]


def _carried(
    checkpoint: Checkpoint, plan: Mapping[str, StoredModule], tensors: tuple[ExportTensor, ...]
) -> dict[str, GgmlType]:
    """The type of each tensor whose sources are quantized; :class:`UnsupportedError` where a grid does not fit."""
    types = {}
    for tensor in tensors:
        modules = [source.removesuffix(".weight") for source in tensor.sources]
        if not modules or not any(module in plan for module in modules):
            continue
        found = {_type_of(checkpoint, module, plan.get(module)) for module in modules}
        # One tensor has one type: centred grids of some experts go the way of the others.
        if len(found) > 1 and {str(kind) for kind in found} <= {"Q4_0", "Q4_1"}:
            found = {GGML_TYPES["Q4_1"]}
        if len(found) > 1 and {str(kind) for kind in found} <= {"Q5_0", "Q5_1"}:
            found = {GGML_TYPES["Q5_1"]}
        if len(found) > 1:
            raise UnsupportedError(
                f"{tensor.name}: its experts are stored as {', '.join(sorted(map(str, found)))}, and a GGUF tensor has "
                "one type",
                [_WAY_OUT],
            )
        types[tensor.name] = found.pop()
    return types


def _type_of(checkpoint: Checkpoint, module: str, entry: StoredModule | None) -> GgmlType:
    if isinstance(entry, StoredBlocks):
        return entry.spec
    if entry is None:
        raise UnsupportedError(f"{module} is not quantized as its fellow experts are", [_WAY_OUT])
    for order in _local(checkpoint, module, entry, _ORDERS).values():
        blocks = order[: len(order) // BLOCK * BLOCK].view(-1, BLOCK)
        if not bool((blocks == blocks[:, :1]).all()):
            raise UnsupportedError(
                f"{module}: its columns are in activation order (g_idx), so that a block of {BLOCK} has several scales",
                [_WAY_OUT],
            )
    if not isinstance(entry.spec, IntSpec) or entry.spec.has_float_zeros:
        raise UnsupportedError(f"{module}: {entry.spec} is no integer grid that a GGUF type holds exactly", [_WAY_OUT])
    zeros = _local(checkpoint, module, entry, _ZEROS)
    centred = entry.spec.symmetric or is_centred(entry.spec, entry.codec.zero_points(zeros, entry.spec, entry.shape))
    try:
        return grid_type(entry.spec, entry.shape[1], centred=centred)
    except UnsupportedError as error:
        raise UnsupportedError(f"{module}: {error}") from error


def _local(checkpoint: Checkpoint, module: str, entry: StoredGrid, wanted: tuple[str, ...]) -> dict[str, torch.Tensor]:
    names = local_tensors(checkpoint, module, entry)
    return {local: checkpoint.read(names[local]) for local in wanted if local in names}


def _file_type(tasks: list[Task], base: int) -> int:
    """llama.cpp's number for what most carried weights are stored as."""
    counts: Counter[str] = Counter()
    for task in tasks:
        if task.carry:
            counts[str(task.type)] += 1
    by_base = {mix.base: mix.file_type for mix in reversed(list(MIXES.values()))}
    return by_base[counts.most_common(1)[0][0]] if counts else base


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What the conversion changed."""

    exact: bool
    notes: tuple[str, ...]
    rounding: Rounding


def _outcome(written: WrittenModel, tasks: list[Task]) -> _Outcome:
    total = Rounding()
    for task in tasks:
        total += written.tallies[task.tensor.name].rounding
    return _Outcome(
        exact=all(tally.error == 0.0 for tally in written.tallies.values()),
        notes=tuple(_notes(total, written, tasks)),
        rounding=total,
    )


def _notes(total: Rounding, written: WrittenModel, tasks: list[Task]) -> Iterator[str]:
    if total.scales and total.exact and not total.changed:
        yield f"codes and all {total.scales:,} scales carried over as they are"
    elif total.scales:
        yield (
            f"codes carried over as they are; {total.changed:,} of {total.scales:,} scales rounded to float16 "
            f"(at most {total.largest:.2g} of the scale), which with the minima changes the weights by "
            f"{total.relative:.2g} of their root mean square"
        )
    lossy = [task for task in tasks if not task.carry and written.tallies[task.tensor.name].error > 0]
    if lossy:
        kinds = ", ".join(sorted({str(task.type) for task in lossy}))
        yield f"{len(lossy)} tensors are rounded to {kinds}"


def _recipe(checkpoint: Checkpoint, plan: Mapping[str, StoredModule], outcome: _Outcome, base: str) -> dict[str, Any]:
    origin = read_manifest(checkpoint.path)
    recipe: dict[str, Any] = {
        "convert": {"from": stored_format(plan), "format": "gguf", "dtype": base, "exact": outcome.exact}
    }
    if outcome.rounding.scales:
        recipe["convert"]["scales"] = {
            "count": outcome.rounding.scales,
            "changed": outcome.rounding.changed,
            "largest_change": outcome.rounding.largest,
            "relative_change_of_weights": outcome.rounding.relative,
        }
    if origin:
        recipe["source"] = origin.recipe
    return recipe
