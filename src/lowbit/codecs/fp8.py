"""``quant_method: fp8``: the block-wise FP8 of DeepSeek and transformers' fine-grained FP8, and per-tensor FP8. Read.

``weight`` float8_e4m3fn ``[out, in]`` with ``weight_scale_inv`` ``[ceil(out/b), ceil(in/b)]``, which despite its name
is multiplied, for blocks of ``weight_block_size``; ``weight_scale`` where there are none. ``activation_scheme`` is
``dynamic`` (by group of a block's columns, or by token) or ``static`` with ``input_scale``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.codecs.codec import StoredGrid, TensorHeader, half_dtype, stored
from lowbit.codecs.compressed_tensors.floats import decode_float8
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats.activations import ActivationSpec
from lowbit.formats.floating import FloatSpec
from lowbit.formats.spec import PER_CHANNEL, PER_TENSOR
from lowbit.formats.weights import WeightSpec, WeightTensor

__all__ = ["Fp8Codec"]

_READ_ONLY = "quant_method fp8 is read, not written: use --format compressed-tensors, which the same engines read"


@dataclass(frozen=True, slots=True)
class Fp8Codec:
    """FP8 checkpoints of ``quant_method: fp8``; ``scale`` names the tensor that holds a module's scales."""

    scale: str = "weight_scale_inv"

    @property
    def name(self) -> str:
        """``fp8``."""
        return "fp8"

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The model's own 16-bit dtype."""
        return half_dtype(model_dtype)

    def supports(self, spec: WeightSpec, shape: tuple[int, int]) -> list[str]:
        """Nothing is written in this format."""
        return [_READ_ONLY]

    def supports_inputs(self, spec: WeightSpec, inputs: ActivationSpec) -> list[str]:
        """Nothing is written in this format."""
        return [_READ_ONLY]

    def local_names(self, spec: WeightSpec) -> frozenset[str]:
        """Names of the tensors of a module."""
        return frozenset(("weight", self.scale))

    def encode(
        self, q: WeightTensor, input_scale: torch.Tensor | None = None, *, inputs: ActivationSpec | None = None
    ) -> dict[str, torch.Tensor]:
        """Always raises :class:`UnsupportedError`."""
        raise UnsupportedError(_READ_ONLY)

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, shape: tuple[int, int]) -> WeightTensor:
        """The weight of a module."""
        if not isinstance(spec, FloatSpec):
            raise CheckpointError(f"quantization_config: fp8 cannot mean {spec}")
        return decode_float8(tensors, spec, shape, self.scale)

    def zero_points(
        self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, shape: tuple[int, int]
    ) -> torch.Tensor | None:
        """None: floats have none."""
        return None

    def config(
        self,
        plan: Mapping[str, WeightSpec],
        left_dense: Sequence[str],
        *,
        inputs: Mapping[str, ActivationSpec] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Always raises :class:`UnsupportedError`."""
        raise UnsupportedError(_READ_ONLY)

    def read_plan(self, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, StoredGrid]:
        """Modules with a ``weight`` in FP8 and scales beside it."""
        block = _block(config)
        scheme = config.get("activation_scheme", "dynamic")
        if scheme not in ("dynamic", "static"):
            raise CheckpointError(f"quantization_config: activation_scheme must be dynamic or static, not {scheme!r}")
        plan: dict[str, StoredGrid] = {}
        for name in tensors:
            module, _, last = name.rpartition(".")
            if last not in ("weight_scale_inv", "weight_scale"):
                continue
            weight, scales = stored(tensors, f"{module}.weight", 2), tensors[name]
            if weight.dtype != torch.float8_e4m3fn:
                raise UnsupportedError(f"{module}.weight is {weight.dtype}", ["only float8_e4m3fn can be read"])
            shape = (weight.shape[0], weight.shape[1])
            if last == "weight_scale_inv" and block is not None:
                spec = FloatSpec(group_size=block[1], rows=block[0], scale_dtype=scales.dtype)
                inputs = ActivationSpec("e4m3", "group", group_size=block[1])
            else:
                whole = PER_TENSOR if _count(scales.shape) == 1 else PER_CHANNEL
                spec = FloatSpec(group_size=whole, scale_dtype=scales.dtype)
                static = scheme == "static"
                inputs = ActivationSpec("e4m3", "tensor" if static else "token", dynamic=not static)
            plan[module] = StoredGrid(Fp8Codec(last), spec, shape, inputs)
        return plan


def _block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """``weight_block_size``, rows and columns; None for one scale per tensor."""
    found = config.get("weight_block_size")
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2 or not all(type(size) is int and size > 0 for size in found):
        raise CheckpointError(f"quantization_config: weight_block_size must be two sizes, not {found!r}")
    return found[0], found[1]


def _count(shape: Sequence[int]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
