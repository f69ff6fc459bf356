"""Schemes: the format of a linear's weights together with that of its inputs, by the names users give them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lowbit.errors import UsageError
from lowbit.formats.activations import ActivationSpec
from lowbit.formats.codebook import CodebookSpec
from lowbit.formats.dense import DenseSpec
from lowbit.formats.floating import FloatSpec
from lowbit.formats.spec import PER_CHANNEL, PER_TENSOR, IntSpec, parse_int_spec
from lowbit.formats.weights import WeightSpec

__all__ = ["PRESETS", "Scheme", "parse_scheme", "parse_spec"]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a linear is quantized: its ``weights``, and its ``inputs`` (None: left in the model's dtype)."""

    weights: WeightSpec
    inputs: ActivationSpec | None = None

    def __str__(self) -> str:
        return str(self.weights) if self.inputs is None else f"{self.weights}+{self.inputs}"

    def changed(self, bits: int | None, group_size: int | None, symmetric: bool | None) -> Scheme:
        """With other settings of the weights (None: as they are).

        Raises :class:`UsageError` for a setting that their format does not have.
        """
        spec = self.weights
        size = spec.group_size if group_size is None else group_size
        if isinstance(spec, IntSpec):
            wide = spec.bits if bits is None else bits
            form = spec.symmetric if symmetric is None else symmetric
            return replace(self, weights=replace(spec, bits=wide, group_size=size, symmetric=form))
        given = {"bits": bits, "group_size": group_size, "sym": symmetric}
        if isinstance(spec, CodebookSpec):
            spec, given = replace(spec, group_size=size), {"bits": bits, "sym": symmetric}
        if unused := [name for name, value in given.items() if value is not None]:
            raise UsageError(f"{', '.join(unused)}: only integer formats have that setting, not {spec}: leave it out")
        return replace(self, weights=spec)


_TOKEN = ActivationSpec("int8")
_FP8_TOKEN = ActivationSpec("e4m3")
_CODEBOOK = re.compile(r"(?P<table>nf4|fp4)(?:-b(?P<block>\d+))?(?P<nested>-dq)?")
_WEIGHT_ONLY = re.compile(r"W(?P<bits>\d+)A16(?P<asym>_ASYM)?")

PRESETS: Mapping[str, Scheme] = {
    "W8A8": Scheme(IntSpec(8, PER_CHANNEL), _TOKEN),
    "W8A8_STATIC": Scheme(IntSpec(8, PER_CHANNEL), ActivationSpec("int8", "tensor", dynamic=False)),
    "W4A8": Scheme(IntSpec(4, 128), _TOKEN),
    "W4AFP8": Scheme(IntSpec(4, 128), _FP8_TOKEN),
    "FP8": Scheme(FloatSpec(group_size=PER_TENSOR), ActivationSpec("e4m3", "tensor", dynamic=False)),
    "FP8_DYNAMIC": Scheme(FloatSpec(group_size=PER_CHANNEL), _FP8_TOKEN),
    "FP8_BLOCK": Scheme(FloatSpec(group_size=128, rows=128), ActivationSpec("e4m3", "group", group_size=128)),
    "NVFP4": Scheme(FloatSpec("e2m1", 16, scale="e4m3"), ActivationSpec("e2m1", "group", group_size=16, scale="e4m3")),
    "NVFP4A16": Scheme(FloatSpec("e2m1", 16, scale="e4m3")),
    "MXFP4": Scheme(FloatSpec("e2m1", 32, scale="e8m0"), ActivationSpec("e2m1", "group", group_size=32, scale="e8m0")),
    "MXFP4A16": Scheme(FloatSpec("e2m1", 32, scale="e8m0")),
    "MXFP8": Scheme(FloatSpec("e4m3", 32, scale="e8m0"), ActivationSpec("e4m3", "group", group_size=32, scale="e8m0")),
    "MXFP8A16": Scheme(FloatSpec("e4m3", 32, scale="e8m0")),
    "LLM_INT8": Scheme(IntSpec(8, PER_CHANNEL), ActivationSpec("int8", outliers=6.0)),
    "NF4": Scheme(CodebookSpec("nf4")),
    "NF4_DQ": Scheme(CodebookSpec("nf4", double_quant=True)),
    "FP4": Scheme(CodebookSpec("fp4")),
    "FP4_DQ": Scheme(CodebookSpec("fp4", double_quant=True)),
}
"""Schemes by the names that compressed-tensors and bitsandbytes gave them; ``WnA16`` and ``WnA16_ASYM`` besides."""


def parse_scheme(text: str) -> Scheme:
    """Parse a preset (``W4A16``, ``W8A8``, ``FP8_DYNAMIC``, ``NF4`` …) or a format of weights (:func:`parse_spec`).

    Raises :class:`UsageError` naming valid spellings.
    """
    name = text.strip().upper().replace("-", "_")
    if name in PRESETS:
        return PRESETS[name]
    if match := _WEIGHT_ONLY.fullmatch(name):
        return Scheme(IntSpec(int(match["bits"]), 128, match["asym"] is None))
    return Scheme(parse_spec(text))


def parse_spec(text: str) -> WeightSpec:
    """Parse ``int4-g128-sym``, ``int4-g64-affine``, ``fp8-channel``, ``nvfp4``, ``nf4-b64-dq``, ``dense``, ``W4A16``.

    Raises :class:`UsageError` naming valid spellings, and for a preset that also quantizes inputs.
    """
    if text.strip().lower() == "dense":
        return DenseSpec()
    found = parse_int_spec(text) or FloatSpec.parse(text)
    if found is not None:
        return found
    if match := _CODEBOOK.fullmatch(text.strip().lower()):
        block = int(match["block"] or 64)
        return CodebookSpec("nf4" if match["table"] == "nf4" else "fp4", block, match["nested"] is not None)
    name = text.strip().upper().replace("-", "_")
    if match := _WEIGHT_ONLY.fullmatch(name):
        return IntSpec(int(match["bits"]), 128, match["asym"] is None)
    if name in PRESETS:
        raise UsageError(
            f"{text}: also quantizes the inputs: a format of weights is wanted, e.g. {PRESETS[name].weights}"
        )
    raise UsageError(
        f"unknown number format or scheme {text!r}: use W4A16, W4A16_ASYM, W8A16, {', '.join(PRESETS)} "
        "or e.g. int4-g128-sym, fp8-channel, nf4-b64"
    )
