"""Whether the packages of an extra are here, asked before anything that would fail without them."""

from __future__ import annotations

import importlib.util

from lowbit.errors import UnsupportedError

__all__ = ["require_serve_extra"]

_SERVE = ("aiohttp", "prometheus_client", "pydantic")


def require_serve_extra(verb: str) -> None:
    """Raise :class:`UnsupportedError` naming what ``lowbit VERB`` needs of ``lowbit[serve]`` and is not here."""
    missing = [name for name in _SERVE if importlib.util.find_spec(name) is None]
    if missing:
        raise UnsupportedError(f"lowbit {verb} needs {', '.join(missing)}", ["pip install 'lowbit[serve]'"])
