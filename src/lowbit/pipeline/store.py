"""Hidden states between two blocks, kept in a file: the page cache is the memory, the disk the overflow.

Plain positioned reads and writes keep the process's own memory at one batch, whatever the number of samples, and
make the state at a block boundary survive a kill.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from lowbit.errors import ResourceError

_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.uint16}


class ActivationStore:
    """A file of hidden states ``[samples, seq_len, hidden]``; rows are read and written by sample range.

    Raises :class:`ResourceError` when the disk is full.
    """

    def __init__(self, path: Path, samples: int, seq_len: int, hidden: int, dtype: torch.dtype) -> None:
        self.path = path
        self.shape = (samples, seq_len, hidden)
        self.dtype = dtype
        self._sample_bytes = seq_len * hidden * dtype.itemsize
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)

    @property
    def nbytes(self) -> int:
        """Size of the whole store in bytes."""
        return self.shape[0] * self._sample_bytes

    def write(self, first: int, states: torch.Tensor) -> None:
        """Write ``states`` ``[n, seq_len, hidden]`` as samples ``first .. first + n - 1``."""
        states = states.detach().to("cpu", self.dtype).contiguous()
        raw = states.view(torch.uint16).numpy() if self.dtype is torch.bfloat16 else states.numpy()
        view = memoryview(raw.data).cast("B")
        offset = first * self._sample_bytes
        try:
            while view:
                done = os.pwrite(self._fd, view, offset)
                view, offset = view[done:], offset + done
        except OSError as error:
            raise ResourceError(
                f"{self.path}: cannot store activations ({error.strerror}); {self.nbytes / 2**30:.2f} GiB are needed: "
                "free disk space and run again with --resume, or use fewer --samples"
            ) from error

    def read(self, first: int, count: int) -> torch.Tensor:
        """Samples ``first .. first + count - 1`` as ``[count, seq_len, hidden]`` in the store's dtype."""
        count = min(count, self.shape[0] - first)
        buffer = np.empty((count, *self.shape[1:]), dtype=_NUMPY[self.dtype])
        view = memoryview(buffer.data).cast("B")
        offset = first * self._sample_bytes
        while view:
            done = os.preadv(self._fd, [view], offset)
            if not done:
                raise ResourceError(f"{self.path}: activations end early: delete the partial directory and start again")
            view, offset = view[done:], offset + done
        states = torch.from_numpy(buffer)
        return states.view(torch.bfloat16) if self.dtype is torch.bfloat16 else states

    def sync(self) -> None:
        """Push everything written to the disk."""
        os.fsync(self._fd)

    def close(self, *, delete: bool = False) -> None:
        """Close the file, and delete it if asked."""
        os.close(self._fd)
        if delete:
            self.path.unlink(missing_ok=True)
