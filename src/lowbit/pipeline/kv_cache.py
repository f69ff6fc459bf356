"""What a key-value cache of few bits costs: attention with keys and values as an engine would read them back.

Keys are rounded after their rotary embedding and before attention, as they lie in a cache, for every model whose
attention goes through transformers' own interface. :func:`measure_cache` compares the outputs with the model's own.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from lowbit.checkpoint.layers import LayerState
from lowbit.errors import UnsupportedError
from lowbit.pipeline.kv_scales import intercepted_attention
from lowbit.pipeline.progress import Progress, Silent
from lowbit.pipeline.store import ActivationStore
from lowbit.pipeline.streamed import StreamedModel

__all__ = ["SIMULATED", "CacheFormat", "measure_cache", "simulated_cache"]

TOKENS_PER_PASS = 2048
"""Tokens that go through a block at a time."""
_TOKENS_COMPARED = 64
"""Positions whose logits are compared at a time."""
_ROTATED = 64
"""llama.cpp rotates the vectors of a quantized cache where their length is a multiple of this."""

Rounding: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class CacheFormat:
    """How an engine stores vectors ``[..., head_dim]``: ``key`` and ``value`` return what is read back."""

    name: str
    key: Rounding
    value: Rounding
    multiple: int = 1
    """What the length of a vector must be a multiple of."""


def _fp8(vectors: torch.Tensor) -> torch.Tensor:
    """E4M3 with a scale of 1, which is what vLLM takes where the checkpoint brings none; larger values saturate."""
    return vectors.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).to(vectors.dtype)


def _q8_0(vectors: torch.Tensor) -> torch.Tensor:
    """Blocks of 32: 8 bits and a float16 scale, the largest magnitude over 127."""
    blocks = _parts(vectors, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, 0.0).round()
    return (codes * scale.half().float()).reshape(vectors.shape).to(vectors.dtype)


def _q4_0(vectors: torch.Tensor) -> torch.Tensor:
    """Blocks of 32: codes -8 to 7 and a float16 scale such that the value of largest magnitude becomes -8."""
    blocks = _parts(vectors, 32)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    codes = torch.where(scale != 0, blocks / scale + 8.5, 8.0).trunc().clamp(max=15) - 8
    return (codes * scale.half().float()).reshape(vectors.shape).to(vectors.dtype)


def _parts(vectors: torch.Tensor, size: int) -> torch.Tensor:
    """float32 ``[..., dim / size, size]``."""
    return vectors.float().reshape(*vectors.shape[:-1], -1, size)


def _rotated(rounding: Rounding, *, whole: bool) -> Rounding:
    """llama.cpp's rotation around ``rounding`` (its pull request 21038): by Hadamard matrices of the largest power of
    two that divides a key's length (``whole``), of 64 for values. They are their own inverse."""

    def apply(vectors: torch.Tensor) -> torch.Tensor:
        length = vectors.shape[-1]
        if length % _ROTATED:
            return rounding(vectors)
        size = length & -length if whole else _ROTATED
        matrix = _hadamard(size, vectors.device)
        turned = (_parts(vectors, size) @ matrix).reshape(vectors.shape)
        return (_parts(rounding(turned), size) @ matrix).reshape(vectors.shape).to(vectors.dtype)

    return apply


def _hadamard(size: int, device: torch.device) -> torch.Tensor:
    """The symmetric orthonormal Hadamard matrix of Sylvester's construction, float32 ``[size, size]``."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix.div_(math.sqrt(size))


SIMULATED: Mapping[str, CacheFormat] = {
    entry.name: entry
    for entry in (
        CacheFormat("fp8", _fp8, _fp8),
        CacheFormat("q8_0", _rotated(_q8_0, whole=True), _rotated(_q8_0, whole=False), 32),
        CacheFormat("q4_0", _rotated(_q4_0, whole=True), _rotated(_q4_0, whole=False), 32),
    )
}
"""Formats by the name that :mod:`lowbit.planning.kv_dtypes` gives them."""


@contextmanager
def simulated_cache(format: CacheFormat) -> Iterator[list[int]]:
    """All attention of transformers' models sees keys and values as ``format`` gives them back.

    Yields a list whose one number counts the calls. Not for several threads at once.
    """
    calls = [0]

    def through_cache(_: nn.Module, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls[0] += 1
        return format.key(key), format.value(value)

    with intercepted_attention(through_cache):
        yield calls


@torch.no_grad()
def measure_cache(
    model: StreamedModel,
    ids: torch.Tensor,
    formats: Sequence[str],
    layers: Sequence[LayerState],
    *,
    progress: Progress | None = None,
) -> dict[str, float]:
    """KL divergence, in nats per token, that each of ``formats`` causes on token ids ``[n, length]``.

    One forward of the model and one more for each format, a block in memory at a time. ``layers`` is what each block
    keeps. A format whose blocks do not divide the vectors is left out. Raises :class:`UnsupportedError` where a cache
    cannot be simulated: latent attention keeps other vectors than attention is computed with.
    """
    progress = progress or Silent()
    attending = [layer for layer in layers if layer.attends]
    if any(layer.latent for layer in attending):
        raise UnsupportedError(f"{model.checkpoint.path}: the cache of latent attention (MLA) cannot be simulated")
    usable = [
        SIMULATED[name]
        for name in formats
        if all(dim % SIMULATED[name].multiple == 0 for layer in attending for dim in (layer.key_dim, layer.value_dim))
    ]
    samples, length = ids.shape
    batch = max(1, TOKENS_PER_PASS // length)
    progress.start("measuring the cache", len(model.block_names))
    with tempfile.TemporaryDirectory(prefix="lowbit-cache-") as scratch, ExitStack() as closing:
        stores = [
            ActivationStore(Path(scratch) / f"{name}.bin", samples, length, model.hidden_size, torch.float32)
            for name in ("original", *(entry.name for entry in usable))
        ]
        for store in stores:
            closing.callback(store.close)
        for first in range(0, samples, batch):
            embedded = model.embed(ids[first : first + batch])
            for store in stores:
                store.write(first, embedded)
        for index, name in enumerate(model.block_names):
            block = model.load_block(index)
            _through(model, block, index, stores[0], batch)
            for store, entry in zip(stores[1:], usable, strict=True):
                with simulated_cache(entry) as calls:
                    _through(model, block, index, store, batch)
                if not calls[0] and layers[index].attends:
                    raise UnsupportedError(
                        f"{model.checkpoint.path}: the cache of {model.config.model_type} cannot be simulated: its "
                        "attention does not go through transformers' interface"
                    )
            progress.advance(model.stored_name(name))
        found = _divergences(model, stores, batch)
    progress.close()
    return dict(zip((entry.name for entry in usable), found, strict=True))


def _through(model: StreamedModel, block: nn.Module, index: int, store: ActivationStore, batch: int) -> None:
    for first in range(0, store.shape[0], batch):
        store.write(first, model.run_block(block, index, store.read(first, batch)))


def _divergences(model: StreamedModel, stores: Sequence[ActivationStore], batch: int) -> list[float]:
    """Mean KL divergence of each store's outputs from those of the first."""
    samples, length, _ = stores[0].shape
    totals = [0.0] * (len(stores) - 1)
    for sample in range(samples):
        logits = [model.logits(store.read(sample, 1))[0] for store in stores]
        for first in range(0, length, _TOKENS_COMPARED):
            own, *others = (one[first : first + _TOKENS_COMPARED].double().log_softmax(-1) for one in logits)
            for place, other in enumerate(others):
                totals[place] += float((own.exp() * (own - other)).sum())
    return [total / (samples * length) for total in totals]
