"""Scores of models that are never in memory whole: hidden states go block by block through a store on disk.

What is held: one block, a batch of windows, one output head per model, and the logits of a chunk of tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from lowbit.evaluation.metrics import Prediction, TokenScores, Windows
from lowbit.pipeline.progress import Progress
from lowbit.pipeline.store import ActivationStore

WORKSPACE = 512 << 20
"""Bytes for the intermediate values of a batch or a chunk of logits, unless the caller has less to give."""
_FLOATS_PER_LOGIT = 8  # logits, log-probabilities and temporaries of two models
_FLOATS_PER_STATE = 32  # a block's intermediate values per hidden value, feed-forward included


class Streamable(Protocol):
    """What is needed of a model: :class:`lowbit.pipeline.streamed.StreamedModel` has it."""

    @property
    def block_names(self) -> Sequence[str]:
        """Names of the blocks, first to last."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of computation."""
        ...

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """First hidden states ``[batch, length, hidden]`` of ``ids`` ``[batch, length]``."""
        ...

    def load_block(self, index: int) -> Any:
        """The weights of a block."""
        ...

    def run_block(self, block: Any, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after a block."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits ``[batch, length, vocabulary]`` of the last hidden states."""
        ...


def final_hidden(
    model: Streamable, windows: Windows, path: Path, name: str, progress: Progress, *, workspace: int = WORKSPACE
) -> ActivationStore:
    """Run all ``windows`` through the blocks of ``model``; the last hidden states are in the store at ``path``."""
    count, length = windows.ids.shape
    batch = max(1, min(count, workspace // (4 * _FLOATS_PER_STATE * model.hidden_size * length)))
    store = ActivationStore(path, count, length, model.hidden_size, model.dtype)
    for first in range(0, count, batch):
        store.write(first, model.embed(windows.ids[first : first + batch]))
    for index, block_name in enumerate(model.block_names):
        begun = time.perf_counter()
        block = model.load_block(index)
        for first in range(0, count, batch):
            store.write(first, model.run_block(block, index, store.read(first, batch)))
        del block
        rate = windows.ids.numel() / max(time.perf_counter() - begun, 1e-9)
        progress.advance(f"{name} {block_name}", tokens_per_second=rate)
    return store


def score(
    models: Sequence[tuple[str, Streamable, ActivationStore]], windows: Windows, *, workspace: int = WORKSPACE
) -> list[TokenScores]:
    """Scores of one model, or of a reference and a candidate: the first is what the others' divergence is from.

    ``models`` are a name for errors, the model, and its last hidden states. Logits exist for a chunk of tokens at a
    time. Raises :class:`NumericsError` naming the model whose logits are not finite.
    """
    scores = [TokenScores(windows, divergence=index > 0) for index in range(len(models))]
    probe = models[0][1].logits(models[0][2].read(0, 1)[:, :1])
    chunk = max(1, workspace // (4 * _FLOATS_PER_LOGIT * probe.shape[-1]))
    for window, positions in _chunks(windows, chunk):
        reference: Prediction | None = None
        for (name, model, store), collected in zip(models, scores, strict=True):
            states = store.read(window, 1)[:, positions - 1]
            prediction = Prediction.of(model.logits(states)[0], name)
            collected.add(prediction, reference)
            reference = reference or prediction
    return scores


def _chunks(windows: Windows, size: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Windows and the positions scored in them, at most ``size`` positions at a time."""
    for window, counted in enumerate(windows.counted):
        for positions in counted.nonzero()[:, 0].split(size):
            if len(positions):
                yield window, positions
