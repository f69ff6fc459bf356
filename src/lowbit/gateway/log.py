"""Structured logs: one JSON object a line, with the request's id; never a prompt, an answer or a key.

Requests and events go past the logging module, whose records cost more than the routing of a request: their lines are
gathered and written together, a tenth of a second later at most, at once where they warn.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from functools import lru_cache
from typing import Any, TextIO

from pydantic_core import PydanticSerializationError, to_json

__all__ = ["LOGGER", "JsonLines", "log_event", "log_to"]

LOGGER = logging.getLogger("lowbit.gateway")

_DELAY = 0.1
_GATHERED = 256
"""Lines that are written at once, however soon after each other they came."""


class JsonLines(logging.StreamHandler[TextIO]):
    """Writes ``{"time", "level", "event", …}``: events of :func:`log_event`, and records of the logging module."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lines: list[str] = []
        self._due: asyncio.TimerHandle | None = None

    def event(self, name: str, level: int, fields: dict[str, Any]) -> None:
        """Take a line down; it is written soon."""
        now = time.time()
        head = {"time": _moment(now), "level": _LEVELS.get(level, "info"), "event": name}
        self._lines.append(_line(head | fields))
        if level >= logging.WARNING or len(self._lines) >= _GATHERED:
            self.flush()
        elif self._due is None:
            try:
                self._due = asyncio.get_running_loop().call_later(_DELAY, self.flush)
            except RuntimeError:  # nobody would come back to it
                self.flush()

    def flush(self) -> None:
        """Write what was gathered."""
        if self._due is not None:
            self._due.cancel()
            self._due = None
        if self._lines:
            lines, self._lines = self._lines, []
            self.stream.write("\n".join(lines) + "\n")
        super().flush()

    def emit(self, record: logging.LogRecord) -> None:
        """A record, after what came before it."""
        self.flush()
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback goes into the field ``traceback``."""
        line: dict[str, Any] = {
            "time": _moment(record.created),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = (self.formatter or logging.Formatter()).formatException(record.exc_info)
        return _line(line)


_LEVELS = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warning", logging.ERROR: "error"}


def _line(fields: dict[str, Any]) -> str:
    try:
        return to_json(fields, serialize_unknown=True).decode()
    except PydanticSerializationError:  # half a surrogate pair
        return json.dumps(fields, default=str)


def _moment(seconds: float) -> str:
    return f"{_second(int(seconds))}.{int(seconds % 1 * 1000):03d}Z"


@lru_cache(4)
def _second(moment: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))


def log_event(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log ``event`` with its fields; those that are None or empty are left out."""
    if not LOGGER.isEnabledFor(level):
        return
    kept = {key: value for key, value in fields.items() if value is not None and value != "" and value != []}
    for handler in LOGGER.handlers:
        if isinstance(handler, JsonLines):
            handler.event(event, level, kept)
            return
    record = logging.LogRecord(LOGGER.name, level, "", 0, event, (), None)  # logging would look for the caller
    record.fields = kept
    LOGGER.handle(record)


def log_to(stream: TextIO = sys.stderr, level: int = logging.INFO) -> JsonLines:
    """Send the gateway's log to ``stream``, and only there."""
    handler = JsonLines(stream)
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(level)
    LOGGER.propagate = False
    return handler
