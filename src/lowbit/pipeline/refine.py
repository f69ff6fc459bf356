"""Tuning a solved block as a whole against the float block's outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lowbit.errors import NumericsError
from lowbit.formats import QuantizedTensor
from lowbit.pipeline.inputs import RoundingLinear
from lowbit.quant.autoround import AutoRoundOptions, Pair, Rounding, tune

__all__ = ["Learnable", "refine"]

Load = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Learnable:
    """A solved linear of a block: float32 ``weight`` ``[out, in]`` that it was solved from, and the result.

    The block's weight is the result divided by ``columns``, a transform's scales.
    """

    linear: nn.Linear
    weight: torch.Tensor
    solved: QuantizedTensor
    columns: torch.Tensor | None = None


def refine(
    learnables: Mapping[str, Learnable],
    block: nn.Module,
    forward: Callable[[torch.Tensor], torch.Tensor],
    pairs: Sequence[tuple[Load, Load]],
    options: AutoRoundOptions,
) -> dict[str, QuantizedTensor]:
    """The tuned tensors of ``learnables``, whose linears get the weights they stand for.

    Each of ``pairs`` reads a batch of inputs of the block and the outputs that are wanted of it, ``forward`` runs it.
    Inputs that an engine would round are left alone meanwhile. Raises :class:`NumericsError` for an output that is not
    finite.
    """
    batches: list[Pair] = [lambda load=load, wanted=wanted: (load(), wanted()) for load, wanted in pairs]  # type: ignore[misc]
    roundings = [Rounding(entry.linear, entry.weight, entry.solved, entry.columns) for entry in learnables.values()]
    with _float_inputs(block):
        tuned = tune(roundings, forward, batches, options)
    for name, entry, tensor in zip(learnables, learnables.values(), tuned.tensors, strict=True):
        weight = tensor.dequantize()
        if not bool(torch.isfinite(weight).all()):
            raise NumericsError(f"{name}: the tuned weight is not finite: use another method for it")
        divided = weight if entry.columns is None else weight / entry.columns
        entry.linear.weight.data = divided.to(entry.linear.weight.dtype)
    return dict(zip(learnables, tuned.tensors, strict=True))


@contextmanager
def _float_inputs(block: nn.Module) -> Iterator[None]:
    rounding = [(module, module.inputs) for module in block.modules() if isinstance(module, RoundingLinear)]
    for module, _ in rounding:
        module.inputs = None
    try:
        yield
    finally:
        for module, inputs in rounding:
            module.inputs = inputs
