"""What an on-disk format has to offer: the codec protocol and the checks that all formats share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch

from lowbit.codecs.gguf.blocks import GgufCodec
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats.activations import ActivationSpec
from lowbit.formats.ggml import BlockTensor, GgmlType
from lowbit.formats.spec import IntSpec
from lowbit.formats.tensor import QuantizedTensor
from lowbit.formats.weights import WeightSpec, WeightTensor

__all__ = ["Codec", "StoredBlocks", "StoredGrid", "StoredModule", "TensorHeader"]

_USUAL_GROUPS = (16, 32, 64, 128, 256, 512)


class TensorHeader(Protocol):
    """Dtype and shape of a stored tensor, without its data."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the elements."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents, outermost first."""
        ...


class Codec(Protocol):
    """One on-disk format of quantized linear weights. All methods are pure functions.

    Tensor names are local to a module (``qweight``, ``weight_packed`` …): the caller prefixes the module's name.
    """

    @property
    def name(self) -> str:
        """What the format is called on the command line and in :data:`lowbit.codecs.CODECS`."""
        ...

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype that scales are best stored in for a model of ``model_dtype``."""
        ...

    def supports(self, spec: WeightSpec, shape: tuple[int, int]) -> list[str]:
        """Reasons why a ``shape`` (out, in) weight cannot be stored as ``spec``, each with the way out; or none."""
        ...

    def supports_inputs(self, spec: WeightSpec, inputs: ActivationSpec) -> list[str]:
        """Reasons why weights of ``spec`` cannot be stored together with the format ``inputs`` of their inputs."""
        ...

    def local_names(self, spec: WeightSpec) -> frozenset[str]:
        """Names of the tensors that :meth:`encode` makes of a weight, the scale of its inputs not counted."""
        ...

    def encode(
        self, q: WeightTensor, input_scale: torch.Tensor | None = None, *, inputs: ActivationSpec | None = None
    ) -> dict[str, torch.Tensor]:
        """Tensors of one module whose inputs are quantized as ``inputs`` (None: they are not).

        ``input_scale`` float32 ``[1]`` is that of inputs that need a calibrated one. Raises :class:`UnsupportedError`
        with the reasons if the format cannot hold ``q``.
        """
        ...

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, shape: tuple[int, int]) -> WeightTensor:
        """Invert :meth:`encode`. Raises :class:`CheckpointError` for missing, misshapen or contradictory tensors."""
        ...

    def zero_points(
        self, tensors: Mapping[str, torch.Tensor], spec: WeightSpec, shape: tuple[int, int]
    ) -> torch.Tensor | None:
        """Zero points of a module (see :class:`QuantizedTensor`), without touching its codes; None when it has none."""
        ...

    def config(
        self,
        plan: Mapping[str, WeightSpec],
        left_dense: Sequence[str],
        *,
        inputs: Mapping[str, ActivationSpec] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """``quantization_config`` for config.json; empty when nothing is quantized.

        ``plan`` and ``left_dense`` name modules as the checkpoint does: the quantized ones, and the linear layers
        (language-model head and routers included) that stay dense; ``inputs`` those whose inputs are quantized too.
        ``details`` says how the weights were made; formats without a place for it leave it out. Raises
        :class:`UnsupportedError` for a mixture the format cannot express.
        """
        ...

    def read_plan(self, config: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> dict[str, StoredGrid]:
        """Which modules of a checkpoint with this ``quantization_config`` are quantized, and how.

        Raises :class:`UnsupportedError` for a variant that cannot be read and :class:`CheckpointError` where the
        config and the tensors contradict each other.
        """
        ...


INPUT_SCALES = ("input_scale", "input_global_scale")
"""Local names of the calibrated scale of quantized inputs."""


class StoredGrid(NamedTuple):
    """How one module is stored: its weight, and the format of its inputs if an engine quantizes them."""

    codec: Codec
    spec: WeightSpec
    shape: tuple[int, int]
    """``(out_features, in_features)``"""
    inputs: ActivationSpec | None = None

    def local_names(self) -> frozenset[str]:
        """Names of the tensors that make up the weight, those that may be absent not counted."""
        return self.codec.local_names(self.spec)

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> WeightTensor:
        """The weight; :class:`CheckpointError` for missing, misshapen or contradictory tensors."""
        return self.codec.decode(tensors, self.spec, self.shape)


class StoredBlocks(NamedTuple):
    """How one module's weight is stored in a GGUF file."""

    codec: GgufCodec
    spec: GgmlType
    shape: tuple[int, int]
    """``(out_features, in_features)``"""

    def local_names(self) -> frozenset[str]:
        """Names of the tensors that make up the weight."""
        return self.codec.local_names(self.spec)

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> BlockTensor:
        """The weight; :class:`CheckpointError` for missing or misshapen blocks."""
        return self.codec.decode(tensors, self.spec, self.shape)


StoredModule: TypeAlias = StoredGrid | StoredBlocks
"""How one module's weight is stored."""


def group_reasons(spec: IntSpec, in_features: int) -> list[str]:
    """Reasons against a ragged last group, naming the nearest group size that divides."""
    if spec.group_size <= 0 or in_features % spec.group_size == 0:
        return []
    usable = [size for size in _USUAL_GROUPS if in_features % size == 0]
    nearest = min(usable, key=lambda size: (abs(size - spec.group_size), size)) if usable else None
    way_out = f"group size {nearest}" if nearest else "one scale per channel (group size -1)"
    return [f"group size {spec.group_size} does not divide {in_features} input features: use {way_out}"]


def bits_reasons(spec: IntSpec, allowed: Sequence[int], what: str) -> list[str]:
    """Reasons against a width outside ``allowed``, naming the nearest one."""
    if spec.bits in allowed:
        return []
    nearest = min(allowed, key=lambda bits: (abs(bits - spec.bits), -bits))
    return [f"{what} stores {_either(allowed)} bits, not {spec.bits}: use {nearest} bits"]


def integers_only(spec: WeightSpec, what: str) -> list[str]:
    """Reasons against a format whose weights are not integers with integer zero points."""
    if isinstance(spec, IntSpec) and not spec.has_float_zeros:
        return []
    return [f"{what} stores integer weights, not {spec}: use e.g. int4-g128-sym, or another --format"]


def integer_spec(spec: WeightSpec, what: str) -> IntSpec:
    """``spec`` as one of integers; :class:`UnsupportedError` with the reasons otherwise."""
    if not isinstance(spec, IntSpec) or spec.has_float_zeros:
        raise UnsupportedError(f"{what} cannot hold {spec}", integers_only(spec, what))
    return spec


def integer_weight(codec: Codec, q: WeightTensor) -> QuantizedTensor:
    """``q`` as integers that ``codec`` holds; :class:`UnsupportedError` with the reasons otherwise."""
    refuse_unless_supported(codec, q)
    if not isinstance(q, QuantizedTensor):
        raise UnsupportedError(f"{codec.name} cannot hold {q.spec}", integers_only(q.spec, codec.name))
    return q


def weights_only(inputs: ActivationSpec, what: str) -> list[str]:
    """The reason of a format that has no place for quantized inputs."""
    return [f"{what} stores weights only, not inputs quantized as {inputs}: use --format compressed-tensors"]


def refuse_unless_supported(codec: Codec, q: WeightTensor) -> None:
    """Raise :class:`UnsupportedError` if ``codec`` cannot hold ``q``."""
    if reasons := codec.supports(q.spec, q.shape):
        raise UnsupportedError(f"{codec.name} cannot hold a {q.shape[0]}x{q.shape[1]} weight as {q.spec}", reasons)


def required(tensors: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor ``name``, of exactly ``shape``; :class:`CheckpointError` otherwise."""
    if name not in tensors:
        raise CheckpointError(f"tensor {name} is missing: the checkpoint is incomplete, fetch it again")
    found = tuple(tensors[name].shape)
    if found != shape:
        raise CheckpointError(f"tensor {name} has shape {found}, expected {shape}: config and weights disagree")
    return tensors[name]


def stored(tensors: Mapping[str, TensorHeader], name: str, rank: int) -> TensorHeader:
    """Header of tensor ``name`` with ``rank`` dimensions; :class:`CheckpointError` otherwise."""
    if name not in tensors:
        raise CheckpointError(f"tensor {name} is missing: the checkpoint is incomplete, fetch it again")
    if len(tensors[name].shape) != rank:
        raise CheckpointError(f"tensor {name} has shape {tuple(tensors[name].shape)}, expected {rank} dimensions")
    return tensors[name]


def integer(config: Mapping[str, Any], names: Sequence[str], default: int | None = None) -> int:
    """The first of ``names`` present in ``config``, as an int; :class:`CheckpointError` if absent or no integer."""
    for name in names:
        if config.get(name) is not None:
            value = config[name]
            if isinstance(value, bool) or not isinstance(value, int):
                raise CheckpointError(f"quantization_config: {name} must be an integer, not {value!r}")
            return value
    if default is None:
        raise CheckpointError(f"quantization_config: {names[0]} is missing")
    return default


def half_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """``model_dtype`` if it is a 16-bit float, else float16, which casts up to float32 exactly."""
    return model_dtype if model_dtype in (torch.float16, torch.bfloat16) else torch.float16


def _either(values: Sequence[int]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
