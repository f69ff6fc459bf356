"""Linears that round their inputs as an engine does: what a simulation of quantized inputs runs."""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch import nn

from lowbit.checkpoint import Checkpoint
from lowbit.codecs import StoredGrid, StoredModule
from lowbit.codecs.codec import INPUT_SCALES
from lowbit.errors import CheckpointError
from lowbit.formats import ActivationSpec, fake_quantize
from lowbit.formats.activations import static_scale

__all__ = ["InputScales", "RoundingLinear", "prepare_linears", "stored_input_scale"]

_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


class RoundingLinear(nn.Linear):
    """A linear that can round its input; it does once :meth:`round_inputs` has said how.

    The rounding is read when the product is computed, so that it may be set while a forward is held up before it.
    """

    inputs: ActivationSpec | None = None
    input_scale: torch.Tensor | None = None
    divisor: torch.Tensor | None = None

    def round_inputs(
        self, inputs: ActivationSpec | None, scale: torch.Tensor | None = None, divisor: torch.Tensor | None = None
    ) -> None:
        """Round inputs as ``inputs`` from now on (None: leave them); ``scale`` float32 ``[1]`` is a calibrated one.

        ``divisor`` float32 ``[in]`` is what the input's producer will divide it by in the checkpoint, and does not yet.
        """
        self.inputs = inputs
        self.input_scale = scale
        self.divisor = divisor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[..., in]``, rounded, times the weight."""
        divisor = self.divisor
        if self.inputs is not None and divisor is None:
            x = fake_quantize(x, self.inputs, self.input_scale)
        elif self.inputs is not None and divisor is not None:
            rounded = fake_quantize(x.float() / divisor, self.inputs, self.input_scale)
            x = (rounded * divisor).to(x.dtype)
        return nn.functional.linear(x, self.weight, self.bias)


class InputScales:
    """Calibrated scales of the inputs of a block's linears, from the largest value that each has seen.

    The experts of a layer share theirs, as engines do: one that no token reached gets that of the others.
    """

    def __init__(self) -> None:
        self._largest: dict[str, float] = {}

    def note(self, name: str, largest: float) -> None:
        """The linear ``name`` has seen inputs up to ``largest`` in magnitude."""
        key = _EXPERT.sub(r"\1experts.*.", name)
        self._largest[key] = max(self._largest.get(key, 0.0), largest)

    def of(self, name: str, inputs: ActivationSpec | None) -> torch.Tensor | None:
        """Its :func:`static_scale`; None where ``inputs`` need none."""
        if inputs is None or not inputs.needs_calibration:
            return None
        return static_scale(self._largest.get(_EXPERT.sub(r"\1experts.*.", name), 0.0), inputs)


def prepare_linears(block: nn.Module) -> None:
    """Replace every plain linear of ``block`` by a :class:`RoundingLinear` with the same parameters."""
    for path, module in list(block.named_modules()):
        if type(module) is not nn.Linear:
            continue
        linear = RoundingLinear(module.in_features, module.out_features, module.bias is not None, device="meta")
        linear._parameters = dict(module._parameters)
        parent, _, last = path.rpartition(".")
        setattr(block.get_submodule(parent), last, linear.train(module.training))


def stored_input_scale(checkpoint: Checkpoint, module: str, entry: StoredModule) -> torch.Tensor | None:
    """The calibrated scale of the inputs of ``module``, float32 ``[1]``; None where they need none.

    Raises :class:`CheckpointError` when it is missing, or no positive number.
    """
    if not isinstance(entry, StoredGrid) or entry.inputs is None or not entry.inputs.needs_calibration:
        return None
    stored: Collection[str] = [f"{module}.{local}" for local in INPUT_SCALES]
    name = next((name for name in stored if name in checkpoint.tensors), None)
    if name is None:
        raise CheckpointError(f"{checkpoint.path}: {module} has no input scale, and its inputs are {entry.inputs}")
    scale = checkpoint.read(name).float().flatten()
    if scale.numel() != 1 or not bool(torch.isfinite(scale).all() & (scale > 0).all()):
        raise CheckpointError(f"{checkpoint.path}: tensor {name} must be one positive number")
    return scale
