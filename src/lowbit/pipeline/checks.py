"""The checks of a quantization job that look at the machine and at every weight, before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint import Checkpoint, source_hashes
from lowbit.codecs import Codec
from lowbit.errors import CheckpointError, ResourceError, UnsupportedError
from lowbit.pipeline.architectures import fused_groups
from lowbit.pipeline.module_plan import ModulePlan
from lowbit.pipeline.streamed import StreamedModel
from lowbit.planning import (
    Finding,
    Hardware,
    Report,
    Situation,
    Workload,
    free_disk,
    measure_gemm,
    parse_target,
    planned,
    preflight,
    round_trip,
)

EXPERT_GROUPS = 64
"""Most experts whose statistics are alive at a time."""

MARGIN = 1.2
"""By how much a prediction of peak memory may fall short (measured: 6.7 GiB where 5.8 were predicted)."""


@dataclass(frozen=True, slots=True)
class Decisions:
    """How to run: whether intermediate states stay in memory, how many groups a stage may have, and what was found."""

    keep_states: bool
    group_limit: int
    report: Report


def scan_weights(checkpoint: Checkpoint) -> dict[str, str]:
    """sha256 of the source's files by name; raises :class:`CheckpointError` for a weight that is not finite."""
    with ThreadPoolExecutor(1) as background:
        paths = [checkpoint.path / "config.json", *checkpoint.files]
        hashing = background.submit(source_hashes, paths)
        for name, info in checkpoint.tensors.items():
            tensor = checkpoint.read(name)
            # A sum is not finite if a value is not; it may also overflow, so look closer before refusing.
            suspicious = tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float32)))
            if suspicious and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{info.file}: tensor {name} has values that are not finite (NaN or infinity)")
        return hashing.result()


def decide(
    model: StreamedModel,
    codec: Codec,
    plan: Mapping[str, ModulePlan | None],
    shapes: Mapping[str, tuple[int, int]],
    out: Path,
    calibration: torch.Size | None,
    memory: int,
    target: str | None,
    hardware: Hardware,
) -> Decisions:
    """Run the preflight and decide how to use the memory.

    ``calibration`` is ``(samples, seq_len)`` or None. Raises :class:`UnsupportedError` or :class:`ResourceError` with
    the first of the findings that cannot work.
    """
    chosen = {name: entry for name, entry in plan.items() if entry is not None}
    inputs = {name: entry.inputs for name, entry in chosen.items() if entry.inputs is not None}
    specs, methods = ({n: e.spec for n, e in chosen.items()}, {n: e.method for n, e in chosen.items()})
    modules = planned(shapes.items(), specs, methods, inputs)
    description = model.checkpoint.description
    samples, seq_len = calibration if calibration is not None else (0, 0)
    workload = Workload(
        samples=samples,
        seq_len=seq_len,
        hidden=model.hidden_size,
        heads=description.heads,
        head_dim=description.head_dim,
        experts=description.experts or 0,
        experts_per_token=description.experts_per_token or 0,
        itemsize=model.dtype.itemsize,
        shell_bytes=model.shell_bytes(),
        cpus=hardware.cpus,
    )
    inside = sum(rows * columns for rows, columns in shapes.values())
    everything = sum(_numel(info.shape) for info in model.checkpoint.tensors.values()) if not model.plan else inside
    situation = Situation(
        modules=modules,
        codec=codec,
        fused_groups=tuple(fused_groups(list(shapes))),
        heads=description.heads,
        kv_heads=description.kv_heads,
        head_dim=description.head_dim,
        dense_bytes=2 * max(0, everything - inside),
        target=None if target is None else parse_target(target),
        workload=workload,
        hardware=hardware,
        memory=memory,
        disk=free_disk(out),
        gemm_flops=measure_gemm(device=model.device.type),
    )
    report = preflight(situation)
    keep = report.prediction is None or report.prediction.peak_bytes * MARGIN <= memory
    if not keep:
        report = preflight(replace(situation, workload=replace(workload, keep_states=False)))
    findings = [*report.errors, *_round_trips(codec, chosen, shapes)]
    if findings:
        more = f" (and {len(findings) - 1} more problems)" if len(findings) > 1 else ""
        message = f"{findings[0].message}{more}"
        raise ResourceError(message) if "disk" in message else UnsupportedError(message)
    widest = max((shapes[name][1] for name in chosen), default=1)
    limit = max(1, min(EXPERT_GROUPS, memory // 4 // (4 * widest * widest)))
    return Decisions(keep, limit, report)


def _round_trips(
    codec: Codec, plan: Mapping[str, ModulePlan], shapes: Mapping[str, tuple[int, int]]
) -> Sequence[Finding]:
    """Encode and decode one module of each number format, the smallest there is."""
    smallest: dict[Any, tuple[int, int]] = {}
    for name, entry in plan.items():
        shape = shapes[name]
        if entry.spec not in smallest or _numel(shape) < _numel(smallest[entry.spec]):
            smallest[entry.spec] = shape
    found = [round_trip(codec, spec, shape) for spec, shape in smallest.items() if not codec.supports(spec, shape)]
    return [finding for finding in found if finding is not None]


def _numel(shape: Sequence[int]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
