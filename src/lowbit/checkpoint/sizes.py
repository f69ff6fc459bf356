"""The bytes of a checkpoint's weight files before any of them is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from lowbit.checkpoint.safetensors import layout
from lowbit.checkpoint.writer import SHARD_BYTES

__all__ = ["weight_file_sizes"]

Headers = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensor name to dtype and shape."""


def weight_file_sizes(parts: Iterable[Headers], max_shard_bytes: int = SHARD_BYTES) -> dict[str, int]:
    """File name to bytes of the weights that :class:`PartialCheckpoint` would write from ``parts``, in their order.

    The rule is the writer's: tensors in the order of the parts, then of their names; a new shard where the next tensor
    would not fit; headers as :func:`lowbit.checkpoint.safetensors.layout` lays them out.
    """
    shards: list[dict[str, tuple[torch.dtype, Sequence[int]]]] = [{}]
    filled = 0
    for part in parts:
        for name in sorted(part):
            size = _bytes(*part[name])
            if shards[-1] and filled + size > max_shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = part[name]
            filled += size
    sizes = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        sizes[name] = len(layout(shard, None)[0]) + sum(_bytes(*header) for header in shard.values())
    return sizes


def _bytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    return size
