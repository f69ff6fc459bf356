"""HQQ checkpoints as transformers 4 writes and loads them (``HqqConfig``): groups along rows, zero points in floats.

=========  =====================  ==========================================================================
``W_q``    uint8, int32 (3 bits)  ``[groups * bits/8, group_size]``, 3 bits ``[ceil(groups/10), group_size]``
``scale``  float                  ``[groups, 1]``
``zero``   float                  ``[groups, 1]``
``shape``  int64                  ``[2]``, (out, in)
=========  =====================  ==========================================================================

A matrix is cut row by row into ``groups`` of ``group_size`` columns. With ``k`` codes to a byte, byte ``[i, j]`` holds
the codes ``j`` of the groups ``i``, ``i + groups/k`` …, the first in the highest bits; 3 bits are ten to an int32, bits
29 down to 0, the groups padded to a multiple of ten. 5 and 6 bits take a byte each. The weight is
``(code - zero) * scale``. Besides, a module has a dozen scalars that say the same as config.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.codecs.codec import (
    StoredGrid,
    TensorHeader,
    bits_reasons,
    group_reasons,
    integer,
    refuse_unless_supported,
    required,
    stored,
    weights_only,
)
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats.activations import ActivationSpec
from lowbit.formats.spec import IntSpec
from lowbit.formats.tensor import QuantizedTensor
from lowbit.formats.weights import WeightSpec, WeightTensor

__all__ = ["HqqCodec"]

_PACKING: Mapping[int, tuple[str, int]] = {
    8: ("8bit_u8", 1),
    6: ("8bit_u8", 1),
    5: ("8bit_u8", 1),
    4: ("4bit_u8", 2),
    3: ("3bit_32", 10),
    2: ("2bit_u8", 4),
}
"""Name of the packing for each width, and the codes to a word."""
_FLAGS: Mapping[str, int] = {
    "channel_wise": 1,
    "encoded_state_dict": 1,
    "offload_meta": 0,
    "optimize": 1,
    "quant_scale": 0,
    "quant_zero": 0,
    "round_zero": 0,
    "stores_quant_config": 1,
    "view_as_float": 0,
}
"""Scalars that a reader wants to find, and their values here."""
_DESCRIBING = ("shape", "nbits", "group_size", "axis", "quant_scale", "quant_zero", "view_as_float")


@dataclass(frozen=True, slots=True)
class HqqCodec:
    """HQQ with groups along rows (``axis=1``), which is what its fast kernels and transformers' default take."""

    @property
    def name(self) -> str:
        """``hqq``."""
        return "hqq"

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """float16, as precise for zero points of up to 8 bits as need be."""
        return torch.float16

    def supports(self, spec: WeightSpec, shape: tuple[int, int]) -> list[str]:
        """Reasons against; see :meth:`Codec.supports`."""
        if not isinstance(spec, IntSpec) or spec.symmetric or not spec.has_float_zeros:
            bits = spec.bits if isinstance(spec, IntSpec) else 4
            return [f"HQQ stores integers with zero points in floats, not {spec}: use --scheme int{bits}-g64-affine"]
        reasons = bits_reasons(spec, tuple(sorted(_PACKING)), "HQQ") + group_reasons(spec, shape[1])
        if spec.group_size == 0:
            reasons.append("HQQ has no scale per tensor here: use groups, e.g. --group-size 64")
        if reasons:
            return reasons
        groups, together = shape[0] * spec.groups(shape[1]), _PACKING[spec.bits][1]
        if spec.bits in (2, 4) and groups % together:
            reasons.append(f"HQQ packs {together} groups together, {groups} is no multiple: use another group size")
        return reasons

    def supports_inputs(self, spec: WeightSpec, inputs: ActivationSpec) -> list[str]:
        """Reasons against; see :meth:`Codec.supports_inputs`."""
        return weights_only(inputs, "HQQ")

    def local_names(self, spec: WeightSpec) -> frozenset[str]:
        """Names of the tensors of a module."""
        names = ("W_q", "scale", "zero", "shape", "nbits", "group_size", "axis", "packing", "unpack_view_dtype")
        return frozenset((*names, "compute_dtype", *_FLAGS))

    def encode(
        self, q: WeightTensor, input_scale: torch.Tensor | None = None, *, inputs: ActivationSpec | None = None
    ) -> dict[str, torch.Tensor]:
        """Tensors of one module."""
        refuse_unless_supported(self, q)
        if not isinstance(q, QuantizedTensor) or q.zero_points is None or q.group_index is not None:
            raise UnsupportedError(f"HQQ cannot hold {q.spec}", ["columns must be grouped in order, with zero points"])
        packing, together = _PACKING[q.spec.bits]
        size = _group_size(q.spec, q.shape[1])
        dtype = torch.int32 if packing == "3bit_32" else torch.uint8
        return {
            "W_q": _pack(q.codes.view(-1, size), q.spec.bits, together, dtype),
            "scale": q.scales.reshape(-1, 1),
            "zero": q.zero_points.reshape(-1, 1),
            "shape": torch.tensor(q.shape, dtype=torch.int64),
            "nbits": torch.tensor(q.spec.bits, dtype=torch.int32),
            "group_size": torch.tensor(size, dtype=torch.int32),
            "axis": torch.tensor(1, dtype=torch.int32),
            "packing": _text(packing),
            "unpack_view_dtype": _text(str(dtype)),
            "compute_dtype": _text(str(q.scales.dtype)),
            **{name: torch.tensor(value, dtype=torch.uint8) for name, value in _FLAGS.items()},
        }

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, shape: tuple[int, int]) -> QuantizedTensor:
        """Invert :meth:`encode`."""
        if not isinstance(spec, IntSpec) or spec.bits not in _PACKING:
            raise UnsupportedError(f"HQQ cannot hold {spec}", self.supports(spec, shape))
        size, together = _group_size(spec, shape[1]), _PACKING[spec.bits][1]
        groups = shape[0] * spec.groups(shape[1])
        packed = required(tensors, "W_q", (-(-groups // together), size))
        scales = required(tensors, "scale", (groups, 1)).view(shape[0], -1).to(spec.scale_dtype)
        zeros = self.zero_points(tensors, spec, shape)
        return QuantizedTensor(spec, _unpack(packed, spec.bits, together)[:groups].reshape(shape), scales, zeros)

    def zero_points(
        self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, shape: tuple[int, int]
    ) -> torch.Tensor | None:
        """Zero points, floats."""
        if not isinstance(spec, IntSpec):
            return None
        zeros = required(tensors, "zero", (shape[0] * spec.groups(shape[1]), 1))
        return zeros.view(shape[0], -1).to(spec.zero_dtype)

    def config(
        self,
        plan: Mapping[str, WeightSpec],
        left_dense: Sequence[str],
        *,
        inputs: Mapping[str, ActivationSpec] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """``quantization_config``. Modules may differ, for each says itself how it is stored.

        Readers leave a module dense if an entry of ``skip_modules`` is part of its name, so a dense layer whose name is
        part of a quantized one's is refused.
        """
        if not plan:
            return {}
        for dense in left_dense:
            if clash := next((name for name in plan if dense in name), None):
                raise UnsupportedError(
                    f"HQQ's readers would take {clash} for dense, since it contains the name of {dense}, which is",
                    ["quantize both or neither, or use the format compressed-tensors"],
                )
        spec = next(iter(plan.values()))
        weights = {
            "nbits": spec.bits,
            "channel_wise": True,
            "group_size": None if spec.group_size <= 0 else spec.group_size,
            "optimize": True,
            "round_zero": False,
            "axis": 1,
            "view_as_float": False,
        }
        return {
            "quant_method": "hqq",
            "quant_config": {
                "weight_quant_params": weights,
                "scale_quant_params": None,
                "zero_quant_params": None,
                "offload_meta": False,
            },
            "skip_modules": list(left_dense),
        }

    def read_plan(self, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, StoredGrid]:
        """Modules with a ``W_q``; :meth:`described` tells their widths and shapes."""
        nested = config.get("quant_config")
        given = nested.get("weight_quant_params") if isinstance(nested, Mapping) else None
        if not isinstance(given, Mapping):
            raise CheckpointError("quantization_config: quant_config has no weight_quant_params")
        bits = integer(given, ("nbits",))
        if bits not in _PACKING:
            raise UnsupportedError(f"HQQ with {bits} bits cannot be read", ["2, 3, 4, 5, 6 and 8 bits can"])
        plan: dict[str, StoredGrid] = {}
        for name in tensors:
            if not name.endswith(".W_q"):
                continue
            module = name.removesuffix(".W_q")
            packed, scale = stored(tensors, name, 2), stored(tensors, f"{module}.scale", 2)
            zero = stored(tensors, f"{module}.zero", 2)
            size = packed.shape[1]
            spec = IntSpec(bits, size, False, scale.dtype, zero.dtype if zero.dtype.is_floating_point else scale.dtype)
            plan[module] = StoredGrid(self, spec, (scale.shape[0], size))
        return plan

    def describing(self, spec: WeightSpec) -> frozenset[str]:
        """Names of the small tensors that :meth:`described` reads."""
        return frozenset(_DESCRIBING)

    def described(self, entry: StoredGrid, tensors: Mapping[str, torch.Tensor]) -> StoredGrid:
        """``entry`` with the width, group size and shape that its module's scalars give.

        Raises :class:`UnsupportedError` for groups down the columns and quantized scales, and
        :class:`CheckpointError` where the scalars do not fit the packed weight.
        """
        values: dict[str, list[int]] = {}
        for name in _DESCRIBING:
            tensor = tensors.get(name)
            if tensor is None or tensor.is_floating_point() or tensor.numel() != (2 if name == "shape" else 1):
                raise CheckpointError(f"tensor {name} is missing or misshapen: the checkpoint is incomplete")
            values[name] = tensor.flatten().tolist()
        (bits,), (size,), (rows, columns) = values["nbits"], values["group_size"], values["shape"]
        if values["axis"] != [1] or any(values[flag] != [0] for flag in ("quant_scale", "quant_zero", "view_as_float")):
            raise UnsupportedError(
                "HQQ with groups down the columns (axis 0), quantized scales or weights seen as floats cannot be read",
                ["quantize the model again with axis=1 and plain scales"],
            )
        if bits not in _PACKING or min(rows, columns) <= 0 or size <= 0 or columns % size:
            raise CheckpointError(f"nbits {bits}, group_size {size} and shape {[rows, columns]} do not go together")
        groups = rows * columns // size
        if size != entry.shape[1] or groups != entry.shape[0]:
            raise CheckpointError(f"shape {[rows, columns]} in groups of {size} does not fit {entry.shape[0]} scales")
        assert isinstance(entry.spec, IntSpec)
        spec = IntSpec(bits, size, False, entry.spec.scale_dtype, entry.spec.zero_dtype)
        return entry._replace(spec=spec, shape=(rows, columns))


def _group_size(spec: IntSpec, columns: int) -> int:
    return spec.group_size if spec.group_size > 0 else columns


def _pack(groups: torch.Tensor, bits: int, together: int, dtype: torch.dtype) -> torch.Tensor:
    """uint8 codes ``[groups, size]`` as words ``[ceil(groups/together), size]``."""
    if together == 1:
        return groups.contiguous()
    rows = -(-groups.shape[0] // together)
    padded = torch.nn.functional.pad(groups, (0, 0, 0, rows * together - groups.shape[0]))
    words = torch.zeros(rows, groups.shape[1], dtype=dtype, device=groups.device)
    for place, part in enumerate(padded.view(together, rows, -1)):
        words |= part.to(dtype) << (bits * (together - 1 - place))
    return words


def _unpack(words: torch.Tensor, bits: int, together: int) -> torch.Tensor:
    """Invert :func:`_pack`, padding included."""
    if together == 1:
        return words.to(torch.uint8)
    parts = [(words >> (bits * (together - 1 - place))) & ((1 << bits) - 1) for place in range(together)]
    return torch.cat(parts).to(torch.uint8)


def _text(value: str) -> torch.Tensor:
    return torch.tensor(list(value.encode()), dtype=torch.uint8)
