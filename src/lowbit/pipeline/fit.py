"""Mixed precision under a budget: measure each module once, choose bits per module, hand on a recipe.

A measurement is good for any budget: it is kept in a file and used again in seconds.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lowbit import __version__
from lowbit.calibration import CalibrationSet, load_calibration, load_tokenizer
from lowbit.calibration.load import SELF
from lowbit.checkpoint import open_checkpoint, read_json_object, source_hashes, write_json
from lowbit.checkpoint.layers import layer_states
from lowbit.codecs import CODECS
from lowbit.codecs.gguf.architectures import export_plan
from lowbit.errors import CheckpointError, ResourceError, UsageError
from lowbit.formats import IntSpec, parse_spec
from lowbit.pipeline.choices import GroupSensitivity, group_from_json
from lowbit.pipeline.fit_candidates import (
    DEFAULT_CANDIDATES,
    DEFAULT_METHODS,
    DENSE,
    GGUF,
    UNTOUCHED,
    check_methods,
    gguf_choice,
    integer_choice,
    split_choice,
    split_method,
)
from lowbit.pipeline.job import DEMO
from lowbit.pipeline.kv_cache import measure_cache
from lowbit.pipeline.progress import Progress, Silent
from lowbit.pipeline.recipe import Recipe, Rule, suggestion
from lowbit.pipeline.sampling import sample_from
from lowbit.pipeline.sensitivity import measure_sensitivity
from lowbit.pipeline.sensitivity_work import SweepWork
from lowbit.pipeline.streamed import StreamedModel
from lowbit.planning import probe
from lowbit.quant import Option, allocate

__all__ = [
    "Fit",
    "Measurement",
    "check_bits",
    "check_measurement",
    "check_text",
    "choose",
    "gguf_types",
    "measure",
    "measure_caches",
]

_VERSION = 2
"""Of the file that keeps a measurement."""
_ROUTERS = re.compile(r".*(\.gate|\.router|shared_expert_gate)$")


@dataclass(frozen=True, slots=True)
class Measurement:
    """What every candidate does to every group of modules of one checkpoint.

    ``methods`` are those that candidates were solved by (none for GGUF), ``calibration`` the text. ``other_bytes`` are
    those of everything that is not chosen here: embeddings, norms, head, routers. ``caches`` are the divergences of
    cache formats, as far as they were measured. ``embedding`` is the module of the token table where it is chosen.
    """

    source: str
    weights_sha256: Mapping[str, str]
    format: str
    methods: tuple[str, ...]
    calibration: Mapping[str, Any]
    other_bytes: int
    groups: tuple[GroupSensitivity, ...]
    caches: Mapping[str, float] = field(default_factory=dict)
    embedding: str = ""

    @property
    def weights(self) -> int:
        """Weights in all groups."""
        return sum(group.weights for group in self.groups)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The choices that were measured in any group."""
        return tuple(dict.fromkeys(name for group in self.groups for name in group.candidates))

    def only(self, formats: Sequence[str]) -> Measurement:
        """The measurement of these number formats alone, beside what loses nothing.

        Raises :class:`UsageError` for one that was not measured.
        """
        known = {split_choice(name)[0] for name in self.candidates}
        wanted = [name if self.format == GGUF else str(parse_spec(name)) for name in formats]
        if missing := [name for name in wanted if name not in known]:
            raise UsageError(f"--candidates: {missing[0]} is not among those measured ({', '.join(sorted(known))})")
        kept = {*wanted, *UNTOUCHED}
        groups = tuple(
            replace(
                group, candidates={name: one for name, one in group.candidates.items() if split_choice(name)[0] in kept}
            )
            for group in self.groups
        )
        return replace(self, groups=groups)

    def save(self, path: Path) -> None:
        """Write the measurement as JSON."""
        write_json(
            path,
            asdict(self) | {"kind": "lowbit sensitivity", "version": _VERSION},
            way_out="free some space, or name another file",
        )

    @classmethod
    def load(cls, path: Path) -> Measurement:
        """Read it back; :class:`CheckpointError` naming the file if it is none."""
        content = read_json_object(path)
        try:
            if content.pop("kind") != "lowbit sensitivity" or content.pop("version") != _VERSION:
                raise CheckpointError(f"{path}: no measurement of this version of lowbit: name another file")
            groups = tuple(group_from_json(entry) for entry in content.pop("groups"))
            return cls(groups=groups, methods=tuple(content.pop("methods")), **content)
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
        base, by = split_choice(counts.most_common(1)[0][0])
        usual = split_method(by or measurement.methods[0])[1]
        rules = []
        for choice in sorted(set(self.choices.values())):
            format, by = split_choice(choice)
            transform, method = split_method(by or usual)
            if (format, method, transform) == (base, usual, None):
                continue
            names = [name for name, chosen in self.choices.items() if chosen == choice]
            pattern = f"(?:{'|'.join(re.escape(name) for name in names)})$"
            if choice == DENSE:
                rules.append(Rule(pattern, skip=True))
                continue
            rule = Rule(pattern, method=None if method == usual else method, transform=transform)
            spec = parse_spec(format)
            if not isinstance(spec, IntSpec):
                rule = replace(rule, scheme=format)
            elif format != base:
                rule = replace(rule, bits=spec.bits, group_size=spec.group_size, symmetric=spec.symmetric)
            rules.append(rule)
        return Recipe(scheme=base, method=usual, format=measurement.format, rules=tuple(rules))


def measure(
    source: str | Path,
    *,
    format: str = "compressed-tensors",
    methods: Sequence[str] = DEFAULT_METHODS,
    candidates: Sequence[str] | None = None,
    calibration: str | Path | None = None,
    samples: int = 64,
    seq_len: int = 256,
    seed: int = 42,
    device: str = "cpu",
    trust_remote_code: bool = False,
    work: Path | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Measure every candidate number format, by every method, in every linear of ``source`` in one sweep over it.

    A GGUF file's types have a search of their own: ``methods`` do not matter there. ``work`` is a folder for what is
    done: a run that was interrupted goes on from there, and deletes it when it is over.

    Raises :class:`UsageError` for a format or candidate that cannot be, :class:`CheckpointError` for the source.
    """
    progress = progress or Silent()
    formats = [*(name for name in CODECS if name != DENSE), GGUF]
    if format not in formats:
        raise UsageError(f"fit cannot write {format!r}{suggestion(format, formats)}")
    methods = () if format == GGUF else check_methods(methods)
    if candidates is not None and not candidates:
        raise UsageError("--candidates: names no number format: give e.g. int4-g128-sym,int8-g128-sym")
    names = candidates or DEFAULT_CANDIDATES.get(format, DEFAULT_CANDIDATES["compressed-tensors"][:1])
    with open_checkpoint(source, trust_remote_code=trust_remote_code) as checkpoint:
        if checkpoint.quantization_config:
            raise UsageError(f"{checkpoint.path}: is quantized already: fit the original model")
        choice = (
            gguf_choice(checkpoint, names)
            if format == GGUF
            else integer_choice(checkpoint, CODECS[format], names, methods)
        )
        model = StreamedModel(checkpoint, device=device, trust_remote_code=trust_remote_code)
        text = _text(model, source, calibration, samples, seq_len, seed)
        hashes = source_hashes(checkpoint.files)
        parts = [__version__, format, hashes, text.sha256, [candidate.name for candidate in choice.candidates], seed]
        key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        with nullcontext() if work is None else SweepWork.kept(work, key) as kept:
            groups = measure_sensitivity(
                model,
                text.ids,
                choice.candidates,
                wanted=lambda n: not _ROUTERS.match(n),
                grouping=choice.grouping,
                tables=choice.tables,
                seed=seed,
                work=kept,
                progress=progress,
            )
        if short := next((group for group in groups if len(group.candidates) < 2), None):
            raise UsageError(f"{short.modules[0]}: no candidate fits its shape: give --candidates of smaller groups")
        return Measurement(
            source=checkpoint.path.name if str(source) != DEMO else DEMO,
            weights_sha256=hashes,
            format=format,
            methods=methods,
            calibration={
                "name": text.name,
                "sha256": text.sha256,
                "samples": samples,
                "seq_len": seq_len,
                "seed": seed,
            },
            other_bytes=choice.other_bytes(groups),
            groups=tuple(groups),
            embedding=next((table.name for table in choice.tables if table.embeds), ""),
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
        found = source_hashes(checkpoint.files)
    if found != dict(measurement.weights_sha256):
        raise UsageError(f"the measurement is of {measurement.source}, whose weights are not those of {source}")


def check_text(measurement: Measurement, source: str | Path, calibration: str | Path, *, seed: int) -> None:
    """Raise :class:`UsageError` if the measurement was made on other text than ``calibration`` gives."""
    made = measurement.calibration
    if str(calibration) == SELF:
        same = (made["name"], made["seed"]) == (SELF, seed)
    else:
        with open_checkpoint(source) as checkpoint:
            tokenizer = load_tokenizer(checkpoint.path)
        shape = {"samples": made["samples"], "seq_len": made["seq_len"]}
        same = load_calibration(calibration, tokenizer, seed=seed, **shape).sha256 == made["sha256"]
    if not same:
        raise UsageError(
            f"the measurement was made on {made['name']} with seed {made['seed']}, not on {calibration} with seed "
            f"{seed}: name another file, or leave out --calibration"
        )


def _too_small(
    measurement: Measurement, table: Sequence[Mapping[str, Option]], budget: int, bits_per_weight: float | None
) -> str:
    least = sum(min(option.bytes for option in options.values()) for options in table)
    missing = (least - budget) / 2**20
    if bits_per_weight is not None:
        floor = 8 * least / measurement.weights
        what = f"--bits-per-weight {bits_per_weight:g} is below the smallest choice, {floor:.3f}: give that"
    else:
        enough = math.ceil((least + measurement.other_bytes) / 1024)
        what = f"the smallest choice is {missing:,.2f} MiB too large: give at least {enough}KiB"
    largest_group = max(table, key=lambda options: max(option.bytes for option in options.values()))
    smallest = split_choice(min(largest_group, key=lambda name: largest_group[name].bytes))[0]
    return f"{what}, or smaller --candidates (the smallest now: {smallest})"
