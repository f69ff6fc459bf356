"""Where lowbit keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_directory"]


def cache_directory() -> Path:
    """``LOWBIT_CACHE``, or ``lowbit`` in the user's cache directory: converted models, hashes, facts, logs."""
    base = os.environ.get("LOWBIT_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit"
