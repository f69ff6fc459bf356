"""The diagnoses of a checkpoint: :data:`lowbit.ops.doctor.run.MODEL`."""

from __future__ import annotations

import importlib.util
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowbit.checkpoint import locate, read_json_object, read_manifest
from lowbit.errors import CheckpointError, LowbitError
from lowbit.evaluation.inspect import Inspection, inspect_checkpoint
from lowbit.evaluation.verify import Verification, verify_checkpoint
from lowbit.ops.alerts.table import THRESHOLDS
from lowbit.ops.doctor.run import MODEL, Finding, Report, collect
from lowbit.pipeline.progress import Progress
from lowbit.planning.hardware import Hardware, probe
from lowbit.sizing.estimate import estimate

__all__ = ["examine_model"]

_OUTLIER = 3.0
_NEGLIGIBLE = 0.01
"""A relative error below this needs no mending, whatever the others have."""
_SCALES = re.compile(r"scale|every code is|magnitude|implausib", re.IGNORECASE)
_TOKENIZER = re.compile(r"tokenizer", re.IGNORECASE)


def examine_model(
    source: str,
    *,
    quick: bool = False,
    context: int | None = None,
    concurrency: int = 1,
    hardware: Hardware | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run every diagnosis of :data:`MODEL` on a checkpoint (directory, GGUF file, hub id, ``demo``).

    ``quick`` reads headers only; ``context`` and ``concurrency`` are what it should serve. Raises
    :class:`CheckpointError` where there is no such checkpoint at all.
    """
    path = locate(source)
    hardware = hardware or probe()
    words = {"path": str(source)}
    inspection, broken = _inspect(path)
    results: list[Finding] = []
    if quick or broken is not None:
        problems = (
            [] if inspection is None else [(p.where, p.message) for p in inspection.problems if p.severity == "error"]
        )
        problems += [] if broken is None else [(path.name, broken)]
        results += collect(MODEL, "files", problems, "headers are whole (--quick: no file was read)", **words)
        results.append(Finding("scales", "not measured", "", "--quick reads no weights" if quick else "unreadable"))
    else:
        results += _files(verify_checkpoint(path, progress=progress), words)
    if inspection is not None:
        manifest = read_manifest(path) if broken is None else None
        modules = manifest.modules if manifest is not None else {}
        results += _certificate(inspection, words)
        results += collect(MODEL, "modules", _outliers(modules), _modules_fine(modules), **words)
        missing = [] if inspection.tokenizer else [(path.name, "there is none")]
        results += collect(MODEL, "tokenizer", missing, "present", **words)
        missing = [] if _has_template(path) else [(path.name, "there is none")]
        results += collect(MODEL, "chat template", missing, "present", **words)
        results += _memory(path, inspection, context, concurrency, hardware, words)
        results += _engine(inspection, hardware, words)
    return Report(str(path), tuple(results))


def _inspect(path: Path) -> tuple[Inspection | None, str | None]:
    """The inspection and what keeps the checkpoint from being read at all."""
    try:
        inspection = inspect_checkpoint(path)
        read_manifest(path)
    except CheckpointError as error:
        return None, str(error)
    return inspection, None


def _files(result: Verification, words: Mapping[str, str]) -> list[Finding]:
    errors = [(f.where, f.message) for f in result.findings if f.severity == "error"]
    scales = [
        (f.where, f.message)
        for f in result.findings
        if f.severity == "warning" and _SCALES.search(f.message) and not _TOKENIZER.search(f.message)
    ]
    fine = f"{result.files} files hashed, {result.tensors} tensors read" if result.files else "all tensors read"
    return [
        *collect(MODEL, "files", errors, fine, **words),
        *collect(MODEL, "scales", scales, f"those of {result.modules} quantized modules are plausible", **words),
    ]


def _certificate(inspection: Inspection, words: Mapping[str, str]) -> list[Finding]:
    if inspection.linear_bits_per_weight >= 16 or not inspection.specs:
        return [Finding("certificate", "ok", "", "not quantized: nothing was lost")]
    certificate = inspection.certificate
    if not certificate:
        return collect(MODEL, "certificate", [("lowbit.json", "nobody measured what was lost")], "", **words)
    kl = certificate.get("kl_divergence")
    bad = [
        ("lowbit.json", str(verdict.get("message")))
        for verdict in certificate.get("verdicts") or ()
        if isinstance(verdict, dict) and verdict.get("level") == "warning"
    ]
    limit = THRESHOLDS["kl"].value
    if isinstance(kl, float) and kl > limit:
        bad.append(("lowbit.json", f"KL divergence {kl:.3g} nats per token: above {limit:g}"))
    fine = f"perplexity × {certificate.get('perplexity_ratio', 0):.4f}, KL divergence {kl or 0:.3g} nats per token"
    return collect(MODEL, "certificate", bad, fine, **words)


def _outliers(modules: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Modules whose error stands out among those of the same format, worst first."""
    by_spec: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for name, module in modules.items():
        if isinstance(module.get("weight_error"), (int, float)):
            by_spec[str(module.get("spec"))].append((float(module["weight_error"]), name))
    for spec, errors in by_spec.items():
        middle = statistics.median(error for error, _ in errors)
        for error, name in sorted(errors, reverse=True)[:5]:
            if error > max(_OUTLIER * middle, _NEGLIGIBLE):
                yield name, f"relative weight error {error:.3g}, the median of {spec} modules is {middle:.3g}"


def _modules_fine(modules: Mapping[str, Mapping[str, Any]]) -> str:
    errors = [(float(module["weight_error"]), name) for name, module in modules.items() if "weight_error" in module]
    if not errors:
        return "none is recorded"
    worst, name = max(errors)
    return f"no outlier; worst is {name} with {worst:.3g}"


def _has_template(path: Path) -> bool:
    if path.is_file():
        from lowbit.codecs.gguf.container import open_gguf

        return "tokenizer.chat_template" in open_gguf(path).metadata
    if (path / "chat_template.jinja").exists():
        return True
    try:
        return bool(read_json_object(path / "tokenizer_config.json").get("chat_template"))
    except CheckpointError:
        return False


def _memory(
    path: Path,
    inspection: Inspection,
    context: int | None,
    concurrency: int,
    hardware: Hardware,
    words: Mapping[str, str],
) -> list[Finding]:
    engine = "llama.cpp" if inspection.format == "gguf" or not hardware.gpus else "vllm"
    try:
        found = estimate(str(path), engine=engine, context=context, concurrency=concurrency, gpus=0, hardware=hardware)
    except LowbitError as error:
        return [Finding("memory", "not measured", "", str(error))]
    stored = min(found.precisions, key=lambda each: abs(each.file_bytes - inspection.size_bytes))
    needed = sum(stored.parts.values()) + stored.host
    gpu = max((gpu.memory for gpu in hardware.gpus), default=0)
    free, where = (gpu * len(hardware.gpus), "the GPUs") if engine == "vllm" else (hardware.available, "this machine")
    detail = (
        f"{_gib(needed)} for {concurrency} requests of {found.context} tokens in {engine}; {_gib(free)} free on {where}"
    )
    return collect(MODEL, "memory", [(where, detail)] if needed > free else [], detail, **words)


def _engine(inspection: Inspection, hardware: Hardware, words: Mapping[str, str]) -> list[Finding]:
    llama = importlib.util.find_spec("xllamacpp") is not None
    vllm = importlib.util.find_spec("vllm") is not None and bool(hardware.gpus)
    gguf = inspection.format == "gguf"
    runs = [name for name, there in (("llama.cpp", llama), ("vLLM", vllm and not gguf)) if there]
    detail = f"{inspection.format} needs {'llama.cpp' if gguf else 'vLLM and a GPU, or llama.cpp'}; neither is here"
    if gguf:
        detail = "GGUF needs llama.cpp, which is not here"
    through = " (converted to GGUF when it is first served)" if runs == ["llama.cpp"] and not gguf else ""
    return collect(MODEL, "engine", [] if runs else [("", detail)], f"{' and '.join(runs)}{through}", **words)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
