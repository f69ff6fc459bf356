"""Mixed precision under a budget: measure each module once, choose bits per module, hand on a recipe.

A measurement is good for any budget: it is kept in a file and used again in seconds.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lowbit.calibration import CalibrationSet, load_calibration, load_tokenizer
from lowbit.checkpoint import Checkpoint, hash_file, open_checkpoint, read_json_object, write_json
from lowbit.checkpoint.layers import layer_states
from lowbit.codecs import CODECS, Codec
from lowbit.codecs.gguf.architectures import export_plan
from lowbit.codecs.gguf.mixes import choose_types, find_mix
from lowbit.codecs.gguf.vocabulary import read_vocabulary
from lowbit.codecs.gguf.writing import TensorHeader, gguf_file_size
from lowbit.errors import CheckpointError, ResourceError, UsageError
from lowbit.formats import IntSpec, WeightSpec, parse_spec
from lowbit.formats.ggml import GGML_TYPES, BlockTensor, GgmlType
from lowbit.kernels.ggml import quantize_rows
from lowbit.pipeline.job import DEMO
from lowbit.pipeline.kv_cache import measure_cache
from lowbit.pipeline.progress import Progress, Silent
from lowbit.pipeline.recipe import Recipe, Rule, suggestion
from lowbit.pipeline.sampling import sample_from
from lowbit.pipeline.sensitivity import (
    Candidate,
    Grouping,
    GroupSensitivity,
    Measured,
    measure_sensitivity,
    shared_choices,
)
from lowbit.pipeline.streamed import StreamedModel, model_dtype
from lowbit.planning import probe
from lowbit.quant import METHODS, InputStatistics, Option, allocate

__all__ = [
    "DEFAULT_CANDIDATES",
    "Fit",
    "Measurement",
    "check_bits",
    "check_measurement",
    "choose",
    "gguf_types",
    "measure",
    "measure_caches",
]

DENSE = "dense"
"""The candidate that leaves a module as it is."""
GGUF = "gguf"
UNTOUCHED = (DENSE, "F16")
"""Candidates that lose nothing worth counting."""
GGUF_BASE = "Q4_K_M"
"""The mix that says what becomes of embeddings, norms and the head of a GGUF file."""

DEFAULT_CANDIDATES: Mapping[str, tuple[str, ...]] = {
    # Widths that vLLM has kernels for in each format; finer groups fill the steps between them.
    "compressed-tensors": ("int4-g128-sym", "int4-g64-sym", "int4-g32-sym", "int8-g128-sym"),
    "gguf": ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
    "gptq": ("int2-g64-sym", "int3-g128-sym", "int4-g128-sym", "int4-g32-sym", "int8-g128-sym"),
}
"""Number formats to choose between, by file format; ``dense`` is always one more."""

_ROUTERS = re.compile(r".*(\.gate|\.router|shared_expert_gate)$")
_GGUF_EXTRA = 512
"""Bytes of the metadata that name the importance matrix, at most."""
_HEADER_BYTES = 160
"""Bytes of a safetensors header per tensor, at most, for names of usual length."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What every candidate does to every group of modules of one checkpoint.

    ``other_bytes`` are those of everything that is not chosen here: embeddings, norms, head, routers. ``caches`` are
    the divergences of cache formats, as far as they were measured.
    """

    source: str
    weights_sha256: Mapping[str, str]
    format: str
    method: str
    calibration: Mapping[str, Any]
    other_bytes: int
    groups: tuple[GroupSensitivity, ...]
    caches: Mapping[str, float] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """Weights in all groups."""
        return sum(group.weights for group in self.groups)

    def save(self, path: Path) -> None:
        """Write the measurement as JSON."""
        write_json(
            path,
            asdict(self) | {"kind": "lowbit sensitivity", "version": 1},
            way_out="free some space, or name another file",
        )

    @classmethod
    def load(cls, path: Path) -> Measurement:
        """Read it back; :class:`CheckpointError` naming the file if it is none."""
        content = read_json_object(path)
        try:
            if content.pop("kind") != "lowbit sensitivity" or content.pop("version") != 1:
                raise CheckpointError(f"{path}: no measurement of this version: measure again without --measurements")
            groups = tuple(
                GroupSensitivity(
                    tuple(entry["modules"]),
                    int(entry["weights"]),
                    {name: Measured(**values) for name, values in entry["candidates"].items()},
                )
                for entry in content.pop("groups")
            )
            return cls(groups=groups, **content)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: not a measurement of lowbit fit ({error})") from error


@dataclass(frozen=True, slots=True)
class Fit:
    """A choice of one candidate per group: ``choices`` by module, and what it is predicted to come to."""

    choices: Mapping[str, str]
    bytes: int
    divergence: float
    bits_per_weight: float

    def recipe(self, measurement: Measurement) -> Recipe:
        """The recipe that quantizes every module as chosen."""
        counts = Counter(choice for choice in self.choices.values() if choice != DENSE)
        if not counts:
            raise UsageError("the budget holds the model as it is: there is nothing to quantize")
        base = counts.most_common(1)[0][0]
        rules = []
        for choice in sorted(set(self.choices.values()) - {base}):
            names = [name for name, chosen in self.choices.items() if chosen == choice]
            pattern = f"(?:{'|'.join(re.escape(name) for name in names)})$"
            if choice == DENSE:
                rules.append(Rule(pattern, skip=True))
            else:
                spec = parse_spec(choice)
                if isinstance(spec, IntSpec):
                    rules.append(Rule(pattern, bits=spec.bits, group_size=spec.group_size, symmetric=spec.symmetric))
                else:
                    rules.append(Rule(pattern, scheme=choice))
        return Recipe(scheme=base, method=measurement.method, format=measurement.format, rules=tuple(rules))


def measure(
    source: str | Path,
    *,
    format: str = "compressed-tensors",
    method: str = "gptq",
    candidates: Sequence[str] | None = None,
    calibration: str | Path | None = None,
    samples: int = 64,
    seq_len: int = 256,
    seed: int = 42,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Measurement:
    """Measure every candidate number format in every linear of ``source``, by one sweep over the model.

    Raises :class:`UsageError` for a format or candidate that cannot be, :class:`CheckpointError` for the source.
    """
    progress = progress or Silent()
    formats = [*(name for name in CODECS if name != DENSE), GGUF]
    if format not in formats:
        raise UsageError(f"fit cannot write {format!r}{suggestion(format, formats)}")
    if method not in METHODS or METHODS[method].transform is not None:
        usable = [name for name, entry in METHODS.items() if entry.transform is None]
        raise UsageError(f"fit cannot measure method {method!r}{suggestion(method, usable)}")
    if candidates is not None and not candidates:
        raise UsageError("--candidates: names no number format: give e.g. int4-g128-sym,int8-g128-sym")
    names = candidates or DEFAULT_CANDIDATES.get(format, DEFAULT_CANDIDATES["compressed-tensors"][:1])
    with open_checkpoint(source, trust_remote_code=trust_remote_code) as checkpoint:
        if checkpoint.quantization_config:
            raise UsageError(f"{checkpoint.path}: is quantized already: fit the original model")
        choice = (
            _gguf_choice(checkpoint, names) if format == GGUF else _choice(checkpoint, CODECS[format], names, method)
        )
        model = StreamedModel(checkpoint, device=device, trust_remote_code=trust_remote_code)
        text = _text(model, source, calibration, samples, seq_len, seed)
        groups = measure_sensitivity(
            model,
            text.ids,
            choice.candidates,
            wanted=lambda n: not _ROUTERS.match(n),
            grouping=choice.grouping,
            seed=seed,
            progress=progress,
        )
        if short := next((group for group in groups if len(group.candidates) < 2), None):
            raise UsageError(f"{short.modules[0]}: no candidate fits its shape: give --candidates of smaller groups")
        return Measurement(
            source=checkpoint.path.name if str(source) != DEMO else DEMO,
            weights_sha256={file.name: hash_file(file).sha256 for file in checkpoint.files},
            format=format,
            method=method,
            calibration={"name": text.name, "sha256": text.sha256, "tokens": text.tokens},
            other_bytes=choice.other_bytes(groups),
            groups=tuple(groups),
        )


def measure_caches(
    source: str | Path,
    formats: Sequence[str],
    *,
    calibration: str | Path | None = None,
    samples: int = 64,
    seq_len: int = 256,
    seed: int = 42,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, float]:
    """The KL divergence that each cache format causes, on the text that :func:`measure` takes for the same arguments.

    Raises what :func:`lowbit.pipeline.kv_cache.measure_cache` raises.
    """
    with open_checkpoint(source, trust_remote_code=trust_remote_code) as checkpoint:
        model = StreamedModel(checkpoint, device=device, trust_remote_code=trust_remote_code)
        layers = layer_states(checkpoint.config, checkpoint.description, where=str(checkpoint.path))
        text = _text(model, source, calibration, samples, seq_len, seed)
        return measure_cache(model, text.ids, formats, layers, progress=progress)


def _text(
    model: StreamedModel, source: str | Path, calibration: str | Path | None, samples: int, seq_len: int, seed: int
) -> CalibrationSet:
    checkpoint = model.checkpoint
    return load_calibration(
        calibration if calibration is not None or str(source) != DEMO else DEMO,
        load_tokenizer(checkpoint.path, trust_remote_code=checkpoint.trust_remote_code),
        samples=samples,
        seq_len=min(seq_len, int(getattr(model.config, "max_position_embeddings", None) or seq_len)),
        seed=seed,
        generate=sample_from(model, probe().available // 4),
    )


@dataclass(frozen=True, slots=True)
class _Choice:
    """What a file format offers: candidates, what must share one, and the bytes of what is not chosen."""

    candidates: Sequence[Candidate]
    grouping: Grouping
    other_bytes: Callable[[Sequence[GroupSensitivity]], int]


def _choice(checkpoint: Checkpoint, codec: Codec, names: Sequence[str], method: str) -> _Choice:
    dtype = model_dtype(checkpoint)
    specs = [parse_spec(name).with_scale_dtype(codec.scale_dtype(dtype)) for name in names]
    candidates = [_integer(codec, spec, method) for spec in specs]

    def other_bytes(groups: Sequence[GroupSensitivity]) -> int:
        chosen = {f"{name}.weight" for group in groups for name in group.modules}
        others = [info.nbytes for name, info in checkpoint.tensors.items() if name not in chosen]
        # A quantized module is stored as three or four tensors.
        return sum(others) + _HEADER_BYTES * (len(others) + 4 * len(chosen))

    return _Choice([*candidates, _dense(dtype.itemsize)], shared_choices, other_bytes)


def _gguf_choice(checkpoint: Checkpoint, names: Sequence[str]) -> _Choice:
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
        rows = next(t.shape[0] for t in export.tensors if t.name == "token_embd.weight")
        vocabulary = read_vocabulary(checkpoint.path, rows, checkpoint.config)
        names_only = [TensorHeader(name, GGML_TYPES["F32"], (0,)) for name in chosen]
        return gguf_file_size({**export.metadata, **vocabulary.metadata}, [*others, *names_only]) + _GGUF_EXTRA

    kinds = [*names, *(["F16"] if "F16" not in names else [])]
    return _Choice([_blocks(GGML_TYPES[name]) for name in kinds], grouping, other_bytes)


def gguf_types(source: str | Path, fit: Fit) -> list[str]:
    """``REGEX=TYPE`` overrides that give each tensor of a GGUF file of ``source`` the type that was chosen."""
    with open_checkpoint(source) as checkpoint:
        tensors = export_plan(checkpoint).tensors
    chosen = {}
    for tensor in tensors:
        if tensor.sources and (choice := fit.choices.get(tensor.sources[0].removesuffix(".weight"))):
            chosen[tensor.name] = choice
    return [
        f"^(?:{'|'.join(re.escape(name) for name, one in chosen.items() if one == choice)})$={choice}"
        for choice in sorted(set(chosen.values()))
    ]


def choose(measurement: Measurement, *, total_bytes: int | None = None, bits_per_weight: float | None = None) -> Fit:
    """The assignment with the least predicted divergence in a checkpoint of ``total_bytes``, or of so many bits per
    weight in its linears. Raises :class:`ResourceError` saying by how much the budget is too small."""
    if (total_bytes is None) == (bits_per_weight is None):
        raise UsageError("give either a size or bits per weight")
    if bits_per_weight is not None:
        check_bits(bits_per_weight)
        budget = math.floor(bits_per_weight * measurement.weights / 8)
    else:
        assert total_bytes is not None
        budget = total_bytes - measurement.other_bytes
    table = [
        {name: Option(one.bytes, one.divergence) for name, one in group.candidates.items()}
        for group in measurement.groups
    ]
    try:
        names = allocate(table, budget)
    except ResourceError as error:
        raise ResourceError(_too_small(measurement, table, budget, bits_per_weight)) from error
    picked = [group.candidates[name] for group, name in zip(measurement.groups, names, strict=True)]
    linear = sum(one.bytes for one in picked)
    return Fit(
        choices={
            module: name for group, name in zip(measurement.groups, names, strict=True) for module in group.modules
        },
        bytes=linear + measurement.other_bytes,
        divergence=sum(one.divergence for one in picked),
        bits_per_weight=8 * linear / measurement.weights,
    )


def check_bits(bits_per_weight: float) -> None:
    """Raise :class:`UsageError` for a number of bits that no weight can have."""
    if not 0 < bits_per_weight <= 32:
        raise UsageError(f"--bits-per-weight {bits_per_weight:g}: give a number such as 4.25")


def check_measurement(measurement: Measurement, source: str | Path) -> None:
    """Raise :class:`UsageError` if the measurement is of other weights than those of ``source``."""
    with open_checkpoint(source) as checkpoint:
        found = {file.name: hash_file(file).sha256 for file in checkpoint.files}
    if found != dict(measurement.weights_sha256):
        raise UsageError(f"the measurement is of {measurement.source}, whose weights are not those of {source}")


def _too_small(
    measurement: Measurement, table: Sequence[Mapping[str, Option]], budget: int, bits_per_weight: float | None
) -> str:
    least = sum(min(option.bytes for option in options.values()) for options in table)
    missing = (least - budget) / 2**20
    if bits_per_weight is not None:
        floor = 8 * least / measurement.weights
        what = f"--bits-per-weight {bits_per_weight:g} is below the smallest choice, {floor:.3f}"
    else:
        what = f"the smallest choice is {missing:,.1f} MiB too large"
    smallest = min((name for options in table for name in options), key=lambda name: (name == DENSE, name))
    return f"{what}: give more room, or smaller --candidates (the smallest now: {smallest})"


def _integer(codec: Codec, spec: WeightSpec, method: str) -> Candidate:
    def solve(weight: torch.Tensor, statistics: Any, shared: Any, name: str) -> Any:
        usable = statistics if statistics.tokens else None
        chosen = METHODS[method if usable is not None else "rtn"]
        return chosen.solve(weight, usable, spec, shared=shared, name=name).tensor

    def size(rows: int, columns: int) -> int | None:
        if spec.group_size > columns or codec.supports(spec, (rows, columns)):
            return None
        return math.ceil(spec.bits_per_weight(rows, columns) * rows * columns / 8)

    return Candidate(str(spec), solve, size)


class _Same:
    """A weight that is kept as it is."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def dequantize(self) -> torch.Tensor:
        return self._weight


def _dense(itemsize: int) -> Candidate:
    return Candidate(DENSE, lambda weight, *_: _Same(weight), lambda rows, columns: rows * columns * itemsize)


def _blocks(kind: GgmlType) -> Candidate:
    def solve(weight: torch.Tensor, statistics: InputStatistics, shared: Any, name: str) -> BlockTensor:
        importance = None
        if statistics.tokens:
            importance = (statistics.diagonal / statistics.tokens).cpu().numpy()
        return BlockTensor(kind, torch.from_numpy(quantize_rows(weight.cpu().numpy(), kind, importance)))

    def size(rows: int, columns: int) -> int | None:
        return rows * kind.row_bytes(columns) if kind.fits(columns) else None

    return Candidate(kind.name, solve, size)
