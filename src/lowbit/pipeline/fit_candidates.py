"""What a fit chooses between, by file format: number formats and the methods that solve them, or GGUF's types.

A choice is called after both, ``int4-g128-sym by gptq``; GGUF types have one search each and need no method's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lowbit.checkpoint import Checkpoint
from lowbit.codecs import Codec
from lowbit.codecs.gguf.architectures import export_plan
from lowbit.codecs.gguf.mixes import choose_types, find_mix, may_quantize
from lowbit.codecs.gguf.vocabulary import read_vocabulary
from lowbit.codecs.gguf.writing import TensorHeader, gguf_file_size
from lowbit.errors import UsageError
from lowbit.formats import WeightSpec, parse_spec
from lowbit.formats.ggml import GGML_TYPES, BlockTensor, GgmlType
from lowbit.kernels.ggml import quantize_rows
from lowbit.pipeline.choices import Candidate, Grouping, GroupSensitivity, OneInput, Restorable, Table, shared_choices
from lowbit.pipeline.recipe import suggestion
from lowbit.pipeline.streamed import model_dtype
from lowbit.quant import METHODS, InputStatistics
from lowbit.quant.transforms import TRANSFORMS

__all__ = [
    "DEFAULT_CANDIDATES",
    "DEFAULT_METHODS",
    "DENSE",
    "GGUF",
    "GGUF_BASE",
    "UNTOUCHED",
    "FormatChoice",
    "check_methods",
    "gguf_choice",
    "integer_choice",
    "name_choice",
    "split_choice",
    "split_method",
]

DENSE = "dense"
"""The candidate that leaves a module as it is."""
GGUF = "gguf"
UNTOUCHED = (DENSE, "F16")
"""Candidates that lose nothing worth counting."""
GGUF_BASE = "Q4_K_M"
"""The mix that says what becomes of the tensors of a GGUF file that are not chosen (norms, routers)."""

DEFAULT_CANDIDATES: Mapping[str, tuple[str, ...]] = {
    # Widths that vLLM has kernels for in each format; finer groups fill the steps between them.
    "compressed-tensors": ("int4-g128-sym", "int4-g64-sym", "int4-g32-sym", "int8-g128-sym"),
    "gguf": ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
    "gptq": ("int2-g64-sym", "int3-g128-sym", "int4-g128-sym", "int4-g32-sym", "int8-g128-sym"),
}
"""Number formats to choose between, by file format; ``dense`` is always one more."""
DEFAULT_METHODS = ("gptq", "awq+gptq")
"""Methods to choose between; ``T+M`` is the method ``M`` after the transform ``T``."""
_WIDE = 6
"""Bits from which on methods differ by nothing that counts: the first alone is tried."""

_BY = " by "
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
"""The tensors of a GGUF file that are no block's."""
_GGUF_EXTRA = 512
"""Bytes of the metadata that name the importance matrix, at most."""
_HEADER_BYTES = 160
"""Bytes of a safetensors header per tensor, at most, for names of usual length."""


@dataclass(frozen=True, slots=True)
class FormatChoice:
    """What a file format offers: candidates, what must share one, matrices outside the blocks that are chosen too, and
    the bytes of what is not chosen."""

    candidates: Sequence[Candidate]
    grouping: Grouping
    tables: Sequence[Table]
    other_bytes: Callable[[Sequence[GroupSensitivity]], int]


def name_choice(format: str, method: str) -> str:
    """What a number format solved by a method is called."""
    return f"{format}{_BY}{method}"


def split_choice(choice: str) -> tuple[str, str | None]:
    """Number format (or GGUF type, or ``dense``) and method of a choice."""
    format, _, method = choice.partition(_BY)
    return format, method or None


def split_method(method: str) -> tuple[str | None, str]:
    """Transform, if there is one, and method of ``T+M``."""
    transform, _, solver = method.rpartition("+")
    return transform or None, solver


def check_methods(methods: Sequence[str]) -> tuple[str, ...]:
    """``methods`` without repetitions; :class:`UsageError` for one that is not known or cannot be told from others."""
    unique = tuple(dict.fromkeys(method.strip().lower() for method in methods if method.strip()))
    if not unique:
        raise UsageError("--methods: names no method: give e.g. gptq,awq")
    for method in unique:
        transform, solver = split_method(method)
        if solver not in METHODS:
            raise UsageError(f"--methods: fit cannot measure method {method!r}{suggestion(solver, METHODS)}")
        if transform is not None and transform not in TRANSFORMS:
            raise UsageError(f"--methods: {method}: unknown transform {transform!r}{suggestion(transform, TRANSFORMS)}")
        if len(unique) > 1 and (METHODS[solver].needs_reference or METHODS[solver].scope != "linear"):
            raise UsageError(
                f"--methods: {method} mends what other modules lose, which shows in no module alone: name it alone"
            )
    return unique


def integer_choice(checkpoint: Checkpoint, codec: Codec, names: Sequence[str], methods: Sequence[str]) -> FormatChoice:
    """Number formats of a directory, each by every method that solves it.

    Raises :class:`UsageError` for a format that is unknown or that none of ``methods`` makes.
    """
    dtype = model_dtype(checkpoint)
    candidates: dict[str, Candidate] = {}
    for spec in (parse_spec(name).with_scale_dtype(codec.scale_dtype(dtype)) for name in names):
        problems = {method: METHODS[split_method(method)[1]].supports(spec) for method in methods}
        able = [method for method in methods if not problems[method]]
        if not able:
            raise UsageError(f"--candidates {spec}: {methods[0]}: {problems[methods[0]][0]}")
        for method in able[: 1 if spec.bits >= _WIDE else None]:
            one = _solved(codec, spec, method)
            candidates[one.name] = one

    def other_bytes(groups: Sequence[GroupSensitivity]) -> int:
        chosen = {f"{name}.weight" for group in groups for name in group.modules}
        others = [info.nbytes for name, info in checkpoint.tensors.items() if name not in chosen]
        # A quantized module is stored as three or four tensors.
        return sum(others) + _HEADER_BYTES * (len(others) + 4 * len(chosen))

    return FormatChoice([*candidates.values(), _dense(dtype.itemsize)], shared_choices, (), other_bytes)


def gguf_choice(checkpoint: Checkpoint, names: Sequence[str]) -> FormatChoice:
    """Types of a GGUF file's tensors. Raises :class:`UsageError` for an unknown one."""
    for name in names:
        if name not in GGML_TYPES:
            raise UsageError(f"unknown GGUF type {name!r}{suggestion(name, GGML_TYPES)}")
    export = export_plan(checkpoint)
    tensor_of = {source.removesuffix(".weight"): tensor.name for tensor in export.tensors for source in tensor.sources}

    def grouping(modules: Sequence[str]) -> list[tuple[str, ...]]:
        together: dict[str, list[str]] = {}
        for module in modules:
            together.setdefault(tensor_of.get(module, module), []).append(module)
        return [tuple(group) for group in together.values()]

    def other_bytes(groups: Sequence[GroupSensitivity]) -> int:
        chosen = {tensor_of[name] for group in groups for name in group.modules}
        types = choose_types(find_mix(GGUF_BASE), export.tensors, export.metadata, has_imatrix=True)
        others = [TensorHeader(t.name, types[t.name], t.shape) for t in export.tensors if t.name not in chosen]
        rows = next(t.shape[0] for t in export.tensors if t.name == EMBEDDING)
        vocabulary = read_vocabulary(checkpoint.path, rows, checkpoint.config)
        names_only = [TensorHeader(name, GGML_TYPES["F32"], (0,)) for name in chosen]
        return gguf_file_size({**export.metadata, **vocabulary.metadata}, [*others, *names_only]) + _GGUF_EXTRA

    kinds = [*names, *(["F16"] if "F16" not in names else [])]
    tied = all(tensor.name != HEAD for tensor in export.tensors)
    tables = [
        Table(
            tensor.sources[0].removesuffix(".weight"),
            (tensor.shape[0], tensor.shape[1]),
            embeds=tensor.name == EMBEDDING,
            head=tied or tensor.name == HEAD,
        )
        for tensor in export.tensors
        if tensor.name in (EMBEDDING, HEAD) and may_quantize(tensor)
    ]
    # the first rows of a checkpoint's matrix are those of the file's where all are meant, or none is moved
    score_rows = {
        tensor.sources[0].removesuffix(".weight"): tensor.score_rows
        for tensor in export.tensors
        if tensor.score_rows and (tensor.row_order is None or tensor.score_rows == tensor.shape[0])
    }
    return FormatChoice([_blocks(GGML_TYPES[name], score_rows) for name in kinds], grouping, tables, other_bytes)


def _solved(codec: Codec, spec: WeightSpec, method: str) -> Candidate:
    before, solver = split_method(method)
    chosen = METHODS[solver]
    transform = before or chosen.transform

    def solve(linears: OneInput) -> Mapping[str, Restorable]:
        statistics = linears.statistics
        if statistics is None or not statistics.tokens:
            rtn = METHODS["rtn"]
            return {name: rtn.solve(weight, None, spec, name=name).tensor for name, weight in linears.weights.items()}
        weights, shared, scales = linears.weights, linears.shared, None
        if transform is not None and linears.scalable:
            scaling = TRANSFORMS[transform]
            scales = scaling.search(list(weights.values()), statistics, spec, None, scaling.options())
        if scales is not None:
            copied = {name: tensor.clone() for name, tensor in statistics.state().items()}
            statistics, shared = InputStatistics.from_state(copied).divide_(scales), {}
        found: dict[str, Restorable] = {}
        for name, weight in weights.items():
            scaled = weight if scales is None else weight * scales
            tensor = chosen.solve(scaled, statistics, spec, shared=shared, name=name).tensor
            found[name] = tensor if scales is None else _Scaled(tensor, scales)
        return found

    def size(rows: int, columns: int) -> int | None:
        if spec.group_size > columns or codec.supports(spec, (rows, columns)):
            return None
        return math.ceil(spec.bits_per_weight(rows, columns) * rows * columns / 8)

    return Candidate(name_choice(str(spec), method), solve, size)


@dataclass(frozen=True, slots=True)
class _Scaled:
    """A weight that was quantized with its columns multiplied by ``scales``."""

    tensor: Restorable
    scales: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        return self.tensor.dequantize() / self.scales


def _dense(itemsize: int) -> Candidate:
    return Candidate(DENSE, lambda linears: {}, lambda rows, columns: rows * columns * itemsize, exact=True)


def _blocks(kind: GgmlType, score_rows: Mapping[str, int]) -> Candidate:
    def solve(linears: OneInput) -> Mapping[str, Restorable]:
        statistics = linears.statistics
        importance = None
        if statistics is not None and statistics.tokens:
            importance = (statistics.diagonal / statistics.tokens).cpu().numpy()
        found = {}
        for name, weight in linears.weights.items():
            blocks = quantize_rows(weight.cpu().numpy(), kind, importance, full_size=score_rows.get(name, 0))
            found[name] = BlockTensor(kind, torch.from_numpy(blocks))
        return found

    def size(rows: int, columns: int) -> int | None:
        return rows * kind.row_bytes(columns) if kind.fits(columns) else None

    return Candidate(kind.name, solve, size)
