"""Whether a checkpoint is whole: hashes, headers, shapes, and every value that it stores."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.calibration import load_tokenizer
from lowbit.checkpoint import MANIFEST_NAME, Checkpoint, Manifest, hash_file, locate, read_manifest
from lowbit.codecs import StoredGrid, StoredModule, open_model
from lowbit.codecs.reading import local_tensors, module_plan, read_weight
from lowbit.errors import CheckpointError, LowbitError, NumericsError, UnsupportedError
from lowbit.evaluation.findings import Finding, scale_names, value_findings
from lowbit.formats import QuantizedTensor, Scheme
from lowbit.pipeline.progress import Progress, Silent
from lowbit.pipeline.streamed import StreamedModel

_VOCABULARY = re.compile(r"(^|\.)(embed_tokens|embed_in|wte|lm_head|embed_out)\.weight$")
_UNLISTED_MATTERS = (".safetensors", ".bin", ".pt", ".py", ".json", ".model", ".jinja")


@dataclass(frozen=True, slots=True)
class Verification:
    """What :func:`verify_checkpoint` found; ``files`` were hashed, ``tensors`` and ``modules`` read and checked."""

    path: str
    files: int
    tensors: int
    modules: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """All fields and ``ok`` as plain JSON values."""
        return {"ok": self.ok, **asdict(self), "findings": [asdict(finding) for finding in self.findings]}


def verify_checkpoint(
    source: str | Path,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Verification:
    """Check a checkpoint (directory, hub id, ``demo`` or GGUF file), reading every byte once or twice.

    Every file listed in ``lowbit.json`` against its sha256, so a single changed bit is found; headers and indexes; all
    tensors the model needs, with their shapes, against ``config.json``; codes, zero points and group indexes in range;
    values finite. Damage becomes findings. Raises :class:`CheckpointError` only where there is no such directory.
    """
    path = locate(source, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    progress = progress or Silent()
    findings: list[Finding] = []
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(path)
        if manifest is None:
            findings.append(Finding("note", path.name, f"no {MANIFEST_NAME}: files cannot be checked against hashes"))
    except CheckpointError as error:
        findings.append(Finding("error", MANIFEST_NAME, str(error)))
    listed = {} if manifest is None else manifest.files
    progress.start("Hashing files", len(listed))
    if manifest is not None:
        findings += _file_findings(path, manifest, progress)
    tensors = modules = 0
    try:
        checkpoint = open_model(path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        findings.append(Finding("error", path.name, str(error)))
    else:
        with checkpoint:
            tensors = len(checkpoint.tensors)
            plan = _plan(checkpoint, findings)
            modules = len(plan)
            findings += [Finding("warning", path.name, remark) for remark in checkpoint.problems]
            findings += _manifest_findings(plan, manifest)
            progress.start("Reading tensors", len(checkpoint.tensors))
            findings += _module_findings(checkpoint, plan, progress)
            findings += _dense_findings(checkpoint, plan, progress)
            if not any(finding.severity == "error" for finding in findings):
                findings += _shape_findings(checkpoint, plan, trust_remote_code)
                findings += _tokenizer_findings(checkpoint, trust_remote_code)
    progress.close()
    return Verification(str(path), len(listed), tensors, modules, tuple(findings))


def _plan(checkpoint: Checkpoint, findings: list[Finding]) -> Mapping[str, StoredModule]:
    try:
        return module_plan(checkpoint)
    except (CheckpointError, UnsupportedError) as error:
        findings.append(Finding("error", "config.json", str(error)))
        return {}


def _file_findings(path: Path, manifest: Manifest, progress: Progress) -> Iterator[Finding]:
    """Every listed file against its length and sha256; files that ought to be listed and are not."""
    directory = path if path.is_dir() else path.parent
    for name, record in manifest.files.items():
        file = directory / name
        if not file.is_file():
            yield Finding("error", name, f"listed in {MANIFEST_NAME} and missing: restore it or quantize again")
        elif (size := file.stat().st_size) != record.bytes:
            yield Finding("error", name, f"{size:,} bytes, {MANIFEST_NAME} says {record.bytes:,}: changed or cut short")
        elif (digest := hash_file(file).sha256) != record.sha256:
            yield Finding(
                "error", name, f"sha256 {digest[:16]}…, {MANIFEST_NAME} says {record.sha256[:16]}…: its content changed"
            )
        progress.advance(name)
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        if file.name in manifest.files or file.name == MANIFEST_NAME or not file.is_file():
            continue
        if file.name.endswith(_UNLISTED_MATTERS):
            yield Finding("warning", file.name, f"not listed in {MANIFEST_NAME}: it was put here afterwards")


def _manifest_findings(plan: Mapping[str, StoredModule], manifest: Manifest | None) -> Iterator[Finding]:
    """The modules that the manifest says were quantized against those that are."""
    if manifest is None or not manifest.modules:
        return
    for name in sorted(set(manifest.modules) - set(plan)):
        yield Finding("error", name, f"quantized according to {MANIFEST_NAME}, but not stored so")
    for name in sorted(set(plan) - set(manifest.modules)):
        yield Finding("warning", name, f"quantized, but {MANIFEST_NAME} does not know it")
    for name, entry in plan.items():
        said = manifest.modules.get(name, {}).get("spec")
        stored = str(Scheme(entry.spec, entry.inputs)) if isinstance(entry, StoredGrid) else str(entry.spec)
        if isinstance(said, str) and said != stored:
            yield Finding("error", name, f"stored as {stored}, {MANIFEST_NAME} says {said}")


def _module_findings(checkpoint: Checkpoint, plan: Mapping[str, StoredModule], progress: Progress) -> Iterator[Finding]:
    """Every quantized module decoded, its codes, scales, zero points and group index checked."""
    for module, entry in plan.items():
        try:
            weight = read_weight(checkpoint, plan, module)
            if not isinstance(weight, torch.Tensor):
                weight.validate(module)
            if isinstance(weight, QuantizedTensor):
                yield from _code_findings(module, weight)
        except (CheckpointError, NumericsError, UnsupportedError) as error:
            yield Finding("error", module, str(error))
        for _ in local_tensors(checkpoint, module, entry):
            progress.advance(module)
    for finding in value_findings(checkpoint, scale_names(checkpoint, plan)):
        if finding.severity != "error":  # those that are not finite were found above
            yield finding


def _code_findings(module: str, weight: QuantizedTensor) -> Iterator[Finding]:
    zeros = int((weight.scales == 0).sum())
    if zeros:
        yield Finding("warning", module, f"{zeros} of {weight.scales.numel()} scales are zero: those weights are lost")
    if int((weight.scales < 0).sum()):
        yield Finding("warning", module, "has negative scales, which some kernels cannot take")
    if weight.codes.numel() > 1 and int(weight.codes.min()) == int(weight.codes.max()):
        yield Finding("warning", module, f"every code is {int(weight.codes.min())}: the weight carries nothing")


def _dense_findings(checkpoint: Checkpoint, plan: Mapping[str, StoredModule], progress: Progress) -> Iterator[Finding]:
    """Every tensor outside the quantized weights: finite and plausible."""
    quantized = {name for module, entry in plan.items() for name in local_tensors(checkpoint, module, entry).values()}
    for name in checkpoint.tensors:
        if name not in quantized:
            try:
                yield from value_findings(checkpoint, [name])
            except CheckpointError as error:
                yield Finding("error", name, str(error))
            progress.advance(name)


def _shape_findings(
    checkpoint: Checkpoint, plan: Mapping[str, StoredModule], trust_remote_code: bool
) -> Iterator[Finding]:
    """What the architecture needs by ``config.json`` against what is stored: shapes, tensors missing or unused."""
    try:
        model = StreamedModel(checkpoint, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except UnsupportedError as error:
        yield Finding("note", "config.json", f"shapes not checked: {error}")
        return
    except LowbitError as error:
        yield Finding("error", "config.json", str(error))
        return
    used = set(model.shell_names())
    for name in used:
        rows = checkpoint.tensors[name].shape[0] if checkpoint.tensors[name].shape else 0
        if _VOCABULARY.search(name) and rows != model.config.vocab_size:
            yield Finding("error", name, f"has {rows} rows, config.json a vocabulary of {model.config.vocab_size}")
    for index, block in enumerate(model.block_names):
        for name, parameter in model.empty_block(index).named_parameters():
            stored = model.stored_name(f"{block}.{name}")
            module = stored.removesuffix(".weight")
            info = checkpoint.tensors.get(stored)
            shape: tuple[int, ...]
            if module in plan and module != stored:
                shape = plan[module].shape
                used.update(local_tensors(checkpoint, module, plan[module]).values())
            elif info is not None:
                shape = info.shape
            else:
                yield Finding("error", stored, "the architecture needs this tensor, and it is missing")
                continue
            used.add(stored)
            if tuple(shape) != tuple(parameter.shape):
                message = f"has shape {list(shape)}, config.json asks for {list(parameter.shape)}"
                yield Finding("error", stored, message)
    unused = sorted(set(checkpoint.tensors) - used)
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        yield Finding("note", unused[0], f"stored but not used by the architecture{more}")


def _tokenizer_findings(checkpoint: Checkpoint, trust_remote_code: bool) -> Iterator[Finding]:
    where = checkpoint.path.name
    if not checkpoint.has_tokenizer:
        yield Finding("warning", where, "tokenizer missing: copy the original model's tokenizer files here")
        return
    try:
        size = len(load_tokenizer(checkpoint.path, trust_remote_code=trust_remote_code))
        vocabulary = checkpoint.description.vocab
    except CheckpointError as error:
        yield Finding("error", where, str(error))
        return
    except UnsupportedError as error:
        yield Finding("note", where, f"tokenizer not checked: {error}")
        return
    if size > vocabulary:
        message = f"the tokenizer has {size} ids, the embedding {vocabulary} rows: text with the last ones will fail"
        yield Finding("warning", where, message)
