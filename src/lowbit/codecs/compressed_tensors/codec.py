"""The codec of compressed-tensors: which storage a weight takes, the config, and reading both back.

=====================  =====================================================  =================================
``pack-quantized``     integers, alone or of fewer than 8 bits                :mod:`.packed`
``int-quantized``      8-bit integers by channel or tensor, inputs quantized  :mod:`.integers`
``float-quantized``    FP8                                                    :mod:`.floats`
``mxfp8-quantized``    MXFP8                                                  :mod:`.floats`
``nvfp4-…``            NVFP4 (``nvfp4-pack-quantized``)                       :mod:`.fp4`
``mxfp4-…``            MXFP4 (``mxfp4-pack-quantized``)                       :mod:`.fp4`
=====================  =====================================================  =================================

Static inputs add ``input_scale`` float32 ``[1]``, the step; NVFP4 inputs ``input_global_scale`` float32 ``[1]``.
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
    half_dtype,
    refuse_unless_supported,
    stored,
)
from lowbit.codecs.compressed_tensors.arguments import input_arguments, input_spec, weight_arguments, weight_spec
from lowbit.codecs.compressed_tensors.floats import FLOAT8, MXFP8
from lowbit.codecs.compressed_tensors.fp4 import MXFP4, NVFP4
from lowbit.codecs.compressed_tensors.groups import Groups, target
from lowbit.codecs.compressed_tensors.integers import INT8
from lowbit.codecs.compressed_tensors.packed import PACKED, integer_zero_points
from lowbit.codecs.compressed_tensors.storage import Storage
from lowbit.codecs.names import patterns
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats.activations import ActivationSpec
from lowbit.formats.bits import dense_words, sparse_words
from lowbit.formats.floating import FloatSpec
from lowbit.formats.spec import PER_TENSOR, IntSpec
from lowbit.formats.tensor import QuantizedTensor
from lowbit.formats.weights import WeightSpec, WeightTensor

__all__ = ["STORAGES", "CompressedTensorsCodec"]

STORAGES: Mapping[str, Storage] = {one.format: one for one in (PACKED, INT8, FLOAT8, MXFP8, NVFP4, MXFP4)}
"""Every way to store a weight, by the config's word for it."""

_ALIASES: Mapping[str, str] = {"naive-quantized": "int-quantized"}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_MIXED = "mixed-precision"


@dataclass(frozen=True, slots=True)
class CompressedTensorsCodec:
    """compressed-tensors; ``storage`` says how a weight lies in the file (None: as its format and inputs want it)."""

    storage: str | None = None

    @property
    def name(self) -> str:
        """``compressed-tensors``."""
        return "compressed-tensors"

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The model's own 16-bit dtype, so that engines round nothing; float16 for float32 models."""
        return half_dtype(model_dtype)

    def supports(self, spec: WeightSpec, shape: tuple[int, int]) -> list[str]:
        """Reasons against; see :meth:`Codec.supports`."""
        if isinstance(spec, FloatSpec):
            return _float_reasons(spec, shape)
        if not isinstance(spec, IntSpec) or spec.has_float_zeros:
            return [
                f"compressed-tensors stores integers and small floats, not {spec}: use e.g. int4-g128-sym, or nvfp4"
            ]
        reasons = bits_reasons(spec, range(2, 9), self.name) + group_reasons(spec, shape[1])
        if spec.group_size == PER_TENSOR and not spec.symmetric:
            reasons.append("compressed-tensors has no zero point per tensor: use --sym, or one scale per channel")
        if spec.scale_dtype not in _FLOATS:
            reasons.append(f"scales are float16, bfloat16 or float32, not {spec.scale_dtype}")
        return reasons

    def supports_inputs(self, spec: WeightSpec, inputs: ActivationSpec) -> list[str]:
        """Reasons against; see :meth:`Codec.supports_inputs`."""
        allowed = _partners(spec)
        if str(inputs) in allowed:
            return []
        if isinstance(spec, IntSpec) and not spec.symmetric:
            return [f"engines multiply quantized inputs with symmetric weights only, not {spec}: use --sym"]
        names = " or ".join(allowed) or "no quantized inputs"
        return [f"engines run {spec} weights with {names}, not {inputs}"]

    def local_names(self, spec: WeightSpec) -> frozenset[str]:
        """Names of the tensors of a module."""
        return frozenset(self._storage(spec, None).names(spec))

    def encode(
        self, q: WeightTensor, input_scale: torch.Tensor | None = None, *, inputs: ActivationSpec | None = None
    ) -> dict[str, torch.Tensor]:
        """Tensors of one module, integers densely packed."""
        refuse_unless_supported(self, q)
        if isinstance(q, QuantizedTensor) and q.group_index is not None:
            raise UnsupportedError(
                "a g_idx is not written to compressed-tensors, since vLLM refuses it", ["convert to dense instead"]
            )
        tensors = self._storage(q.spec, inputs).encode(q)
        if input_scale is not None:
            two_level = inputs is not None and inputs.scale == "e4m3"
            tensors["input_global_scale" if two_level else "input_scale"] = input_scale.float().reshape(1)
        return tensors

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, shape: tuple[int, int]) -> WeightTensor:
        """Invert :meth:`encode`; also reads the packing of versions before 0.17 and int8 weights."""
        storage = self._storage(spec, None)
        if self.storage is None and storage is PACKED and "weight" in tensors:
            storage = INT8
        weight: WeightTensor = storage.decode(tensors, spec, shape)
        return weight

    def zero_points(
        self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, shape: tuple[int, int]
    ) -> torch.Tensor | None:
        """Zero points of integers; None for all else."""
        return integer_zero_points(tensors, spec, shape) if isinstance(spec, IntSpec) else None

    def config(
        self,
        plan: Mapping[str, WeightSpec],
        left_dense: Sequence[str],
        *,
        inputs: Mapping[str, ActivationSpec] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """``quantization_config``; ``details`` has no place in it.

        One scheme for all is one group that targets ``Linear``. A mixture is a group per scheme whose targets name the
        modules: with ``Linear`` beside them, engines would match merged layers by class before they look at names.
        """
        if not plan:
            return {}
        by_scheme: dict[tuple[str, ActivationSpec | None], list[str]] = {}
        for name, spec in plan.items():
            by_scheme.setdefault((str(spec), (inputs or {}).get(name)), []).append(name)
        groups: dict[str, Any] = {}
        for index, ((_, given), names) in enumerate(by_scheme.items()):
            targets = ["Linear"]
            if len(by_scheme) > 1:
                others = (plan.keys() | set(left_dense)) - set(names)
                targets = [target(pattern) for pattern in patterns(names, others)]
            spec = plan[names[0]]
            groups[f"group_{index}"] = {
                "targets": targets,
                "weights": weight_arguments(spec),
                "input_activations": None if given is None else input_arguments(given),
                "output_activations": None,
                "format": self._storage(spec, given).format,
            }
        formats = {group["format"] for group in groups.values()}
        ignore = list(left_dense)
        # A tied head has no tensor of its own, yet is a Linear to whoever builds the model.
        if not {name.rpartition(".")[2] for name in (*plan, *ignore)} & {"lm_head", "embed_out"}:
            ignore.append("lm_head")
        return {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else _MIXED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ignore,
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def read_plan(self, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, StoredGrid]:
        """Modules with a ``weight_packed``, or a ``weight`` with a scale, each with the group that targets it."""
        for key, what in (("sparsity_config", "sparse weights"), ("transform_config", "rotated weights")):
            found = config.get(key)
            if isinstance(found, Mapping) and (found.get("config_groups") or found.get("format", "dense") != "dense"):
                raise UnsupportedError(f"compressed-tensors {key} ({what}) cannot be read", ["decompress it first"])
        groups = Groups(config)
        plan: dict[str, StoredGrid] = {}
        for name in tensors:
            module, _, last = name.rpartition(".")
            if last == "weight_packed" or (last == "weight" and f"{module}.weight_scale" in tensors):
                plan[module] = _stored_module(module, last, groups.of(module), tensors)
        return plan

    def _storage(self, spec: WeightSpec, inputs: ActivationSpec | None) -> Storage:
        if self.storage is not None:
            return STORAGES[self.storage]
        if isinstance(spec, FloatSpec):
            if spec.scale == "float":
                return FLOAT8
            return NVFP4 if spec.scale == "e4m3" else MXFP8 if spec.element == "e4m3" else MXFP4
        whole = isinstance(spec, IntSpec) and spec.bits == 8 and spec.group_size <= 0
        return INT8 if whole and inputs is not None else PACKED


def _float_reasons(spec: FloatSpec, shape: tuple[int, int]) -> list[str]:
    if spec.scale == "float" and spec.rows == 1 and spec.group_size > 0:
        return [f"no engine reads {spec} from compressed-tensors: use fp8-channel or fp8-block"]
    if spec.group_size > 0 and shape[1] % spec.group_size:
        way_out = "leave it dense (--skip)" if spec.rows == 1 else "use fp8-channel, or leave it dense (--skip)"
        return [f"{spec} needs a multiple of {spec.group_size} input features, not {shape[1]}: {way_out}"]
    return []


def _partners(spec: WeightSpec) -> tuple[str, ...]:
    """The formats of inputs, by name, that engines run weights of ``spec`` with."""
    if isinstance(spec, IntSpec):
        if not spec.symmetric:
            return ()
        if spec.bits == 8 and spec.group_size <= 0:
            return "int8-token", "int8-tensor-static"
        return ("int8-token", "e4m3-token") if spec.bits == 4 and spec.group_size == 128 else ("int8-token",)
    if not isinstance(spec, FloatSpec):
        return ()
    if spec.scale == "float":
        return ("e4m3-g128",) if spec.rows > 1 else ("e4m3-token", "e4m3-tensor-static")
    return (f"{spec.element}-g{spec.group_size}",)


def _stored_module(
    module: str, last: str, scheme: Mapping[str, Any], tensors: Mapping[str, TensorHeader]
) -> StoredGrid:
    """How ``module`` is stored, from its group and its headers."""
    weights = scheme.get("weights")
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"quantization_config: the group that targets {module} has no weights")
    weight = stored(tensors, f"{module}.{last}", 2)
    scale = tensors.get(f"{module}.weight_scale")
    if scale is None:
        raise CheckpointError(f"tensor {module}.weight_scale is missing: the checkpoint is incomplete, fetch it again")
    layout = scheme.get("format")
    if layout not in (*STORAGES, *_ALIASES, None, _MIXED):
        raise UnsupportedError(f"{module}: compressed-tensors {layout} cannot be read", [f"{', '.join(STORAGES)} can"])
    try:
        spec = weight_spec(weights, scale.dtype)
        inputs = input_spec(scheme.get("input_activations"))
    except UnsupportedError as error:
        raise UnsupportedError(f"{module}: {error}") from error
    storage = _storage_of(module, last, weight.dtype, spec)
    rows, columns = weight.shape
    if storage is PACKED and isinstance(spec, IntSpec):
        columns = _columns(module, spec, columns, scale)
    elif last == "weight_packed":
        columns *= 2
    return StoredGrid(CompressedTensorsCodec(storage.format), spec, (rows, columns), inputs)


def _storage_of(module: str, last: str, dtype: torch.dtype, spec: IntSpec | FloatSpec) -> Storage:
    """The storage that the weight's dtype and format make up; :class:`UnsupportedError` if there is none."""
    found = None
    if isinstance(spec, IntSpec):
        found = {("weight_packed", torch.int32): PACKED, ("weight", torch.int8): INT8}.get((last, dtype))
    elif spec.element == "e2m1" and (last, dtype) == ("weight_packed", torch.uint8):
        found = NVFP4 if spec.scale == "e4m3" else MXFP4
    elif spec.element == "e4m3" and (last, dtype) == ("weight", torch.float8_e4m3fn):
        found = FLOAT8 if spec.scale == "float" else MXFP8
    if found is None:
        raise UnsupportedError(
            f"{module}.{last} is {dtype}, which is no way to store {spec}",
            ["int32 words, int8, float8_e4m3fn and pairs of FP4 in uint8 can be read"],
        )
    return found


def _columns(module: str, spec: IntSpec, words: int, scale: TensorHeader) -> int:
    # weight_shape is data, not header; a grouped scale pins the width down, otherwise whole words are taken to be full.
    if spec.group_size > 0:
        columns = int(scale.shape[-1]) * spec.group_size
        if words not in (dense_words(columns, spec.bits), sparse_words(columns, spec.bits)):
            raise CheckpointError(
                f"{module}: {words} packed words and {scale.shape[-1]} groups do not fit {spec}: "
                "config and weights disagree"
            )
        return columns
    return words * 32 // spec.bits
