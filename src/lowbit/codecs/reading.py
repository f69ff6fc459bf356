"""Reading weights from a checkpoint without caring how they are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import torch

from lowbit.checkpoint import Checkpoint
from lowbit.codecs.awq import AwqCodec
from lowbit.codecs.bitsandbytes import BitsAndBytesCodec
from lowbit.codecs.codec import INPUT_SCALES, Codec, StoredGrid, StoredModule
from lowbit.codecs.compressed_tensors import CompressedTensorsCodec
from lowbit.codecs.fp8 import Fp8Codec
from lowbit.codecs.gguf.checkpoint import GgufCheckpoint
from lowbit.codecs.gptq import GptqCodec
from lowbit.codecs.hqq import HqqCodec
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats.ggml import BlockTensor
from lowbit.formats.weights import WeightTensor

__all__ = [
    "dense_names",
    "local_tensors",
    "module_plan",
    "read_dense",
    "read_dense_rows",
    "read_quantized",
    "read_weight",
    "stored_format",
]

READERS: Mapping[str, Codec] = {
    "gptq": GptqCodec(),
    "awq": AwqCodec(),
    "compressed-tensors": CompressedTensorsCodec(),
    "fp8": Fp8Codec(),
    "bitsandbytes": BitsAndBytesCodec(),
    "hqq": HqqCodec(),
}
"""Codec that reads each ``quant_method``."""

_OPTIONAL = frozenset(("qzeros", "g_idx", "weight_g_idx", "weight_shape", "weight_zero_point", *INPUT_SCALES))
_TELLTALES = (".qweight", ".weight_packed", ".weight_scale", ".SCB", ".absmax")


def module_plan(checkpoint: Checkpoint) -> dict[str, StoredModule]:
    """How each quantized module (``model.layers.0.mlp.up_proj``) is stored; empty for dense checkpoints.

    Raises :class:`UnsupportedError` for a format that cannot be read, :class:`CheckpointError` where the config and
    the tensors contradict each other.
    """
    if isinstance(checkpoint, GgufCheckpoint):
        return dict(checkpoint.modules)
    config = checkpoint.quantization_config
    if not config:
        if odd := next((name for name in checkpoint.tensors if name.endswith(_TELLTALES)), None):
            raise CheckpointError(
                f"{checkpoint.path}: tensor {odd} is quantized, but no quantization_config says how: "
                "restore it in config.json"
            )
        return {}
    reader = READERS.get(method := _method(config))
    if reader is None:
        raise UnsupportedError(
            f"{checkpoint.path}: quantization method {method!r} cannot be read",
            [f"lowbit reads {', '.join(READERS)} and dense checkpoints"],
        )
    try:
        found = reader.read_plan(config, checkpoint.tensors)
        plan: dict[str, StoredModule] = {module: _exact(checkpoint, module, entry) for module, entry in found.items()}
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    if not plan:
        raise CheckpointError(f"{checkpoint.path}: quantization_config says {method}, but no tensor is quantized")
    return plan


def stored_format(plan: Mapping[str, StoredModule]) -> str:
    """Name of the format that ``plan`` was read from, ``dense`` if nothing is quantized."""
    return next((entry.codec.name for entry in plan.values()), "dense")


def read_weight(
    checkpoint: Checkpoint, plan: Mapping[str, StoredModule], module: str
) -> WeightTensor | BlockTensor | torch.Tensor:
    """The weight of ``module``: as it was quantized, or the stored tensor ``module.weight`` if it is dense."""
    entry = plan.get(module)
    return checkpoint.read(f"{module}.weight") if entry is None else read_quantized(checkpoint, module, entry)


@overload
def read_quantized(checkpoint: Checkpoint, module: str, entry: StoredGrid) -> WeightTensor: ...


@overload
def read_quantized(checkpoint: Checkpoint, module: str, entry: StoredModule) -> WeightTensor | BlockTensor: ...


def read_quantized(checkpoint: Checkpoint, module: str, entry: StoredModule) -> WeightTensor | BlockTensor:
    """The weight of a quantized ``module``; :class:`CheckpointError` naming file and module if it cannot be decoded."""
    tensors = {local: checkpoint.read(name) for local, name in local_tensors(checkpoint, module, entry).items()}
    try:
        return entry.decode(tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {module}: {error}") from error


def read_dense(checkpoint: Checkpoint, plan: Mapping[str, StoredModule], name: str) -> torch.Tensor:
    """The tensor ``name``, whatever its storage: dequantized to float32 if it is a quantized module's ``weight``.

    Dense tensors come in their stored dtype.
    """
    module = name.removesuffix(".weight")
    if module == name or module not in plan:
        return checkpoint.read(name)
    return read_quantized(checkpoint, module, plan[module]).dequantize()


def read_dense_rows(
    checkpoint: Checkpoint, plan: Mapping[str, StoredModule], name: str, rows: torch.Tensor | Sequence[int]
) -> torch.Tensor:
    """Rows of the tensor ``name`` ``[n, ...]`` in the order asked, without reading the others; see :func:`read_dense`.

    Raises :class:`CheckpointError` for a row that does not exist.
    """
    module = name.removesuffix(".weight")
    if module == name or module not in plan:
        return checkpoint.read_rows(name, rows)
    entry = plan[module]
    if isinstance(entry, StoredGrid):
        return read_quantized(checkpoint, module, entry).dequantize()[torch.as_tensor(rows, dtype=torch.long)]
    return BlockTensor(entry.spec, checkpoint.read_rows(name, rows)).dequantize()


def dense_names(checkpoint: Checkpoint, plan: Mapping[str, StoredModule]) -> Iterator[str]:
    """Names that the tensors would have in a dense checkpoint, in stored order; each works in :func:`read_dense`."""
    hidden = {
        name: module for module, entry in plan.items() for name in local_tensors(checkpoint, module, entry).values()
    }
    seen: set[str] = set()
    for name in checkpoint.tensors:
        module = hidden.get(name)
        if module is None:
            yield name
        elif module not in seen:
            seen.add(module)
            yield f"{module}.weight"


def local_tensors(checkpoint: Checkpoint, module: str, entry: StoredModule) -> dict[str, str]:
    """Local name to full name of the stored tensors that make up the weight of a quantized ``module``."""
    names = {local: f"{module}.{local}" for local in sorted(entry.local_names() | _OPTIONAL)}
    return {local: name for local, name in names.items() if name in checkpoint.tensors}


def _method(config: Mapping[str, Any]) -> str:
    named = config.get("quant_method") or config.get("method")
    if named:
        return str(named).lower()
    # Files beside config.json written by AutoAWQ and AutoGPTQ leave the method out.
    if "config_groups" in config:
        return "compressed-tensors"
    return "awq" if "w_bit" in config or "zero_point" in config else "gptq" if "desc_act" in config else "unknown"


def _exact(checkpoint: Checkpoint, module: str, entry: StoredGrid) -> StoredGrid:
    """The entry with what small tensors say of it, where its headers leave the shape open."""
    if isinstance(entry.codec, BitsAndBytesCodec | HqqCodec):
        return _described(checkpoint, module, entry, entry.codec)
    name = f"{module}.weight_shape"
    if not isinstance(entry.codec, CompressedTensorsCodec) or entry.codec.storage != "pack-quantized":
        return entry
    if name not in checkpoint.tensors or entry.spec.group_size > 0:
        return entry
    shape = checkpoint.read(name).flatten().tolist()
    words = checkpoint.tensors[f"{module}.weight_packed"].shape[1]
    if len(shape) != 2 or shape[0] != entry.shape[0] or shape[1] <= 0:
        raise CheckpointError(f"tensor {name} says {shape}, which does not fit the stored weight")
    if words * 32 < shape[1] * entry.spec.bits:
        raise CheckpointError(f"tensor {name} says {shape}, more than {words} words a row hold")
    return entry._replace(shape=(int(shape[0]), int(shape[1])))


def _described(
    checkpoint: Checkpoint, module: str, entry: StoredGrid, codec: BitsAndBytesCodec | HqqCodec
) -> StoredGrid:
    names = {local: f"{module}.{local}" for local in codec.describing(entry.spec)}
    small = {local: checkpoint.read(name) for local, name in names.items() if name in checkpoint.tensors}
    try:
        return codec.described(entry, small)
    except CheckpointError as error:
        raise CheckpointError(f"{module}: {error}") from error
