"""compressed-tensors checkpoints: integers packed into words (``pack-quantized``) or as int8 (``int-quantized``).

=======================  ======  ==========================  ===============================================
``weight_packed``        int32   ``[out, ceil(in*b/32)]``    codes packed along a row
``weight_scale``         float   ``[out, groups]``           per tensor: ``[1]``
``weight_shape``         int64   ``[2]``                     ``(out, in)``
``weight_zero_point``    int32   ``[ceil(out*b/32), groups]``  asymmetric only, packed along the outputs
=======================  ======  ==========================  ===============================================

A code is the signed value plus ``2**(bits-1)``, for weights and zero points alike. Packing is dense since
compressed-tensors 0.17; before, 3, 5, 6 and 7 bits left the top bits of a word unused. Files don't say which: the
number of words does. ``int-quantized`` (``naive-quantized``) keeps signed values as int8 in ``weight``.

Configs are written with the keys that compressed-tensors 0.13 knows, since every version refuses unknown ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lowbit.codecs.codec import (
    StoredGrid,
    TensorHeader,
    bits_reasons,
    group_reasons,
    half_dtype,
    integer,
    integer_spec,
    integer_weight,
    integers_only,
    required,
    stored,
    weights_only,
)
from lowbit.codecs.names import patterns
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats.activations import ActivationSpec
from lowbit.formats.bits import dense_words, pack, sparse_words, unpack, unpack_sparse
from lowbit.formats.spec import PER_CHANNEL, PER_TENSOR, IntSpec
from lowbit.formats.tensor import QuantizedTensor
from lowbit.formats.weights import WeightSpec, WeightTensor

__all__ = ["CompressedTensorsCodec"]

_FORMATS = {"pack-quantized": "packed", "int-quantized": "int8", "naive-quantized": "int8"}
_PRESET = re.compile(r"W(?P<bits>[2-8])A(?P<activations>4|8|16)(?P<asym>_ASYM)?|INT8", re.IGNORECASE)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class CompressedTensorsCodec:
    """compressed-tensors; ``storage`` says how weights lie in the file. Only ``packed`` is written."""

    storage: Literal["packed", "int8"] = "packed"

    @property
    def name(self) -> str:
        """``compressed-tensors``."""
        return "compressed-tensors"

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The model's own 16-bit dtype, so that engines round nothing; float16 for float32 models."""
        return half_dtype(model_dtype)

    def supports(self, spec: WeightSpec, shape: tuple[int, int]) -> list[str]:
        """Reasons against; see :meth:`Codec.supports`."""
        if not isinstance(spec, IntSpec) or spec.has_float_zeros:
            return integers_only(spec, self.name)
        reasons = bits_reasons(spec, range(2, 9), self.name) + group_reasons(spec, shape[1])
        if self.storage != "packed":
            reasons.append("int-quantized is read, not written: write pack-quantized instead")
        if spec.group_size == PER_TENSOR and not spec.symmetric:
            reasons.append("compressed-tensors has no zero point per tensor: use --sym, or one scale per channel")
        if spec.scale_dtype not in _FLOATS:
            reasons.append(f"scales are float16, bfloat16 or float32, not {spec.scale_dtype}")
        return reasons

    def supports_inputs(self, spec: WeightSpec, inputs: ActivationSpec) -> list[str]:
        """Reasons against; see :meth:`Codec.supports_inputs`."""
        return weights_only(inputs, self.name)

    def local_names(self, spec: WeightSpec) -> frozenset[str]:
        """Names of the tensors of a module."""
        spec = integer_spec(spec, self.name)
        names = ("weight",) if self.storage == "int8" else ("weight_packed", "weight_shape")
        return frozenset((*names, "weight_scale", *(() if spec.symmetric else ("weight_zero_point",))))

    def encode(self, q: WeightTensor, input_scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Tensors of one module, densely packed."""
        q = integer_weight(self, q)
        if q.group_index is not None:
            raise UnsupportedError(
                "a g_idx is not written to compressed-tensors, since vLLM refuses it", ["convert to dense instead"]
            )
        tensors = {
            "weight_packed": pack(q.codes, q.spec.bits),
            "weight_scale": q.scales.flatten() if q.spec.group_size == PER_TENSOR else q.scales.contiguous(),
            "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
        }
        if q.zero_points is not None:
            tensors["weight_zero_point"] = pack(q.zero_points, q.spec.bits, dim=0)
        return tensors

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, shape: tuple[int, int]) -> QuantizedTensor:
        """Invert :meth:`encode`; also reads the packing of versions before 0.17 and int8 weights."""
        spec = integer_spec(spec, self.name)
        scale_shape = _scale_shape(spec, shape)
        if "weight_scale" not in tensors:
            raise CheckpointError("tensor weight_scale is missing: the checkpoint is incomplete, fetch it again")
        scales = tensors["weight_scale"]
        if scales.numel() != scale_shape[0] * scale_shape[1]:
            raise CheckpointError(f"tensor weight_scale has shape {tuple(scales.shape)}, expected {scale_shape}")
        if "weight_shape" in tensors and tuple(tensors["weight_shape"].tolist()) != shape:
            raise CheckpointError(
                f"tensor weight_shape says {tensors['weight_shape'].tolist()}, expected {list(shape)}"
            )
        return QuantizedTensor(
            spec,
            self._codes(tensors, spec, shape),
            scales.reshape(scale_shape),
            self.zero_points(tensors, spec, shape),
            _group_index(tensors, spec.group_size, shape[1]),
        )

    def _codes(self, tensors: Mapping[str, torch.Tensor], spec: IntSpec, shape: tuple[int, int]) -> torch.Tensor:
        if self.storage == "int8":
            return _unsigned(required(tensors, "weight", shape), spec)
        rows, columns = shape
        words = tensors["weight_packed"].shape[-1] if "weight_packed" in tensors else 0
        if words == sparse_words(columns, spec.bits) != dense_words(columns, spec.bits):
            return unpack_sparse(tensors["weight_packed"], spec.bits, columns)
        return unpack(required(tensors, "weight_packed", (rows, dense_words(columns, spec.bits))), spec.bits, columns)

    def zero_points(
        self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, shape: tuple[int, int]
    ) -> torch.Tensor | None:
        """Zero points, packed along the outputs (densely or not, as their number of words says) or as int8."""
        spec = integer_spec(spec, self.name)
        if spec.symmetric:
            return None
        expected = _scale_shape(spec, shape)
        found = tensors.get("weight_zero_point")
        if found is None:
            raise CheckpointError("tensor weight_zero_point is missing: the checkpoint is incomplete, fetch it again")
        rows, groups = expected
        if found.dtype == torch.int8 and found.numel() == rows * groups:
            return _unsigned(found, spec).reshape(expected)
        if tuple(found.shape) == (sparse_words(rows, spec.bits), groups) != (dense_words(rows, spec.bits), groups):
            return unpack_sparse(found, spec.bits, rows, 0)
        return unpack(
            required(tensors, "weight_zero_point", (dense_words(rows, spec.bits), groups)), spec.bits, rows, 0
        )

    def config(
        self,
        plan: Mapping[str, WeightSpec],
        left_dense: Sequence[str],
        *,
        inputs: Mapping[str, ActivationSpec] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """``quantization_config``; ``details`` has no place in it.

        One spec for all is one group that targets ``Linear``. A mixture is a group per spec whose targets name the
        modules: with ``Linear`` beside them, engines would match merged layers by class before they look at names.
        """
        if not plan:
            return {}
        by_scheme: dict[tuple[int, int, bool], list[str]] = {}
        for name, stored_spec in plan.items():
            spec = integer_spec(stored_spec, self.name)
            by_scheme.setdefault((spec.bits, spec.group_size, spec.symmetric), []).append(name)
        groups: dict[str, Any] = {}
        for index, (scheme, names) in enumerate(by_scheme.items()):
            targets = ["Linear"]
            if len(by_scheme) > 1:
                others = (plan.keys() | set(left_dense)) - set(names)
                targets = [_target(pattern) for pattern in patterns(names, others)]
            groups[f"group_{index}"] = {
                "targets": targets,
                "weights": _weights(*scheme),
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        ignore = list(left_dense)
        # A tied head has no tensor of its own, yet is a Linear to whoever builds the model.
        if not {name.rpartition(".")[2] for name in (*plan, *ignore)} & {"lm_head", "embed_out"}:
            ignore.append("lm_head")
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ignore,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def read_plan(self, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, StoredGrid]:
        """Modules with a ``weight_packed`` or an int8 ``weight`` with a scale, each with the group that targets it."""
        for key, what in (("sparsity_config", "sparse weights"), ("transform_config", "rotated weights")):
            found = config.get(key)
            if isinstance(found, Mapping) and (found.get("config_groups") or found.get("format", "dense") != "dense"):
                raise UnsupportedError(f"compressed-tensors {key} ({what}) cannot be read", ["decompress it first"])
        schemes = _Schemes(config)
        plan: dict[str, StoredGrid] = {}
        for name in tensors:
            module, _, last = name.rpartition(".")
            if last == "weight_packed":
                plan[module] = schemes.packed_module(module, tensors)
            elif last == "weight" and f"{module}.weight_scale" in tensors:
                plan[module] = schemes.plain_module(module, tensors)
        return plan


class _Schemes:
    """The config's groups, by target."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._exact: dict[str, Mapping[str, Any]] = {}
        self._regexes: list[tuple[re.Pattern[str], Mapping[str, Any]]] = []
        self._classes: list[Mapping[str, Any]] = []
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise CheckpointError("quantization_config: config_groups is missing or empty")
        for name, group in groups.items():
            scheme = _preset(name, group) if isinstance(group, list) else group
            if not isinstance(scheme, Mapping) or not isinstance(scheme.get("targets"), list):
                raise CheckpointError(f"quantization_config: config_groups.{name} has no list of targets")
            scheme = {"format": config.get("format"), **{k: v for k, v in scheme.items() if v is not None}}
            for target in scheme["targets"]:
                self._add(str(target), scheme)

    def _add(self, target: str, scheme: Mapping[str, Any]) -> None:
        if target.startswith("re:"):
            try:
                self._regexes.append((re.compile(target[3:]), scheme))
            except re.error as error:
                raise CheckpointError(f"quantization_config: target {target!r} is no regular expression") from error
        elif "." in target:
            self._exact[target] = scheme
        else:
            self._exact[target] = scheme
            self._classes.append(scheme)

    def of(self, module: str) -> Mapping[str, Any]:
        """The scheme of ``module``: by exact name, else by regex, else the one group that targets a class."""
        if module in self._exact:
            return self._exact[module]
        for pattern, scheme in self._regexes:
            if pattern.match(module):
                return scheme
        if self._classes:
            return self._classes[0]
        raise CheckpointError(f"{module}: quantized tensors, but no group of quantization_config targets it")

    def weights(self, module: str) -> Mapping[str, Any]:
        """The weights' arguments for ``module``; :class:`UnsupportedError` unless they are plain integers."""
        scheme = self.of(module)
        weights = scheme.get("weights")
        if not isinstance(weights, Mapping):
            raise CheckpointError(f"quantization_config: the group that targets {module} has no weights")
        layout, kind = scheme.get("format"), weights.get("type", "int")
        if kind != "int" or layout not in (*_FORMATS, None, "mixed-precision"):
            raise UnsupportedError(
                f"{module}: compressed-tensors {layout} with {kind} weights cannot be read",
                ["integer weights in pack-quantized or int-quantized form can"],
            )
        return weights

    def packed_module(self, module: str, tensors: Mapping[str, TensorHeader]) -> StoredGrid:
        weights = self.weights(module)
        packed = stored(tensors, f"{module}.weight_packed", 2)
        if packed.dtype != torch.int32:
            raise UnsupportedError(f"{module}.weight_packed is {packed.dtype}", ["only int32 words can be read"])
        spec = _spec(weights, tensors[f"{module}.weight_scale"].dtype if f"{module}.weight_scale" in tensors else None)
        rows, words = packed.shape
        columns = _columns(module, spec, words, tensors)
        return StoredGrid(CompressedTensorsCodec(), spec, (rows, columns))

    def plain_module(self, module: str, tensors: Mapping[str, TensorHeader]) -> StoredGrid:
        weights = self.weights(module)
        weight = stored(tensors, f"{module}.weight", 2)
        if weight.dtype != torch.int8:
            raise UnsupportedError(f"{module}.weight is {weight.dtype}", ["only int8 weights with a scale can be read"])
        spec = _spec(weights, tensors[f"{module}.weight_scale"].dtype)
        return StoredGrid(CompressedTensorsCodec("int8"), spec, (weight.shape[0], weight.shape[1]))


def _columns(module: str, spec: IntSpec, words: int, tensors: Mapping[str, TensorHeader]) -> int:
    # weight_shape is data, not header; a grouped scale pins the width down, otherwise whole words are taken to be full.
    scale = tensors.get(f"{module}.weight_scale")
    if scale is None:
        raise CheckpointError(f"tensor {module}.weight_scale is missing: the checkpoint is incomplete, fetch it again")
    if spec.group_size > 0:
        columns = int(scale.shape[-1]) * spec.group_size
        if words not in (dense_words(columns, spec.bits), sparse_words(columns, spec.bits)):
            raise CheckpointError(
                f"{module}: {words} packed words and {scale.shape[-1]} groups do not fit {spec}: "
                "config and weights disagree"
            )
        return columns
    return words * 32 // spec.bits


def _spec(weights: Mapping[str, Any], scale_dtype: torch.dtype | None) -> IntSpec:
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    if strategy == "group":
        size = integer(weights, ("group_size",))
    elif strategy in ("channel", "tensor"):
        size = PER_CHANNEL if strategy == "channel" else PER_TENSOR
    else:
        raise UnsupportedError(f"compressed-tensors strategy {strategy!r} cannot be read for integer weights")
    bits = integer(weights, ("num_bits",), 8)
    if not 2 <= bits <= 8 or (strategy == "group" and size <= 0):
        raise CheckpointError(f"quantization_config: {bits} bits with group size {size} is no valid format")
    return IntSpec(bits, size, weights.get("symmetric", True) is not False, scale_dtype or torch.float16)


def _scale_shape(spec: IntSpec, shape: tuple[int, int]) -> tuple[int, int]:
    return (1, 1) if spec.group_size == PER_TENSOR else (shape[0], spec.groups(shape[1]))


def _weights(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    strategy = {PER_CHANNEL: "channel", PER_TENSOR: "tensor"}.get(group_size, "group")
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size if strategy == "group" else None,
        "dynamic": False,
    }


def _preset(name: str, targets: list[Any]) -> dict[str, Any]:
    match = _PRESET.fullmatch(name)
    if match is None:
        raise UnsupportedError(f"compressed-tensors preset {name!r} cannot be read", ["integer presets (W4A16 …) can"])
    by_channel = match["bits"] is None or (match["bits"] == "8" and match["activations"] == "8")
    return {
        "targets": targets,
        "weights": _weights(int(match["bits"] or 8), PER_CHANNEL if by_channel else 128, match["asym"] is None),
    }


def _target(pattern: str) -> str:
    plain = re.sub(r"\\(.)", r"\1", pattern[1:-1])
    return plain if f"^{re.escape(plain)}$" == pattern else f"re:{pattern}"


def _unsigned(values: torch.Tensor, spec: IntSpec) -> torch.Tensor:
    # uint8 addition wraps, which is what turns two's complement into an offset.
    return values.contiguous().view(torch.uint8) + spec.midpoint


def _group_index(tensors: Mapping[str, torch.Tensor], group_size: int, columns: int) -> torch.Tensor | None:
    if group_size <= 0 or "weight_g_idx" not in tensors:
        return None
    found = required(tensors, "weight_g_idx", (columns,)).to(torch.int32)
    if torch.equal(found, torch.arange(columns, dtype=torch.int32, device=found.device) // group_size):
        return None
    if int(found.min()) < 0 or int(found.max()) >= columns // group_size:
        raise CheckpointError("tensor weight_g_idx names a group that has no scale")
    return found
