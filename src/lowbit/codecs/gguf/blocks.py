"""The codec of weights in a GGUF file: one tensor of blocks per module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lowbit.errors import CheckpointError
from lowbit.formats.ggml import BlockTensor, GgmlType

__all__ = ["GgufCodec"]


@dataclass(frozen=True, slots=True)
class GgufCodec:
    """``weight`` as uint8 ``[out_features, row_bytes]``, the bytes of the file."""

    @property
    def name(self) -> str:
        """``gguf``."""
        return "gguf"

    def local_names(self, spec: GgmlType) -> frozenset[str]:
        """``weight`` alone."""
        return frozenset(("weight",))

    def decode(self, tensors: Mapping[str, torch.Tensor], spec: GgmlType, shape: tuple[int, int]) -> BlockTensor:
        """The blocks as a matrix; :class:`CheckpointError` where they don't make up ``shape``."""
        blocks = tensors.get("weight")
        if blocks is None:
            raise CheckpointError("tensor weight is missing: the file is incomplete, fetch it again")
        if tuple(blocks.shape) != (shape[0], spec.row_bytes(shape[1])):
            raise CheckpointError(f"blocks of shape {tuple(blocks.shape)} are no {shape} weight in {spec}")
        return BlockTensor(spec, blocks)
