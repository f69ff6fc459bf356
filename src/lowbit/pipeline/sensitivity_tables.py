"""How much the precision of embedding and output head matters: what stands outside the blocks.

The head's divergence is computed as it is, from the logits with its own weights and with a candidate's. The embedding's
is the quadratic form of :mod:`lowbit.pipeline.sensitivity`, ``E[(g . d)^2] / 2``, with ``d`` the change of the first
block's input and ``g`` the gradient there. Of a tied table both are added.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lowbit.codecs import read_dense_rows
from lowbit.pipeline.choices import Candidate, GroupSensitivity, Measured, OneInput, Table
from lowbit.pipeline.store import ActivationStore
from lowbit.pipeline.streamed import HEAD_ROWS, StreamedModel

__all__ = ["measure_table"]

HEAD_TOKENS = 4096
"""Tokens, at most, on which heads are compared: the divergence of each is exact, so few suffice."""
_BATCH = 2048
"""Tokens that are embedded at a time."""


@torch.no_grad()
def measure_table(
    model: StreamedModel,
    table: Table,
    ids: torch.Tensor,
    stores: tuple[ActivationStore, ActivationStore, ActivationStore],
    candidates: Sequence[Candidate],
) -> GroupSensitivity:
    """Measure every candidate in ``table``, on token ids ``[n, length]``.

    ``stores`` hold the first block's input, the last one's output, and the gradient at the first block's input.
    """
    rows, columns = table.shape
    ids_read = torch.arange(rows) if table.head else torch.unique(ids)
    embedded: dict[str, tuple[float, float, float]] = {}
    measured: dict[str, Measured] = {}
    for candidate in candidates:
        size = candidate.size(rows, columns)
        if size is None:
            continue
        if candidate.exact:
            measured[candidate.name] = Measured(size, 0.0, 0.0)
            continue
        weight = _quantized(model, table, ids_read, candidate)
        divergence, error = _as_head(model, weight, stores[1]) if table.head else (0.0, 0.0)
        if table.embeds:
            with model.with_embedding(ids_read, weight):
                *sums, error_embedded = _as_embedding(model, ids, stores[0], stores[2])
            embedded[candidate.name] = (sums[0], sums[1], divergence)
            error = error if table.head else error_embedded
        measured[candidate.name] = Measured(size, divergence, error)
    ratios = [by_sequence / by_token for by_token, by_sequence, _ in embedded.values() if by_token > 0]
    scale = sum(ratios) / len(ratios) if ratios else 1.0
    for name, (by_token, _, divergence) in embedded.items():
        one = measured[name]
        measured[name] = Measured(one.bytes, divergence + scale * by_token / ids.numel(), one.error)
    return GroupSensitivity((table.name,), rows * columns, measured)


def _quantized(model: StreamedModel, table: Table, ids: torch.Tensor, candidate: Candidate) -> torch.Tensor:
    """The rows ``ids`` of the table as the candidate restores them, float32; rows are quantized one by one."""
    restored = torch.empty(len(ids), table.shape[1])
    for first in range(0, len(ids), HEAD_ROWS):
        part = slice(first, first + HEAD_ROWS)
        weight = read_dense_rows(model.checkpoint, model.plan, f"{table.name}.weight", ids[part]).float()
        restored[part] = candidate.solve(OneInput({table.name: weight}))[table.name].dequantize()
    return restored


def _as_head(model: StreamedModel, weight: torch.Tensor, last: ActivationStore) -> tuple[float, float]:
    """Divergence in nats per token of a head of ``weight``, and the squared error of its logits as a share of them."""
    samples, length, _ = last.shape
    samples = max(1, min(samples, HEAD_TOKENS // length))
    divergence = error = signal = 0.0
    for sample in range(samples):
        hidden = last.read(sample, 1)
        own = model.logits(hidden)[0].float()
        with model.with_head(weight):
            other = model.logits(hidden)[0].float()
        error += float((other - own).square().sum(dtype=torch.float64))
        signal += float(own.square().sum(dtype=torch.float64))
        own, other = own.log_softmax(-1), other.log_softmax(-1)
        # The rounding of float32 can leave a sum that should be next to nothing below it.
        divergence += max(0.0, float((own.exp() * (own - other)).sum(dtype=torch.float64)))
    return divergence / (samples * length), error / signal if signal else 0.0


def _as_embedding(
    model: StreamedModel, ids: torch.Tensor, first_input: ActivationStore, gradients: ActivationStore
) -> tuple[float, float, float]:
    """Sums of ``(g . d)^2 / 2`` by tokens and by sequences, and the squared error as a share of the input."""
    by_token = by_sequence = error = signal = 0.0
    batch = max(1, _BATCH // ids.shape[1])
    for first in range(0, len(ids), batch):
        own, gradient = first_input.read(first, batch), gradients.read(first, batch)
        change = model.embed(ids[first : first + batch]).to(own) - own
        products = (change * gradient).sum(-1).double()
        by_token += 0.5 * float(products.square().sum())
        by_sequence += 0.5 * float(products.sum(1).square().sum())
        error += float(change.square().sum(dtype=torch.float64))
        signal += float(own.square().sum(dtype=torch.float64))
    return by_token, by_sequence, error / signal if signal else 0.0
