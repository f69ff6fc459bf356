"""A GPU, whoever tells of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """A CUDA device; ``capability`` such as ``(9, 0)``; bytes of memory in all and free."""

    name: str
    capability: tuple[int, int]
    memory: int
    free: int
