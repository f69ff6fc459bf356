"""The order of a matrix' rows in GGUF where it differs from the one in Hugging Face's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

__all__ = ["ORDERS", "Heads", "inverse"]

RowOrder = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Heads:
    """What a row order depends on; ``positions`` and ``first_position`` matter to encoders alone."""

    queries: int
    keys: int
    size: int
    positions: int = 0
    first_position: int = 0


def _rope(heads: int, size: int) -> RowOrder:
    """llama.cpp rotates neighbours where transformers rotates halves: row ``(head, pair, half)`` of GGUF."""
    return np.arange(heads * size, dtype=np.int64).reshape(heads, 2, size // 2).swapaxes(1, 2).reshape(-1)


def _interleaved(heads: int, size: int) -> RowOrder:
    """All queries, all keys, all values, where the checkpoint has the three of a head together."""
    return np.arange(3 * heads * size, dtype=np.int64).reshape(heads, 3, size).swapaxes(0, 1).reshape(-1)


ORDERS: Mapping[str, Callable[[Heads], RowOrder]] = MappingProxyType(
    {
        "rope_q": lambda heads: _rope(heads.queries, heads.size),
        "rope_k": lambda heads: _rope(heads.keys, heads.size),
        "interleaved_qkv": lambda heads: _interleaved(heads.queries, heads.size),
        "after_padding": lambda heads: np.arange(heads.first_position, heads.positions, dtype=np.int64),
    }
)
"""GGUF row ``i`` is row ``order[i]`` of the checkpoint's matrix."""


def inverse(order: RowOrder, rows: int) -> RowOrder:
    """For each of the checkpoint's ``rows`` the GGUF row that it is, -1 where there is none."""
    found = np.full(rows, -1, np.int64)
    found[order] = np.arange(len(order), dtype=np.int64)
    return found
