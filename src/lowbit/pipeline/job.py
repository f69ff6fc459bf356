"""A quantization job: everything that is decided and checked before the first byte is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit import __version__
from lowbit.calibration import CalibrationSet, ids_hash, load_calibration, load_tokenizer
from lowbit.checkpoint import Checkpoint, open_checkpoint
from lowbit.codecs import CODECS, Codec
from lowbit.errors import UnsupportedError, UsageError
from lowbit.formats import ActivationSpec, DenseSpec, IntSpec, Scheme, WeightSpec, parse_scheme
from lowbit.pipeline.architectures import fused_groups
from lowbit.pipeline.block import ModuleReport
from lowbit.pipeline.candidates import usual_choice
from lowbit.pipeline.checks import Decisions, decide, scan_weights
from lowbit.pipeline.kv_scales import check_kind
from lowbit.pipeline.module_plan import ModulePlan, resolve
from lowbit.pipeline.recipe import Recipe, Rule, suggestion
from lowbit.pipeline.rotate import RotatedCheckpoint
from lowbit.pipeline.sampling import sample_from
from lowbit.pipeline.streamed import StreamedModel, model_dtype
from lowbit.planning import probe
from lowbit.quant import METHODS
from lowbit.quant.best import parse_budget
from lowbit.quant.sparse import PRUNERS, parse_sparsity
from lowbit.quant.transforms import NO_TRANSFORM, TRANSFORMS

DEMO = "demo"
"""Name of the embedded model, and of the text that it was trained on."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user can ask of :func:`lowbit.quantize`.

    ``memory`` is the budget in bytes (default: half of what is free); ``calibration`` a file, preset, hub data set or
    ``self``; ``target`` an engine such as ``vllm==0.32``; ``held_out_tokens`` are kept out of the calibration text.
    """

    scheme: str | None = None
    method: str | None = None
    format: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    ordering: str | None = None
    transform: str | None = None
    rotate: str | None = None
    sparsity: str | None = None
    pruner: str | None = None
    all_experts: bool | None = None
    kv_cache: str | None = None
    budget: str | None = None
    calibration: str | Path | None = None
    samples: int = 128
    seq_len: int = 2048
    seed: int = 42
    recipe: str | Path | Recipe | None = None
    skip: Sequence[str] = ()
    device: str = "auto"
    memory: int | None = None
    target: str | None = None
    held_out_tokens: int = 4096
    revision: str | None = None
    allow_pickle: bool = False
    trust_remote_code: bool = False

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """Settings from keyword arguments; an unknown name raises :class:`UsageError` with a suggestion."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise UsageError(f"quantize: unknown argument {name!r}{suggestion(name, names)}")
        return cls(**values)

    def resolved_recipe(self) -> Recipe:
        """The recipe file with the flags laid over it; without one, the scheme's usual method and format."""
        recipe = self.recipe if isinstance(self.recipe, Recipe) else None
        if recipe is None:
            recipe = Recipe.from_yaml(self.recipe) if isinstance(self.recipe, str | Path) else Recipe()
        names = (
            *("scheme", "method", "format", "bits", "group_size", "symmetric", "ordering", "transform", "kv_cache"),
            *("rotate", "sparsity", "pruner", "all_experts", "budget"),
        )
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.recipe is None and self.scheme is not None:
            method, format = usual_choice(parse_scheme(self.scheme))
            given = {"method": method, "format": format, **given}
        return dataclasses.replace(recipe, **given).with_rules([Rule(pattern, skip=True) for pattern in self.skip])


@dataclass(slots=True)
class Job:
    """One job, ready to run."""

    source: str | Path
    checkpoint: Checkpoint
    model: StreamedModel
    recipe: Recipe
    codec: Codec
    plan: dict[str, ModulePlan | None]
    settings: Settings
    calibration: CalibrationSet | None
    held_out: torch.Tensor | None
    decisions: Decisions
    source_hashes: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def fingerprint(self) -> str:
        """A hash of everything that decides the output's bytes, so that a resumed run cannot mix two jobs."""
        plan = {name: str(entry) for name, entry in self.plan.items()}
        parts = [__version__, self.source_hashes, self.recipe.to_dict(), plan, self.calibration_record()]
        parts += [str(self.model.device), str(self.model.dtype)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def specs(self) -> dict[str, WeightSpec]:
        """Quantized modules and their number formats, by the checkpoint's names."""
        return {name: entry.spec for name, entry in self.plan.items() if entry is not None}

    def inputs(self) -> dict[str, ActivationSpec]:
        """Modules whose inputs are quantized too, and how."""
        return {n: entry.inputs for n, entry in self.plan.items() if entry is not None and entry.inputs is not None}

    def left_dense(self) -> list[str]:
        """Linear modules that stay dense, the output head among them."""
        dense = [name for name, entry in self.plan.items() if entry is None]
        return dense + [name for name in self.model.head_names() if name not in dense]

    @property
    def needs_reference(self) -> bool:
        """Whether the float model runs beside the quantized one."""
        return any(entry is not None and entry.needs_reference for entry in self.plan.values())

    def block_plan(self, index: int) -> dict[str, ModulePlan]:
        """What is planned for block ``index``, by names relative to the block."""
        found = {}
        for name, module in self.model.empty_block(index).named_modules():
            if isinstance(module, nn.Linear):
                entry = self.plan[self.model.stored_name(f"{self.model.block_names[index]}.{name}")]
                if entry is not None:
                    found[name] = entry
        return found

    def shell_tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors outside the blocks, read as they are written."""
        return _Lazy(self.checkpoint, [n for n in self.model.shell_names() if n in self.checkpoint.tensors])

    def prefetch(self, index: int) -> None:
        """Ask the system to read block ``index`` ahead while another one is solved."""
        if index >= len(self.model.block_names) or not hasattr(os, "posix_fadvise"):
            return
        for name in self.model.block_tensor_names(index):
            info = self.checkpoint.tensors[name]
            fd = os.open(info.file, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, info.start, info.end - info.start, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(fd)

    def details(self) -> dict[str, Any]:
        """How the weights were made, for formats that have a place for it."""
        return {"method": self.recipe.method, "lowbit": __version__, **dict(self.recipe.options)}

    def source_record(self) -> dict[str, Any]:
        """The source's name and hashes, for the manifest."""
        is_path = Path(self.source).exists()
        name = self.checkpoint.path.resolve().name if is_path else str(self.source)
        return {"name": name, "sha256": self.source_hashes}

    def calibration_record(self) -> dict[str, Any] | None:
        """Name, hash and size of the calibration set, for the manifest."""
        if self.calibration is None:
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

    def coverage(self, reports: Sequence[ModuleReport]) -> dict[str, int]:
        """Calibration tokens that each expert saw; empty for a model without experts."""
        return {r.name.rpartition(".")[0]: r.tokens for r in reports if ".experts." in r.name}


class _Lazy(Mapping[str, torch.Tensor]):
    """Tensors of a checkpoint, read when asked for and not kept."""

    def __init__(self, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        self._checkpoint = checkpoint
        self._names = list(names)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._checkpoint.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextmanager
def plan_job(source: str | Path, out: Path, values: Mapping[str, Any]) -> Iterator[Job]:
    """Open ``source`` and decide everything; raises before anything is written if the job cannot work."""
    settings = Settings.of(values)
    recipe = settings.resolved_recipe()
    codec = _choice(CODECS, recipe.format, "format")
    _choice(METHODS, recipe.method, "method")
    with open_checkpoint(
        source,
        revision=settings.revision,
        allow_pickle=settings.allow_pickle,
        trust_remote_code=settings.trust_remote_code,
    ) as opened:
        checkpoint = opened if recipe.rotate is None else RotatedCheckpoint(opened, recipe.rotate, settings.seed)
        if out.resolve() == checkpoint.path.resolve():
            raise UsageError(f"{out}: is the source itself: choose another output directory")
        device = compute_device(settings.device)
        stored = model_dtype(checkpoint)
        dtype = stored if device.type == "cuda" and stored is torch.bfloat16 else torch.float32
        model = StreamedModel(checkpoint, device=device, dtype=dtype, trust_remote_code=settings.trust_remote_code)
        shapes = model.linear_shapes()
        _check_cache(recipe, codec, model)
        recipe_plan = resolve(recipe, shapes, fused_groups(list(shapes)), methods=METHODS)
        _refuse_unsolvable(codec, recipe_plan)
        _check_budget(recipe, recipe_plan)
        scale_dtype = codec.scale_dtype(stored)
        plan = {
            name: None if entry is None else dataclasses.replace(entry, spec=entry.spec.with_scale_dtype(scale_dtype))
            for name, entry in recipe_plan.items()
        }
        hardware = probe()
        memory = settings.memory or hardware.available // 2
        needed = recipe.kv_cache is not None or any(
            entry is not None and entry.needs_statistics for entry in plan.values()
        )
        calibration, held_out = _calibration(settings, source, model, needed, memory)
        shape = None if calibration is None else calibration.ids.shape
        decisions = decide(model, codec, plan, shapes, out, shape, memory, settings.target, hardware)
        hashes = scan_weights(checkpoint)
        notes = [finding.message for finding in decisions.report.findings if finding.level != "error"]
        notes += [] if calibration is None else calibration.notes
        yield Job(
            source, checkpoint, model, recipe, codec, plan, settings, calibration, held_out, decisions, hashes, notes
        )


def _check_cache(recipe: Recipe, codec: Codec, model: StreamedModel) -> None:
    """Raise for scales of the key-value cache that mean nothing to the file format or to the model."""
    if recipe.kv_cache is None:
        return
    check_kind(recipe.kv_cache)
    if codec.name != "compressed-tensors":
        reason = "use --format compressed-tensors, or let the engine choose: --kv-cache-dtype fp8"
        raise UnsupportedError(f"--kv-cache: {codec.name} has no place for scales of the cache", [reason])
    if getattr(model.config, "kv_lora_rank", None):
        raise UnsupportedError(
            "--kv-cache: the cache of latent attention (MLA) holds no keys and values", ["leave it out"]
        )


def _check_budget(recipe: Recipe, plan: Mapping[str, ModulePlan | None]) -> None:
    """Raise for a budget that is no time, or that no module's method has a use for."""
    if recipe.budget is None:
        return
    parse_budget(recipe.budget)
    if not any(entry is not None and METHODS[entry.method].scope == "candidates" for entry in plan.values()):
        raise UsageError("--budget: only method best has candidates to choose from: add --method best, or leave it out")


def _refuse_unsolvable(codec: Codec, plan: Mapping[str, ModulePlan | None]) -> None:
    """Raise for a number format that the method does not solve for, or inputs that the file format has no place for."""
    for name, entry in plan.items():
        if entry is None:
            continue
        if reasons := METHODS[entry.method].supports(entry.spec):
            raise UnsupportedError(f"{name}: method {entry.method}", reasons)
        transform = entry.transform or NO_TRANSFORM
        if transform != NO_TRANSFORM:
            _choice(TRANSFORMS, transform, "transform")
        _refuse_unprunable(name, entry)
        if entry.inputs is not None and (reasons := codec.supports_inputs(entry.spec, entry.inputs)):
            raise UnsupportedError(f"{name}: {Scheme(entry.spec, entry.inputs)}", reasons)


def _refuse_unprunable(name: str, entry: ModulePlan) -> None:
    """Raise for a pattern of zeros that cannot be made, or would not outlast what is done after it."""
    if entry.sparsity is None:
        if entry.pruner is not None:
            raise UsageError("--pruner needs --sparsity, e.g. 2:4 or 50%")
        if isinstance(entry.spec, DenseSpec):
            raise UsageError(f"{name}: scheme dense changes nothing alone: add --sparsity 2:4, or choose a scheme")
        return
    parse_sparsity(entry.sparsity)
    if entry.pruner is not None:
        _choice(PRUNERS, entry.pruner, "pruner")
    reasons = []
    if METHODS[entry.method].scope == "block":
        reasons.append(f"method {entry.method} moves codes off zero: use gptq, gptaq or rtn")
    if isinstance(entry.spec, IntSpec) and entry.spec.has_float_zeros:
        reasons.append(f"{entry.spec} has no code for zero: use a symmetric format, e.g. --sym")
    if reasons:
        raise UnsupportedError(f"{name}: sparsity {entry.sparsity}", reasons)


def _choice(table: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise UsageError(f"unknown {what} {name!r}{suggestion(name, table)}")
    return table[name]


def compute_device(name: str) -> torch.device:
    """The device called ``auto``, ``cpu`` or ``cuda``; :class:`UsageError` if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is visible to torch: use --device cpu")
    return torch.device(name)


def _calibration(
    settings: Settings,
    source: str | Path,
    model: StreamedModel,
    needed: bool,
    memory: int,
) -> tuple[CalibrationSet | None, torch.Tensor | None]:
    """The sequences to calibrate on, if ``needed``, and some more of the same text, kept for the certificate."""
    chosen = settings.calibration
    if chosen is None and str(source) == DEMO:
        chosen = DEMO
    if not needed and chosen is None:
        return None, None
    calibration, held_out = calibration_data(
        chosen,
        model,
        memory,
        samples=settings.samples,
        seq_len=settings.seq_len,
        seed=settings.seed,
        held_out_tokens=settings.held_out_tokens,
        trust_remote_code=settings.trust_remote_code,
    )
    return (calibration if needed else None), held_out


def calibration_data(
    source: str | Path | None,
    model: StreamedModel,
    memory: int,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    held_out_tokens: int = 0,
    trust_remote_code: bool = False,
) -> tuple[CalibrationSet, torch.Tensor | None]:
    """Sequences of the text ``source``, and int64 ``[n, seq_len]`` more of it, kept out, for the certificate.

    ``source`` is what :func:`lowbit.calibration.load_calibration` takes; ``memory`` bounds, in bytes, what sampling
    text from ``model`` may take. Sequences are no longer than the model's context.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or seq_len
    seq_len = min(seq_len, int(limit))
    extra = -(-held_out_tokens // seq_len)
    loaded = load_calibration(
        source,
        load_tokenizer(model.checkpoint.path, trust_remote_code=trust_remote_code),
        samples=samples + extra,
        seq_len=seq_len,
        seed=seed,
        generate=sample_from(model, memory),
    )
    found = len(loaded.ids)
    kept = min(extra, max(found - samples, found // 8))
    ids, held_out = loaded.ids[: found - kept], loaded.ids[found - kept :]
    notes = loaded.notes
    if len(ids) >= samples:
        notes = tuple(note for note in notes if "asked for" not in note)
    calibration = dataclasses.replace(loaded, ids=ids, sha256=ids_hash(ids), tokens=ids.numel(), notes=notes)
    return calibration, (held_out if kept else None)
