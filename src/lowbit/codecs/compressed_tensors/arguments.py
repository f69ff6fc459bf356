"""The config's words for number formats (``QuantizationArgs``) and lowbit's specs, each way.

Written with the keys that compressed-tensors 0.13 knows, since every version refuses unknown ones; ``scale_dtype``,
which came later, only where a format cannot be told without it (MXFP4, MXFP8).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch

from lowbit.codecs.codec import integer
from lowbit.errors import CheckpointError, UnsupportedError, UsageError
from lowbit.formats.activations import ActivationSpec
from lowbit.formats.floating import FloatSpec
from lowbit.formats.scheme import PRESETS
from lowbit.formats.spec import PER_CHANNEL, PER_TENSOR, IntSpec
from lowbit.formats.weights import WeightSpec

__all__ = ["input_arguments", "input_spec", "preset", "weight_arguments", "weight_spec"]

_PRESET = re.compile(r"W(?P<bits>[2-8])A(?P<activations>8|16)(?P<asym>_ASYM)?", re.IGNORECASE)
_INPUTS: Mapping[str, tuple[str, int]] = {
    "int8": ("int", 8),
    "int4": ("int", 4),
    "e4m3": ("float", 8),
    "e2m1": ("float", 4),
}
_ELEMENTS: Mapping[tuple[str, int], Literal["int8", "int4", "e4m3", "e2m1"]] = {
    ("int", 8): "int8",
    ("int", 4): "int4",
    ("float", 8): "e4m3",
    ("float", 4): "e2m1",
}
_GRAINS = {PER_CHANNEL: "channel", PER_TENSOR: "tensor"}
_EXPONENTS = "torch.uint8"


def weight_arguments(spec: WeightSpec) -> dict[str, Any]:
    """The config's ``weights`` for integers or floats."""
    if isinstance(spec, IntSpec):
        strategy, kind, symmetric = _GRAINS.get(spec.group_size, "group"), "int", spec.symmetric
    elif isinstance(spec, FloatSpec):
        strategy, kind, symmetric = _GRAINS.get(spec.group_size, "group"), "float", True
        strategy = "block" if spec.rows > 1 else "tensor_group" if spec.scale == "e4m3" else strategy
    else:
        raise UnsupportedError(f"compressed-tensors has no words for {spec}")
    arguments: dict[str, Any] = {
        "num_bits": spec.bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": spec.group_size if strategy in ("group", "tensor_group") else None,
        "dynamic": False,
    }
    if isinstance(spec, FloatSpec) and spec.rows > 1:
        arguments["block_structure"] = [spec.rows, spec.group_size]
    if isinstance(spec, FloatSpec) and spec.scale == "e8m0":
        arguments["scale_dtype"] = _EXPONENTS
    return arguments


def weight_spec(arguments: Mapping[str, Any], scale_dtype: torch.dtype | None) -> IntSpec | FloatSpec:
    """The number format that ``weights`` speaks of, its scales stored as ``scale_dtype``.

    Raises :class:`UnsupportedError` for what lowbit has no format for, :class:`CheckpointError` for nonsense.
    """
    bits = integer(arguments, ("num_bits",), 8)
    strategy = _strategy(arguments)
    kind = arguments.get("type", "int")
    if kind == "float":
        return _float_spec(arguments, bits, strategy, scale_dtype)
    if kind != "int" or strategy not in ("group", "channel", "tensor"):
        raise UnsupportedError(f"compressed-tensors {kind} weights by {strategy} cannot be read")
    size = integer(arguments, ("group_size",)) if strategy == "group" else -1 if strategy == "channel" else 0
    if not 2 <= bits <= 8 or (strategy == "group" and size <= 0):
        raise CheckpointError(f"quantization_config: {bits} bits with group size {size} is no valid format")
    return IntSpec(bits, size, arguments.get("symmetric", True) is not False, scale_dtype or torch.float16)


def _float_spec(arguments: Mapping[str, Any], bits: int, strategy: str, scale_dtype: torch.dtype | None) -> FloatSpec:
    size = integer(arguments, ("group_size",), 0) if strategy in ("group", "tensor_group") else 0
    if (bits, strategy, size) == (4, "tensor_group", 16):
        return FloatSpec("e2m1", 16, scale="e4m3")
    if (bits, strategy, size) in ((4, "group", 32), (8, "group", 32)) and scale_dtype in (torch.uint8, None):
        return FloatSpec("e2m1" if bits == 4 else "e4m3", 32, scale="e8m0")
    stored = scale_dtype or torch.float32
    if bits == 8 and strategy in ("channel", "tensor"):
        return FloatSpec(group_size=PER_CHANNEL if strategy == "channel" else PER_TENSOR, scale_dtype=stored)
    if bits == 8 and strategy == "group" and size > 0:
        return FloatSpec(group_size=size, scale_dtype=stored)
    if bits == 8 and strategy == "block":
        block = arguments.get("block_structure")
        if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
            return FloatSpec(group_size=block[1], rows=block[0], scale_dtype=stored)
        raise CheckpointError(f"quantization_config: block_structure must be two sizes, not {block!r}")
    raise UnsupportedError(
        f"compressed-tensors {bits}-bit float weights by {strategy} of {size or 'all'} cannot be read",
        ["FP8, NVFP4, MXFP4 and MXFP8 can"],
    )


def input_arguments(spec: ActivationSpec) -> dict[str, Any]:
    """The config's ``input_activations``."""
    kind, bits = _INPUTS[spec.element]
    two_level = spec.scale == "e4m3"
    arguments: dict[str, Any] = {
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": "tensor_group" if two_level else spec.granularity,
        "group_size": spec.group_size or None,
        "dynamic": "local" if two_level else spec.dynamic,
    }
    if spec.scale == "e8m0":
        arguments["scale_dtype"] = _EXPONENTS
    return arguments


def input_spec(arguments: Any) -> ActivationSpec | None:
    """The format of inputs that ``input_activations`` speaks of; None when it is empty.

    Raises :class:`UnsupportedError` for one that lowbit cannot simulate.
    """
    if not arguments:
        return None
    if not isinstance(arguments, Mapping):
        raise CheckpointError(f"quantization_config: input_activations must be a table, not {arguments!r}")
    bits, strategy = integer(arguments, ("num_bits",), 8), _strategy(arguments)
    element = _ELEMENTS.get((str(arguments.get("type", "int")), bits))
    if element is None or arguments.get("symmetric", True) is False or strategy not in _GRANULARITIES:
        raise UnsupportedError(
            f"compressed-tensors inputs of {bits} bits by {strategy} cannot be read",
            ["symmetric int8, FP8 and FP4 inputs can; drop input_activations from config.json to read the weights"],
        )
    size = integer(arguments, ("group_size",), 0) if strategy in ("group", "tensor_group") else 0
    # Files of before scale_dtype say MXFP4 by the group alone.
    exponents = arguments.get("scale_dtype") == _EXPONENTS or (element, size) == ("e2m1", 32)
    scale: Literal["float", "e4m3", "e8m0"] = (
        "e4m3" if strategy == "tensor_group" else "e8m0" if strategy == "group" and exponents else "float"
    )
    try:
        return ActivationSpec(element, _GRANULARITIES[strategy], bool(arguments.get("dynamic")), size, scale)
    except UsageError as error:
        raise CheckpointError(f"quantization_config: input_activations: {error}") from error


_GRANULARITIES: Mapping[str, Literal["token", "tensor", "group"]] = {
    "token": "token",
    "tensor": "tensor",
    "group": "group",
    "tensor_group": "group",
}


def preset(name: str, targets: list[Any]) -> dict[str, Any]:
    """The group that a preset's name stands for."""
    upper = "W8A8" if name.upper() == "INT8" else name.upper()
    match = _PRESET.fullmatch(upper)
    if upper in PRESETS and not isinstance(PRESETS[upper].weights, IntSpec | FloatSpec):
        match = None
    elif upper in PRESETS:
        inputs = PRESETS[upper].inputs
        return {
            "targets": targets,
            "weights": weight_arguments(PRESETS[upper].weights),
            "input_activations": None if inputs is None else input_arguments(inputs),
        }
    if match is None:
        raise UnsupportedError(
            f"compressed-tensors preset {name!r} cannot be read", ["W4A16, W8A8, FP8_DYNAMIC, NVFP4 … can"]
        )
    inputs = ActivationSpec("int8") if match["activations"] == "8" else None
    return {
        "targets": targets,
        "weights": weight_arguments(IntSpec(int(match["bits"]), 128, match["asym"] is None)),
        "input_activations": None if inputs is None else input_arguments(inputs),
    }


def _strategy(arguments: Mapping[str, Any]) -> str:
    strategy, size = arguments.get("strategy"), arguments.get("group_size")
    if strategy is None:
        return "tensor" if size is None else "channel" if size == -1 else "group"
    return str(strategy)
