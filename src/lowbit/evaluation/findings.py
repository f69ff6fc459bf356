"""What a look at a checkpoint can find wrong with it, and the checks that inspect and verify share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from lowbit.checkpoint import Checkpoint, TensorInfo
from lowbit.codecs import StoredModule
from lowbit.codecs.reading import local_tensors

Severity = Literal["error", "warning", "note"]

IMPLAUSIBLE = 1e5
"""Weights of trained models stay far below this magnitude; one above it is a flipped exponent bit or an overflow."""
_ROWS_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One remark: ``error`` (the checkpoint is wrong), ``warning`` (it may not do what one wants) or ``note``.

    ``where`` names a file, tensor or module.
    """

    severity: Severity
    where: str
    message: str


def scale_names(checkpoint: Checkpoint, plan: Mapping[str, StoredModule]) -> list[str]:
    """Stored names of the scales of all quantized modules."""
    return [
        name
        for module, entry in plan.items()
        for local, name in local_tensors(checkpoint, module, entry).items()
        if local in ("scales", "weight_scale")
    ]


def value_findings(checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[Finding]:
    """Values of floating-point tensors that are not finite (errors) or implausibly large (warnings)."""
    for name in names:
        bad, largest = 0, 0.0
        for rows in _pieces(checkpoint, checkpoint.tensors[name]):
            magnitudes = rows.float().abs()
            finite = torch.isfinite(magnitudes)
            bad += int((~finite).sum())
            largest = max(largest, float(torch.where(finite, magnitudes, 0).max()))
        if bad:
            yield Finding("error", name, f"{bad} values are NaN or infinite: fetch or quantize the checkpoint again")
        elif largest > IMPLAUSIBLE:
            yield Finding("warning", name, f"holds a value of magnitude {largest:.2g}, implausible for a weight")


def _pieces(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[torch.Tensor]:
    """A tensor in pieces of whole rows, some 64 MiB each."""
    if not info.dtype.is_floating_point or not info.nbytes:
        return
    if info.nbytes <= _ROWS_BYTES or len(info.shape) < 2:
        yield checkpoint.read(info.name)
        return
    step = max(1, _ROWS_BYTES * info.shape[0] // info.nbytes)
    for first in range(0, info.shape[0], step):
        yield checkpoint.read_rows(info.name, list(range(first, min(first + step, info.shape[0]))))
