"""Where lowbit keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path

from lowbit.errors import UsageError

__all__ = ["cache_directory"]


def cache_directory() -> Path:
    """``LOWBIT_CACHE``, or ``lowbit`` in the user's cache directory: converted models, hashes, facts, logs.

    Raises :class:`UsageError` for a user without a home directory, as containers have them.
    """
    base = os.environ.get("LOWBIT_CACHE")
    if base:
        return Path(base)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit"
    except RuntimeError as error:
        raise UsageError("this user has no home directory: set LOWBIT_CACHE to a directory to write to") from error
