"""Admission as the routes use it: :mod:`lowbit.gateway.admission` with a clock and futures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from lowbit.gateway.admission import FairQueue, FullError, RateLimit, Ticket
from lowbit.gateway.config import LimitsConfig
from lowbit.gateway.refusal import Refusal

__all__ = ["Gate", "Pass"]


class Pass:
    """The right to ask a model; :meth:`Gate.leave` gives it back."""

    __slots__ = ("model", "ticket")

    def __init__(self, model: str, ticket: Ticket) -> None:
        self.model, self.ticket = model, ticket


class Gate:
    """Lets requests in: limits of their key first, then the fair queue of their model."""

    def __init__(
        self, limits: LimitsConfig, capacity: Callable[[str], int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limits, self._capacity, self._clock = limits, capacity, clock
        self._rates = RateLimit(limits.key_requests_per_minute, limits.key_concurrency)
        self._queues: dict[str, FairQueue] = {}
        self._waiting: dict[Ticket, asyncio.Future[None]] = {}

    @property
    def limits(self) -> LimitsConfig:
        """What clients may ask."""
        return self._limits

    @property
    def queues(self) -> Mapping[str, FairQueue]:
        """The queue of each model that was asked for, by name."""
        return self._queues

    async def enter(self, model: str, key: str, tokens: int, priority: int = 0, deadline: float = float("inf")) -> Pass:
        """Wait for a place. ``deadline`` is a time of the clock.

        Raises :class:`Refusal`: 429 for the key's limits, 503 for a full queue or a wait longer than
        ``limits.queue_timeout``, 504 for a deadline that passes; all but the last with ``Retry-After``.
        """
        now = self._clock()
        try:
            self._rates.enter(key, now)
        except FullError as error:
            raise Refusal(429, f"{error}; wait, then try again", retry_after=error.retry_after) from None
        ticket = Ticket(key, tokens, priority, now, min(deadline, now + self._limits.queue_timeout))
        queue = self._queues.get(model)
        if queue is None:
            queue = self._queues[model] = FairQueue(self._limits.queue_requests, self._limits.queue_tokens)
        try:
            if not queue.offer(ticket, max(1, self._capacity(model))):
                await self._wait(model, queue, ticket, deadline)
        except FullError as error:
            self._rates.leave(key)
            message = f"the queue of {model!r} is full: {error}"
            raise Refusal(503, message, code="queue_full", retry_after=min(60.0, error.retry_after)) from None
        except BaseException:
            self._rates.leave(key)
            raise
        return Pass(model, ticket)

    def leave(self, permit: Pass) -> None:
        """Give the place to the next."""
        self._queues[permit.model].release(permit.ticket, self._clock())
        self._rates.leave(permit.ticket.key)
        self.wake(permit.model)

    def wake(self, model: str) -> None:
        """Let in whoever fits now: call it when the model's capacity may have grown."""
        queue = self._queues.get(model)
        if queue is None or not queue.waiting:
            return
        for ticket in queue.admit(self._clock(), max(1, self._capacity(model))):
            future = self._waiting[ticket]
            if not future.done():
                future.set_result(None)

    async def _wait(self, model: str, queue: FairQueue, ticket: Ticket, deadline: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = future
        try:
            await asyncio.wait_for(future, ticket.deadline - ticket.arrived)
        except asyncio.TimeoutError:
            if ticket.admitted_at is not None:
                queue.release(ticket, self._clock())
                self.wake(model)
            if ticket.deadline == deadline:
                raise Refusal(504, "the deadline passed while the request waited for its turn") from None
            seconds = self._limits.queue_timeout
            message = f"the request waited {seconds:g} s for its turn at {model!r}: too many requests"
            retry = min(60.0, queue.wait(max(1, self._capacity(model))))
            raise Refusal(503, message, code="queue_timeout", retry_after=retry) from None
        except asyncio.CancelledError:
            if ticket.admitted_at is not None:
                queue.release(ticket, self._clock())
                self.wake(model)
            raise
        finally:
            queue.leave(ticket)
            del self._waiting[ticket]
