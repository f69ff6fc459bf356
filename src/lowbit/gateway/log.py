"""Structured logs: one JSON object a line, with the request's id; never a prompt, an answer or a key."""

from __future__ import annotations

import json
import logging
import sys
import time
from functools import lru_cache
from typing import Any, TextIO

__all__ = ["LOGGER", "JsonLines", "log_event", "log_to"]

LOGGER = logging.getLogger("lowbit.gateway")


class JsonLines(logging.Formatter):
    """``{"time", "level", "event", …}``; fields come from :func:`log_event`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback goes into the field ``traceback``."""
        line: dict[str, Any] = {
            "time": f"{_second(int(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


@lru_cache(4)
def _second(moment: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))


def log_event(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log ``event`` with its fields; those that are None or empty are left out."""
    if LOGGER.isEnabledFor(level):
        kept = {key: value for key, value in fields.items() if value not in (None, "", [])}
        record = logging.LogRecord(LOGGER.name, level, "", 0, event, (), None)  # logging would look for the caller
        record.fields = kept
        LOGGER.handle(record)


def log_to(stream: TextIO = sys.stderr, level: int = logging.INFO) -> logging.Handler:
    """Send the gateway's log to ``stream``, and only there."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(level)
    LOGGER.propagate = False
    return handler
