"""The order of a matrix' rows in GGUF where it differs from the one in Hugging Face's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lowbit.errors import CheckpointError

__all__ = ["Heads", "RowOrder", "inverse", "row_order"]

RowOrder: TypeAlias = npt.NDArray[np.int64]
"""GGUF row ``i`` is row ``order[i]`` of the checkpoint's matrix."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What a row order depends on: numbers of heads, features of one; for encoders the rows of the position table.

    ``first_position`` is the first of ``positions`` that is used.
    """

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


_ORDERS: Mapping[str, tuple[Callable[[Heads], int], Callable[[Heads], RowOrder]]] = MappingProxyType(
    {
        "rope_q": (lambda heads: heads.queries * heads.size, lambda heads: _rope(heads.queries, heads.size)),
        "rope_k": (lambda heads: heads.keys * heads.size, lambda heads: _rope(heads.keys, heads.size)),
        "interleaved_qkv": (
            lambda heads: 3 * heads.queries * heads.size,
            lambda heads: _interleaved(heads.queries, heads.size),
        ),
        "after_padding": (
            lambda heads: heads.positions,
            lambda heads: np.arange(heads.first_position, heads.positions, dtype=np.int64),
        ),
    }
)
"""How many rows the checkpoint's matrix has, and their order in GGUF."""


def row_order(kind: str, heads: Heads, rows: int, name: str) -> RowOrder:
    """The order ``kind`` of the checkpoint's matrix ``name`` with ``rows`` rows.

    Raises :class:`CheckpointError` if the heads make up another number of rows.
    """
    expected, order = _ORDERS[kind]
    if expected(heads) != rows or heads.size % 2:
        raise CheckpointError(f"tensor {name} has {rows} rows, its heads make up {expected(heads)}")
    return order(heads)


def inverse(order: RowOrder, rows: int) -> RowOrder:
    """For each of the checkpoint's ``rows`` the GGUF row that it is, -1 where there is none."""
    found = np.full(rows, -1, np.int64)
    found[order] = np.arange(len(order), dtype=np.int64)
    return found
