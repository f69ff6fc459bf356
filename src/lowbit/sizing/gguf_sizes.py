"""The size of a GGUF file of a named mix before it is made."""

from __future__ import annotations

from pathlib import Path

from lowbit.codecs.gguf.architectures import ExportPlan, export_plan
from lowbit.codecs.gguf.container import TensorHeader
from lowbit.codecs.gguf.metadata import MetadataValue
from lowbit.codecs.gguf.mixes import choose_types, find_mix, needs_importance
from lowbit.codecs.gguf.writing import gguf_file_size
from lowbit.errors import LowbitError
from lowbit.formats.ggml.types import GgmlType
from lowbit.pipeline.gguf import AUTO
from lowbit.pipeline.gguf_output import Output, importance_keys
from lowbit.pipeline.gguf_stream import Task
from lowbit.pipeline.job import DEMO
from lowbit.planning import PlannedModule
from lowbit.sizing.headers import HeaderModel
from lowbit.sizing.variant import Variant

REPACKED = frozenset({"Q4_0", "Q4_K", "IQ4_NL", "MXFP4"})
"""Types that llama.cpp copies into another order on a CPU with AVX2 (measured); the mapped originals stay cached."""

_EMBEDDING = "token_embd.weight"
USUAL_TEXT = "general"
"""What is calibrated on where no text is named."""


def gguf_variant(model: HeaderModel, scheme: str) -> Variant:
    """``model`` as a GGUF file of the mix ``scheme``; a variant with a ``problem`` where llama.cpp has no such model.

    The size is exact where the tokenizer is at hand, for the vocabulary is part of the file; else it is a lower bound.
    A mix that needs an importance matrix is taken to have been made with ``--imatrix auto`` and the usual text, whose
    name is part of the file, too.
    """
    mix = find_mix(scheme)
    try:
        plan = export_plan(model.checkpoint)
        types = choose_types(mix, plan.tensors, plan.metadata)
        weighted = any(needs_importance(mix, name, kind) for name, kind in types.items())
        if weighted:
            types = choose_types(mix, plan.tensors, plan.metadata, has_imatrix=True)
        output = Output(
            Path(f"{mix.name}.gguf"),
            model.checkpoint,
            {},
            plan,
            [Task(tensor, types[tensor.name]) for tensor in plan.tensors],
            mix.file_type,
        )
        vocabulary = _vocabulary(model, output)
    except LowbitError as error:
        return Variant(mix.name, "gguf", mix.base_type.bits, problem=str(error))
    headers = output.headers()
    sizes = {_kind_name(plan, header): header.nbytes for header in headers}
    general: dict[str, MetadataValue] = {"general.file_type": mix.file_type, "general.quantization_version": 2}
    metadata = {**plan.metadata, **general, **(vocabulary or {})}
    if weighted:
        metadata |= importance_keys(AUTO, DEMO if model.name == DEMO else USUAL_TEXT, 0, 0)
    repacked = sum(
        header.nbytes
        for header in headers
        if header.type.name in REPACKED and header.name != _EMBEDDING and len(header.shape) > 1
    )
    modules = tuple(PlannedModule(name, shape) for name, shape in model.linears.items())
    bits = _nominal_bits(headers)
    return Variant(
        mix.name,
        "gguf",
        bits,
        {output.path.name: gguf_file_size(metadata, headers)},
        sizes,
        modules,
        vocabulary is not None,
        repacked=repacked,
    )


def _vocabulary(model: HeaderModel, output: Output) -> dict[str, MetadataValue] | None:
    """The keys of the tokenizer, made once for all mixes of a model; None where there is no tokenizer."""
    if not model.checkpoint.has_tokenizer:
        return None
    if not model.vocabulary:
        model.vocabulary.update(output.vocabulary().metadata)
    return model.vocabulary


def _kind_name(plan: ExportPlan, header: TensorHeader) -> str:
    """The tensor under its first source's name, by which kinds are told, kept apart from others of that source."""
    tensor = next(entry for entry in plan.tensors if entry.name == header.name)
    return tensor.sources[0] if tensor.sources else header.name


def _nominal_bits(headers: list[TensorHeader]) -> float:
    """Bits per weight over the matrices."""
    matrices = [header for header in headers if len(header.shape) > 1]
    weights = sum(_count(header.type, header) for header in matrices)
    return 8 * sum(header.nbytes for header in matrices) / max(1, weights)


def _count(kind: GgmlType, header: TensorHeader) -> int:
    return header.nbytes // kind.block_bytes * kind.block_size
