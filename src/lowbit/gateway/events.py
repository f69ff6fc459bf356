"""Server-sent events (WHATWG HTML, section 9.2), as far as OpenAI's streams use them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lowbit.gateway.wire import decode, encode

__all__ = ["DONE", "EventReader", "data_event", "has_token", "iter_events"]

DONE = b"data: [DONE]\n\n"


def data_event(value: Any) -> bytes:
    """One event with JSON in it."""
    return b"data: " + encode(value) + b"\n\n"


def iter_events(buffer: bytes) -> Iterator[tuple[bytes, int]]:
    """``(data, end)`` of each complete event in ``buffer``, one at a time. Comments have no data and are passed over.

    Lines end with LF (callers turn CRLF into that). llama.cpp once sent errors as a field ``error:``: data, too.
    Raises :class:`ValueError` for what is no event.
    """
    start = 0
    while (stop := buffer.find(b"\n\n", start)) >= 0:
        lines = []
        for line in buffer[start:stop].split(b"\n"):
            name, _, value = line.partition(b":")
            if name == b"data":
                lines.append(value.removeprefix(b" "))
            elif name == b"error":
                lines.append(b'{"error":' + value + b"}")
            elif name and name not in (b"event", b"id", b"retry"):
                raise ValueError(f"not a stream of events: {line[:80]!r}")
        start = stop + 2
        if lines:
            yield b"\n".join(lines), start


class EventReader:
    """Turns pieces of a stream, however they are cut, into the JSON of its events."""

    def __init__(self) -> None:
        self._rest = b""
        self.finished = False

    def feed(self, chunk: bytes) -> Iterator[dict[str, Any]]:
        """The events completed by ``chunk``. Raises :class:`ValueError` for one that is not JSON."""
        buffer = self._rest + chunk
        if b"\r" in buffer:
            buffer = buffer.replace(b"\r\n", b"\n")
        end = 0
        for event, end in iter_events(buffer):  # noqa: B007 - where the last one ended
            if event == b"[DONE]":
                self.finished = True
            else:
                value = decode(event)
                if not isinstance(value, dict):
                    raise ValueError(f"an event that is no object: {event[:80]!r}")
                yield value
        self._rest = buffer[end:]


def has_token(event: dict[str, Any]) -> bool:
    """Whether an event carries something of the answer, rather than only announcing it."""
    choices = event.get("choices")
    if not isinstance(choices, list):
        return event.get("type") not in ("response.created", "response.in_progress", "response.queued")
    for choice in choices:
        delta = choice.get("delta")
        if choice.get("finish_reason") or choice.get("text"):
            return True
        if isinstance(delta, dict) and any(value for key, value in delta.items() if key != "role"):
            return True
    return bool(event.get("usage"))
