"""Runs a compiled loop over rows, or whole jobs, on as many threads as torch uses.

Plain threads around loops that release the interpreter's lock: numba's own pool would spin beside torch's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

__all__ = ["over_rows", "workers"]

_this_thread = threading.local()


def workers() -> ThreadPoolExecutor:
    """A pool for jobs that are many and independent: one thread each, also for the loops in them."""
    return ThreadPoolExecutor(torch.get_num_threads(), "lowbit-worker", initializer=_work_alone)


def _work_alone() -> None:
    _this_thread.alone = True


def over_rows(rows: int, tile: int, loop: Callable[[int, int], None]) -> None:
    """Call ``loop(begin, end)`` for parts of ``range(rows)`` that start at multiples of ``tile``, in parallel.

    In a thread of :func:`workers`, whose neighbours have the other cores, it is called once.
    """
    threads = 1 if hasattr(_this_thread, "alone") else torch.get_num_threads()
    share = max(1, -(-rows // (tile * threads))) * tile
    parts = [(begin, min(begin + share, rows)) for begin in range(0, rows, share)]
    waiting = [_pool(threads).submit(loop, *part) for part in parts[1:]]
    for part in parts[:1]:
        loop(*part)
    for future in waiting:
        future.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lowbit-kernel")


if hasattr(os, "register_at_fork"):
    # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
