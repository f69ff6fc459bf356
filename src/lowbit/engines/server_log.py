"""What llama.cpp writes to the error stream, caught where it explains a failure."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable

__all__ = ["errors_of"]

_ERROR = re.compile(r"^\S+ E (?:[^:]*: )?(?P<message>.+)$", re.MULTILINE)
_PATIENCE_SECONDS = 0.5
"""The log is written by a thread of its own, a little later."""


def errors_of(action: Callable[[], object]) -> str:
    """The first error that llama.cpp logs while ``action`` runs and fails, or an empty string.

    The file descriptor of the error stream is diverted meanwhile, for the whole process.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as log:
        kept = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            with contextlib.suppress(RuntimeError):
                action()
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while True:
                log.seek(0)
                match = _ERROR.search(log.read().decode("utf-8", errors="replace"))
                if match is not None or time.monotonic() > deadline:
                    break
                time.sleep(0.02)
        finally:
            os.dup2(kept, 2)
            os.close(kept)
    return "" if match is None else " ".join(match["message"].split())[:300]
