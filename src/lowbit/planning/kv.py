"""Bytes that requests keep on a device while they generate: exact, and as each engine allocates them.

:func:`request_bytes` is arithmetic alone. vLLM allocates pages of a pool (:func:`vllm_pool`, after release 0.32),
llama.cpp a cache of fixed size per slot (:func:`llama_cpp_cache`, measured with its release of autumn 2026).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lowbit.checkpoint.layers import LayerState
from lowbit.planning.kv_dtypes import KvDtype

VLLM_BLOCK = 16
"""Tokens in a page of vLLM's cache on a GPU (128 in its CPU build)."""
LLAMA_CPP_PAD = 256
"""llama.cpp rounds the cells of a cache up to a multiple of this."""
STEPS_IN_FLIGHT = 2
"""Batches whose tokens vLLM may still hold outside a window: the one computed and the one scheduled meanwhile."""
_STATES_KEPT = 2
"""States of a recurrent block that a request holds with prefix caching, which is on by default."""


def token_bytes(layer: LayerState, dtype: KvDtype, devices: int = 1) -> int:
    """Bytes per token that one block keeps on one of ``devices`` tensor-parallel devices.

    Fewer key-value heads than devices are replicated; a latent vector is on every device.
    """
    if not layer.attends:
        return 0
    heads = 1 if layer.latent else max(1, layer.kv_heads // devices)
    return heads * (dtype.vector_bytes(layer.key_dim) + dtype.vector_bytes(layer.value_dim)) + layer.index_bytes


def constant_bytes(layer: LayerState, itemsize: int, devices: int = 1) -> int:
    """Bytes of a block's state that does not grow, at ``itemsize`` bytes a number (4 where the family wants it)."""
    wide = max(itemsize, 4) if layer.float32 else itemsize
    return -(-layer.conv // devices) * itemsize + -(-layer.recurrent // devices) * wide


def request_bytes(layers: Sequence[LayerState], context: int, dtype: KvDtype, devices: int = 1) -> int:
    """Bytes that one request of ``context`` tokens keeps on one device, nothing rounded up."""
    return sum(
        layer.tokens(context) * token_bytes(layer, dtype, devices) + constant_bytes(layer, 2, devices)
        for layer in layers
    )


@dataclass(frozen=True, slots=True)
class Group:
    """Blocks of a model that share one table of pages. ``kind`` decides how many pages a request holds."""

    kind: Literal["full", "sliding", "chunked", "state"]
    window: int = 0

    def pages(self, context: int, page_tokens: int, in_flight: int) -> int:
        """Pages that a request of ``context`` tokens holds at most."""
        if self.kind == "state":
            return _STATES_KEPT
        if self.kind == "full":
            return -(-context // page_tokens)
        tokens = min(self.window - (self.kind == "sliding") + in_flight, context)
        # A window need not start at the beginning of a page.
        return -(-tokens // page_tokens) + (self.kind == "sliding")


@dataclass(frozen=True, slots=True)
class VllmPool:
    """vLLM's pages: ``page_bytes`` each on one device, drawn by every group from one pool."""

    page_bytes: int
    page_tokens: tuple[int, ...]
    groups: tuple[Group, ...]
    in_flight: int

    def request_pages(self, context: int) -> int:
        """Pages that one request of ``context`` tokens holds at most."""
        pairs = zip(self.groups, self.page_tokens, strict=True)
        return sum(group.pages(context, tokens, self.in_flight) for group, tokens in pairs)

    def bytes(self, context: int, requests: int) -> int:
        """Bytes that ``requests`` of ``context`` tokens need, the pool's one spare page included."""
        return (self.request_pages(context) * requests + 1) * self.page_bytes if self.groups else 0


@dataclass(frozen=True, slots=True)
class _Spec:
    """One block's pages as vLLM sees them."""

    group: Group
    page_bytes: int
    page_tokens: int


def vllm_pool(
    layers: Sequence[LayerState], dtype: KvDtype, devices: int = 1, batch_tokens: int = 2048, block: int = VLLM_BLOCK
) -> VllmPool:
    """How vLLM divides the cache of a model into groups of pages, on one of ``devices``.

    Blocks of one kind are one group whose page spans all of them. A mixture is split into groups of equally many
    blocks, all pages made equally long; where a recurrent state is longer than a page, pages hold more tokens.
    """
    in_flight = STEPS_IN_FLIGHT * batch_tokens
    states = [constant_bytes(layer, 2, devices) for layer in layers if layer.is_constant]
    attending = [layer for layer in layers if layer.attends]
    tokens = block
    if states and attending:
        widest = max(token_bytes(layer, dtype, devices) for layer in attending)
        tokens = block * -(-max(states) // (block * widest))
    specs = [_attention_spec(layer, token_bytes(layer, dtype, devices) * tokens, tokens) for layer in attending]
    kinds = {spec.group for spec in specs}
    if not states and len(kinds) <= 1:
        total = sum(spec.page_bytes for spec in specs)
        return VllmPool(total, (tokens,) if specs else (), tuple(kinds), in_flight)
    page = max([spec.page_bytes for spec in specs] + states)
    specs = [_stretched(spec, page) for spec in specs] + [
        _Spec(Group("state"), page, tokens) for layer in layers if layer.is_constant
    ]
    counts = Counter(specs)
    fewest, most = min(counts.values()), max(counts.values())
    size = most if most < 1.5 * fewest else fewest
    chosen = [spec for spec, count in counts.items() for _ in range(-(-count // size))]
    return VllmPool(
        size * page, tuple(spec.page_tokens for spec in chosen), tuple(spec.group for spec in chosen), in_flight
    )


def _attention_spec(layer: LayerState, page_bytes: int, page_tokens: int) -> _Spec:
    kind: Literal["full", "sliding", "chunked"] = "full"
    if layer.window:
        kind = "chunked" if layer.chunked else "sliding"
    return _Spec(Group(kind, layer.window), page_bytes, page_tokens)


def _stretched(spec: _Spec, page_bytes: int) -> _Spec:
    """The spec with pages of ``page_bytes``: of more tokens where that divides, else padded."""
    factor, rest = divmod(page_bytes, spec.page_bytes)
    return replace(spec, page_bytes=page_bytes, page_tokens=spec.page_tokens * (1 if rest else factor))


@dataclass(frozen=True, slots=True)
class LlamaCppCache:
    """llama.cpp's caches: ``bytes`` in all, ``cells`` of one slot in the unlimited and in the sliding cache."""

    bytes: int
    cells: int
    sliding_cells: int


def llama_cpp_cache(
    layers: Sequence[LayerState], dtype: KvDtype, context: int, slots: int = 1, batch_tokens: int = 512
) -> LlamaCppCache:
    """What llama.cpp allocates for ``slots`` of ``context`` tokens each, computing ``batch_tokens`` at a time.

    A sliding cache holds the window and one batch, rounded up; a recurrent state is float32, one per slot.
    """
    cells = _padded(context)
    windows = {layer.window for layer in layers if layer.window}
    sliding = _padded(min(cells, max(windows) + batch_tokens)) if windows else 0
    total = 0
    for layer in layers:
        total += slots * (sliding if layer.window else cells) * token_bytes(layer, dtype)
        total += slots * 4 * (layer.conv + layer.recurrent)
    return LlamaCppCache(total, cells, sliding)


def _padded(tokens: int) -> int:
    return -(-tokens // LLAMA_CPP_PAD) * LLAMA_CPP_PAD
