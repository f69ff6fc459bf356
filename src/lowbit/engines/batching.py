"""Dynamic batching: what waits when the model is free goes through it together, texts of like length side by side."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

__all__ = ["Batcher", "next_batch"]

Item = TypeVar("Item")


def next_batch(lengths: Sequence[int], max_items: int, max_tokens: int) -> list[int]:
    """Indexes of the next batch: the oldest item and those nearest to it in length, while the padded batch stays
    within ``max_items`` and ``max_tokens`` (an item longer than that goes alone).
    """
    first = lengths[0]
    order = sorted(range(len(lengths)), key=lambda index: (index != 0, abs(lengths[index] - first), index))
    chosen: list[int] = []
    longest = 0
    for index in order:
        widest = max(longest, lengths[index])
        if chosen and (len(chosen) >= max_items or widest * (len(chosen) + 1) > max_tokens):
            break
        chosen.append(index)
        longest = widest
    return chosen


class Batcher(Generic[Item]):
    """Feeds ``run`` (called in one thread of its own) with batches of what :meth:`submit` was given.

    ``length`` tells an item's tokens. An item whose caller is gone is dropped before it costs anything.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Iterable[Any]],
        length: Callable[[Item], int],
        max_items: int = 64,
        max_tokens: int = 16384,
    ) -> None:
        self._run, self._length = run, length
        self._max_items, self._max_tokens = max_items, max_tokens
        self._waiting: list[tuple[Item, asyncio.Future[Any]]] = []
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._task: asyncio.Task[None] | None = None
        self.batches = 0
        self.items = 0

    @property
    def waiting(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    async def submit(self, items: Sequence[Item]) -> list[Any]:
        """The results of ``items``, in order."""
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        self._waiting += zip(items, futures, strict=True)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        try:
            return list(await asyncio.gather(*futures))
        finally:
            for future in futures:
                future.cancel()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._waiting = [pair for pair in self._waiting if not pair[1].done()]
            if not self._waiting:
                return
            lengths = [self._length(item) for item, _ in self._waiting]
            chosen = next_batch(lengths, self._max_items, self._max_tokens)
            batch = [self._waiting[index] for index in chosen]
            taken = set(chosen)
            self._waiting = [pair for index, pair in enumerate(self._waiting) if index not in taken]
            try:
                results = await loop.run_in_executor(self._thread, self._run, [item for item, _ in batch])
            except (RuntimeError, MemoryError, ValueError, IndexError) as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(RuntimeError(f"the model failed: {error}"))
                continue
            self.batches += 1
            self.items += len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)
