"""Lets numba's loops use as many threads as torch does, one caller at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numba
import torch

__all__ = ["numba_threads"]

# numba's portable threading layer aborts the process when two threads enter parallel loops at once
_ONE_AT_A_TIME = threading.Lock()


@contextmanager
def numba_threads() -> Iterator[None]:
    """Hold numba to ``torch.get_num_threads()`` threads inside the ``with`` block."""
    with _ONE_AT_A_TIME:
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        yield
