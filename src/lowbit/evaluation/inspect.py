"""What a checkpoint is, from its headers, config and manifest: a second's look, and a broken one is described too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lowbit.checkpoint import Checkpoint, Manifest, ModelDescription, locate, read_json_object
from lowbit.checkpoint import read_manifest as load_manifest
from lowbit.codecs import StoredGrid, StoredModule, open_model
from lowbit.codecs.gguf.checkpoint import GgufCheckpoint
from lowbit.codecs.reading import module_plan, stored_format
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.evaluation.findings import Finding, scale_names, value_findings
from lowbit.evaluation.footprint import Footprint, Part, measure
from lowbit.formats import Scheme

UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Inspection:
    """What :func:`inspect_checkpoint` found.

    ``format``       how weights are stored: ``gptq``, ``awq``, ``gguf``, ``dense`` … or ``unknown``
    ``kinds``        sizes by kind of module (embedding, attention, mlp, experts, router, norm, head, other)
    ``specs``        number format to how many modules have it
    ``files``        weight file to its bytes
    ``made``         how it was made, from ``lowbit.json``: source, recipe, calibration, and the method chosen for each
                     module that had a choice; empty without one
    ``certificate``  the quality measured by ``lowbit eval``, from ``lowbit.json``, or None
    """

    path: str
    format: str
    architecture: str
    model_type: str
    description: ModelDescription | None = None
    parameters: int = 0
    size_bytes: int = 0
    bits_per_weight: float = 0.0
    linear_bits_per_weight: float = 0.0
    kinds: Mapping[str, Part] = field(default_factory=dict)
    specs: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)
    tokenizer: bool = False
    made: Mapping[str, Any] = field(default_factory=dict)
    certificate: Mapping[str, Any] | None = None
    problems: tuple[Finding, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values; each kind with its bits per weight."""
        values = asdict(self)
        for kind, part in self.kinds.items():
            values["kinds"][kind]["bits_per_weight"] = part.bits_per_weight
        values["problems"] = list(values["problems"])
        return values


def inspect_checkpoint(
    source: str | Path, *, allow_pickle: bool = False, trust_remote_code: bool = False
) -> Inspection:
    """Describe a checkpoint (directory, hub id, ``demo`` or GGUF file) without reading weights other than scales.

    Damage such as a missing shard becomes a problem in the result. Raises :class:`CheckpointError` only where there is
    no directory or no readable ``config.json``.
    """
    path = locate(source, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    config = {} if path.is_file() else read_json_object(path / "config.json")
    problems: list[Finding] = []
    manifest = _manifest(path, problems)
    known: dict[str, Any] = {
        "path": str(path),
        "made": {} if manifest is None else _made(manifest),
        "certificate": None if manifest is None else manifest.quality,
    }
    try:
        checkpoint = open_model(path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        problems.append(Finding("error", path.name, str(error)))
        architectures = config.get("architectures") or [""]
        return Inspection(
            format="gguf" if path.is_file() else _named_format(config),
            architecture=str(architectures[0]),
            model_type=str(config.get("model_type", "")),
            problems=tuple(problems),
            **known,
        )
    with checkpoint:
        plan, stored = _plan(checkpoint, problems)
        if isinstance(checkpoint, GgufCheckpoint):
            stored = "gguf"
        size = measure(checkpoint.tensors, plan)
        description = _description(checkpoint, problems)
        problems += _problems(checkpoint, plan, manifest)
        return _result(checkpoint, stored, plan, size, description, problems, known)


def _result(
    checkpoint: Checkpoint,
    stored: str,
    plan: Mapping[str, StoredModule],
    size: Footprint,
    description: ModelDescription | None,
    problems: list[Finding],
    known: Mapping[str, Any],
) -> Inspection:
    return Inspection(
        format=stored,
        architecture="" if description is None else description.architecture,
        model_type=str(checkpoint.config.get("model_type", "")),
        description=description,
        parameters=size.total.parameters,
        size_bytes=size.total.bytes,
        bits_per_weight=size.total.bits_per_weight,
        linear_bits_per_weight=size.linear.bits_per_weight,
        kinds=size.kinds,
        specs=dict(Counter(_scheme(entry) for entry in plan.values()).most_common()),
        files={file.name: file.stat().st_size for file in checkpoint.files},
        tokenizer=checkpoint.has_tokenizer,
        problems=tuple(problems),
        **known,
    )


def _scheme(entry: StoredModule) -> str:
    """How a module is quantized, inputs included."""
    return str(Scheme(entry.spec, entry.inputs)) if isinstance(entry, StoredGrid) else str(entry.spec)


def _problems(checkpoint: Checkpoint, plan: Mapping[str, StoredModule], manifest: Manifest | None) -> list[Finding]:
    found = [Finding("warning", checkpoint.path.name, remark) for remark in checkpoint.problems]
    if not checkpoint.has_tokenizer:
        found.append(
            Finding(
                "warning", checkpoint.path.name, "tokenizer missing: copy the original model's tokenizer files here"
            )
        )
    found += value_findings(checkpoint, scale_names(checkpoint, plan))
    if manifest is None:
        return found
    for name, record in manifest.files.items():
        file = checkpoint.files[0].parent / name if checkpoint.path.is_file() else checkpoint.path / name
        if not file.is_file():
            found.append(Finding("error", name, "listed in lowbit.json and missing"))
        elif file.stat().st_size != record.bytes:
            message = f"{file.stat().st_size:,} bytes, lowbit.json says {record.bytes:,}: it was changed or cut short"
            found.append(Finding("error", name, message))
    if plan and manifest.quality is None:
        message = "quality not measured yet: lowbit eval MODEL --against REFERENCE"
        found.append(Finding("note", checkpoint.path.name, message))
    return found


def _manifest(path: Path, problems: list[Finding]) -> Manifest | None:
    try:
        return load_manifest(path)
    except CheckpointError as error:
        problems.append(Finding("error", "lowbit.json", str(error)))
        return None


def _plan(checkpoint: Checkpoint, problems: list[Finding]) -> tuple[Mapping[str, StoredModule], str]:
    try:
        plan = module_plan(checkpoint)
    except (CheckpointError, UnsupportedError) as error:
        problems.append(Finding("error", "config.json", str(error)))
        return {}, _named_format(checkpoint.config)
    return plan, stored_format(plan)


def _description(checkpoint: Checkpoint, problems: list[Finding]) -> ModelDescription | None:
    try:
        return checkpoint.description
    except CheckpointError as error:
        problems.append(Finding("error", "config.json", str(error)))
        return None


def _named_format(config: Mapping[str, Any]) -> str:
    """The format that the config names, where the tensors could not be asked."""
    quantization = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(quantization, dict):
        return UNKNOWN if quantization else "dense"
    return str(quantization.get("quant_method") or UNKNOWN)


def _made(manifest: Manifest) -> dict[str, Any]:
    return {
        "lowbit_version": manifest.lowbit_version,
        "source": manifest.source,
        "recipe": manifest.recipe,
        "calibration": manifest.calibration,
        "choices": {name: record["method"] for name, record in manifest.modules.items() if record.get("candidates")},
    }
