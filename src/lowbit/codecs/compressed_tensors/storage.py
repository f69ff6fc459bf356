"""What a way to store weights in a compressed-tensors checkpoint has to offer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.errors import CheckpointError
from lowbit.formats.floating import FloatSpec
from lowbit.formats.spec import PER_TENSOR, IntSpec

__all__ = ["Storage", "file_scales", "read_scales"]


@dataclass(frozen=True, slots=True)
class Storage:
    """One ``format`` of compressed-tensors, as functions on the local tensors of a module.

    ``names``    ``(spec) -> `` names of the tensors that a weight consists of
    ``encode``   ``(weight) -> tensors``
    ``decode``   ``(tensors, spec, shape) -> weight``; :class:`CheckpointError` for what cannot be
    """

    format: str
    names: Callable[[Any], tuple[str, ...]]
    encode: Callable[[Any], dict[str, torch.Tensor]]
    decode: Callable[[Mapping[str, torch.Tensor], Any, tuple[int, int]], Any]


def file_scales(scales: torch.Tensor, spec: IntSpec | FloatSpec) -> torch.Tensor:
    """Scales in the shape that files have: ``[1]`` for one of the whole matrix."""
    return scales.flatten() if spec.group_size == PER_TENSOR else scales.contiguous()


def read_scales(
    tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], name: str = "weight_scale"
) -> torch.Tensor:
    """The scales ``name`` of a module, as ``shape``."""
    if name not in tensors:
        raise CheckpointError(f"tensor {name} is missing: the checkpoint is incomplete, fetch it again")
    scales = tensors[name]
    if scales.numel() != shape[0] * shape[1]:
        raise CheckpointError(f"tensor {name} has shape {tuple(scales.shape)}, expected {shape}")
    return scales.reshape(shape)
