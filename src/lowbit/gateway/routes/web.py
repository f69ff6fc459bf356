"""The web page: four files of the package, no build, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from aiohttp import web

__all__ = ["PATHS", "ROUTES"]

_FILES = {
    "/": ("index.html", "text/html"),
    "/style.css": ("style.css", "text/css"),
    "/app.js": ("app.js", "text/javascript"),
    "/markdown.js": ("markdown.js", "text/javascript"),
    "/status.js": ("status.js", "text/javascript"),
}

PATHS = frozenset(_FILES)
"""Paths for which a browser may ask its user for the key."""

_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@cache
def _content(name: str) -> bytes:
    return files("lowbit.gateway").joinpath("web", name).read_bytes()


async def page(request: web.Request) -> web.Response:
    """A file of the web page."""
    name, kind = _FILES[request.path]
    return web.Response(body=_content(name), headers={**_HEADERS, "Content-Type": f"{kind}; charset=utf-8"})


ROUTES: Mapping[tuple[str, str], Any] = {("GET", path): page for path in _FILES}
