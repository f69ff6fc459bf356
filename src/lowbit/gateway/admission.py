"""Who may go next: a bounded, fair queue in front of a model, and the limits of each key. Pure: time is an argument.

Fairness is start-time fair queueing (Goyal, Vin and Cheng, 1996): each key has a virtual time that a request moves on
by its estimated tokens, and the key furthest behind goes next. A key with a thousand long requests therefore delays
another's single short one by one request, not by a thousand. Priority orders the requests of one key only.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["FairQueue", "FullError", "RateLimit", "Ticket"]

_SMOOTHING = 0.2
"""Weight of the newest request in the average time that a place is held."""


class FullError(Exception):
    """The queue takes no more; ``retry_after`` seconds are expected to help."""

    def __init__(self, message: str, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(message)


@dataclass(slots=True, eq=False)
class Ticket:
    """One request: its key, estimated tokens of prompt and answer, and the times it arrived and is too late."""

    key: str
    tokens: int
    priority: int = 0
    arrived: float = 0.0
    deadline: float = float("inf")
    admitted_at: float | None = None
    gone: bool = False


@dataclass(slots=True)
class _Line:
    """What one key has waiting, and its virtual time."""

    start: float
    heap: list[tuple[int, int, Ticket]] = field(default_factory=list)
    waiting: int = 0


class FairQueue:
    """The queue of one model: at most ``requests`` and ``tokens`` wait.

    Every ticket goes :meth:`offer` → (:meth:`admit`) → :meth:`release`, or :meth:`leave` while it waits.
    """

    def __init__(self, requests: int, tokens: int) -> None:
        self.requests, self.tokens = requests, tokens
        self.active = 0
        self.waiting = 0
        self.waiting_tokens = 0
        self._lines: dict[str, _Line] = {}
        self._virtual = 0.0
        self._order = 0
        self._hold: float | None = None

    def offer(self, ticket: Ticket, capacity: int) -> bool:
        """True: it may go at once. False: it waits. :class:`FullError`: neither."""
        if not self.waiting and self.active < capacity:
            self._go(ticket, ticket.arrived)
            return True
        if self.waiting >= self.requests:
            raise FullError(f"{self.waiting} requests wait already", self.wait(capacity))
        if self.waiting and self.waiting_tokens + ticket.tokens > self.tokens:
            raise FullError(f"requests with {self.waiting_tokens} tokens wait already", self.wait(capacity))
        line = self._lines.get(ticket.key)
        if line is None:
            line = self._lines[ticket.key] = _Line(self._virtual)
        if not line.waiting:
            line.start = max(line.start, self._virtual)
        self._order += 1
        heapq.heappush(line.heap, (-ticket.priority, self._order, ticket))
        line.waiting += 1
        self.waiting += 1
        self.waiting_tokens += ticket.tokens
        return False

    def admit(self, now: float, capacity: int) -> Iterator[Ticket]:
        """The tickets that may go now, in fair order."""
        while self.waiting and self.active < capacity:
            line = min((line for line in self._lines.values() if line.waiting), key=lambda line: line.start)
            ticket = heapq.heappop(line.heap)[2]
            if ticket.gone:
                continue
            self._forget(ticket, line)
            self._go(ticket, now)
            yield ticket

    def leave(self, ticket: Ticket) -> None:
        """A waiting ticket gives up."""
        if not ticket.gone and ticket.admitted_at is None:
            ticket.gone = True
            self._forget(ticket, self._lines[ticket.key])

    def release(self, ticket: Ticket, now: float) -> None:
        """An admitted ticket is done. Idempotent."""
        if ticket.admitted_at is None or ticket.gone:
            return
        ticket.gone = True
        self.active -= 1
        held = now - ticket.admitted_at
        self._hold = held if self._hold is None else self._hold + _SMOOTHING * (held - self._hold)

    def wait(self, capacity: int) -> float:
        """Seconds that a request offered now should expect to wait, from how long places were held of late."""
        return (self._hold or 1.0) * (self.waiting + 1) / max(1, capacity)

    def _go(self, ticket: Ticket, now: float) -> None:
        ticket.admitted_at = now
        self.active += 1
        line = self._lines.get(ticket.key)
        if line is None:
            line = self._lines[ticket.key] = _Line(self._virtual)
        line.start = max(line.start, self._virtual)
        self._virtual = line.start
        line.start += max(1, ticket.tokens)
        if len(self._lines) > 1024:
            self._lines = {key: line for key, line in self._lines.items() if line.waiting or line.start > self._virtual}

    def _forget(self, ticket: Ticket, line: _Line) -> None:
        line.waiting -= 1
        self.waiting -= 1
        self.waiting_tokens -= ticket.tokens


class RateLimit:
    """Requests per minute and at a time of each key: the generic cell rate algorithm (ITU-T I.371), one number a key.

    A key may use a whole minute's requests at once.
    """

    def __init__(self, per_minute: int | None, at_a_time: int | None) -> None:
        self.per_minute, self.at_a_time = per_minute, at_a_time
        self._due: dict[str, float] = {}
        self._active: dict[str, int] = {}

    def enter(self, key: str, now: float) -> None:
        """Count a request that begins. Raises :class:`FullError`."""
        active = self._active.get(key, 0)
        if self.at_a_time is not None and active >= self.at_a_time:
            raise FullError(f"this key has {active} requests under way, as many as it may", 1.0)
        if self.per_minute is not None:
            step = 60.0 / self.per_minute
            due = max(self._due.get(key, now), now) + step
            if due - now > 60.0 + 1e-9:
                raise FullError(f"this key may make {self.per_minute} requests per minute", due - now - 60.0)
            if len(self._due) > 4096:
                self._due = {name: time for name, time in self._due.items() if time > now}
            self._due[key] = due
        self._active[key] = active + 1

    def leave(self, key: str) -> None:
        """Count a request that ended."""
        active = self._active[key] - 1
        if active:
            self._active[key] = active
        else:
            del self._active[key]
