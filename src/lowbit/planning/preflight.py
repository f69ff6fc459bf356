"""Preflight: everything that would go wrong after the first hour, found before the first minute.

:func:`preflight` is a pure function of what is planned and what the machine has; :mod:`lowbit.planning.hardware`
looks at the machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lowbit.codecs import Codec
from lowbit.errors import LowbitError
from lowbit.formats import ActivationSpec, IntSpec, QuantizedTensor, WeightSpec, WeightTensor
from lowbit.formats.rounding import round_weight
from lowbit.planning.cost import Prediction, Workload, disk_bytes, output_bytes, predict
from lowbit.planning.hardware import Hardware
from lowbit.planning.modules import PlannedModule, told
from lowbit.planning.parallel import tensor_parallel
from lowbit.planning.targets import Finding, Placement, Target, check_target

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Situation:
    """All that preflight looks at.

    ``dense_bytes`` are stored outside of ``modules`` (embeddings, norms); ``memory`` is the budget and ``disk`` the
    free space, in bytes, None when unknown; ``gemm_flops`` the measured rate in FLOP/s, 0 when not measured.
    """

    modules: tuple[PlannedModule, ...]
    codec: Codec
    fused_groups: tuple[tuple[str, ...], ...] = ()
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 0
    dense_bytes: int = 0
    dense_itemsize: int = 2
    target: Target | None = None
    tensor_parallel: int | None = None
    workload: Workload | None = None
    hardware: Hardware | None = None
    memory: int | None = None
    disk: int | None = None
    gemm_flops: float = 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """What preflight found, worst first, and what it predicts (None without a workload and a rate)."""

    findings: tuple[Finding, ...]
    prediction: Prediction | None
    output_bytes: int
    tensor_parallel: tuple[int, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that the job cannot work with."""
        return tuple(finding for finding in self.findings if finding.level == "error")


def preflight(situation: Situation) -> Report:
    """Check a plan against its format, its engine, tensor parallelism, memory and disk; predict its cost."""
    quantized = [module for module in situation.modules if module.spec is not None]
    findings = _format_findings(situation.codec, quantized)
    if situation.target is not None:
        placement = Placement(situation.modules, situation.codec.name, situation.head_dim, situation.hardware)
        findings += check_target(situation.target, placement)
    parallel = tensor_parallel(quantized, situation.heads, situation.kv_heads, _degrees(situation.tensor_parallel))
    if quantized:
        findings += _parallel_findings(parallel.largest, parallel.obstacles, situation.tensor_parallel)
    size = output_bytes(situation.modules, situation.dense_bytes, situation.dense_itemsize)
    prediction = None
    if situation.workload is not None and situation.gemm_flops > 0:
        prediction = predict(situation.modules, situation.fused_groups, situation.workload, situation.gemm_flops)
        findings += _resource_findings(situation, prediction, size)
    order = ("error", "warning", "info")
    findings.sort(key=lambda finding: order.index(finding.level))
    return Report(tuple(findings), prediction, size, parallel.workable)


def round_trip(codec: Codec, spec: WeightSpec, shape: tuple[int, int]) -> Finding | None:
    """Encode and decode one random module of ``shape`` (out, in); a finding if it does not come back as it went."""
    tensor = _random_weight(spec, shape)
    try:
        back = codec.decode(codec.encode(tensor), spec, shape)
    except LowbitError as error:
        return Finding("error", f"a {shape[0]}x{shape[1]} weight as {spec} does not pass through {codec.name}: {error}")
    # not bit for bit: LLM.int8() stores 127 times a float32 scale, which rounds once
    if torch.allclose(back.dequantize(), tensor.dequantize(), rtol=2.0**-22, atol=0.0):
        return None
    return Finding("error", f"a {shape[0]}x{shape[1]} weight as {spec} comes back changed from {codec.name}")


def _random_weight(spec: WeightSpec, shape: tuple[int, int]) -> WeightTensor:
    generator = torch.Generator().manual_seed(0)
    if not isinstance(spec, IntSpec) or spec.has_float_zeros:
        return round_weight(torch.randn(shape, generator=generator), spec)
    scale_shape = (1, 1) if spec.group_size == 0 else (shape[0], spec.groups(shape[1]))
    return QuantizedTensor(
        spec,
        torch.randint(0, spec.levels, shape, generator=generator, dtype=torch.uint8),
        (torch.rand(scale_shape, generator=generator) + 0.5).to(spec.scale_dtype),
        None if spec.symmetric else torch.randint(0, spec.levels, scale_shape, generator=generator, dtype=torch.uint8),
    )


def _format_findings(codec: Codec, quantized: Sequence[PlannedModule]) -> list[Finding]:
    """Reasons of the codec, one finding per reason however many modules share it."""
    affected: dict[str, list[str]] = {}
    for module in quantized:
        if module.spec is not None:
            for reason in codec.supports(module.spec, module.shape):
                affected.setdefault(reason, []).append(module.name)
    return [Finding("error", f"{told(names)}: {reason}") for reason, names in affected.items()]


def _degrees(wanted: int | None) -> tuple[int, ...]:
    return tuple(sorted({2, 4, 8, 16, *([wanted] if wanted is not None and wanted > 1 else [])}))


def _parallel_findings(largest: int, obstacles: dict[int, str], wanted: int | None) -> list[Finding]:
    if wanted is not None and wanted in obstacles:
        return [Finding("error", f"tensor parallel {wanted}: {obstacles[wanted]}")]
    if not obstacles:
        return []
    degree = min(obstacles)
    return [Finding("info", f"tensor parallel works up to {largest}; not {degree}: {obstacles[degree]}")]


def _resource_findings(situation: Situation, prediction: Prediction, size: int) -> list[Finding]:
    out = [
        Finding(
            "info",
            f"predicted: {_duration(prediction.total_seconds)}, peak memory {prediction.peak_bytes / _GIB:.1f} GiB, "
            f"output {size / _GIB:.2f} GiB",
        )
    ]
    if situation.memory is not None and prediction.peak_bytes > situation.memory:
        part = max(_WAYS_OUT, key=lambda name: prediction.memory.get(name, 0))
        out.append(
            Finding(
                "warning",
                f"about {prediction.peak_bytes / _GIB:.1f} GiB of memory needed, {situation.memory / _GIB:.1f} GiB "
                f"allowed: {_WAYS_OUT[part]}",
            )
        )
    needed = disk_bytes(size, prediction)
    if situation.disk is not None and needed > situation.disk:
        out.append(
            Finding(
                "error" if size > situation.disk else "warning",
                f"{needed / _GIB:.2f} GiB of disk needed while working ({size / _GIB:.2f} GiB in the end), "
                f"{situation.disk / _GIB:.2f} GiB free: make room or choose another output directory",
            )
        )
    return out


_WAYS_OUT = {
    "activations": "most of it holds activations: use fewer --samples or a shorter --seq-len",
    "statistics": "most of it is the widest layer's Gram matrix: use --method rtn, or for that layer in a recipe",
    "block": "most of it is one block in float32: use a machine with more memory",
}
"""What helps when a part of the predicted memory is too large."""


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def planned(
    shapes: Iterable[tuple[str, tuple[int, int]]],
    specs: dict[str, WeightSpec],
    methods: dict[str, str],
    inputs: Mapping[str, ActivationSpec] | None = None,
) -> tuple[PlannedModule, ...]:
    """Modules from names with shapes, the formats of those that are quantized, their methods and their inputs'."""
    given = inputs or {}
    return tuple(
        PlannedModule(name, shape, specs.get(name), methods.get(name, "rtn"), given.get(name)) for name, shape in shapes
    )
