"""The fair queue and the limits of keys, by simulation, and their asyncio face."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from harness import run
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.gateway.admission import FairQueue, FullError, RateLimit, Ticket
from lowbit.gateway.config import LimitsConfig
from lowbit.gateway.gate import Gate
from lowbit.gateway.refusal import Refusal


def drain(queue: FairQueue, capacity: int = 1) -> list[Ticket]:
    """Serve everything that waits, one place at a time."""
    served = []
    while tickets := list(queue.admit(0.0, queue.active + capacity)):
        served += tickets
        for ticket in tickets:
            queue.release(ticket, 1.0)
    return served


def filled(*tickets: Ticket) -> FairQueue:
    queue = FairQueue(10_000, 10**9)
    blocker = Ticket("blocker", 1)
    assert queue.offer(blocker, 1)
    for ticket in tickets:
        assert not queue.offer(ticket, 1)
    queue.release(blocker, 0.0)
    return queue


def test_a_short_request_does_not_wait_for_anothers_thousand() -> None:
    many = [Ticket("greedy", 1000) for _ in range(1000)]
    one = Ticket("modest", 10)
    order = drain(filled(*many, one))
    assert order.index(one) <= 1
    assert len(order) == 1001


def test_tokens_are_shared_evenly_among_keys() -> None:
    tickets = [Ticket("long", 900) for _ in range(50)] + [Ticket("short", 100) for _ in range(450)]
    order = drain(filled(*tickets))
    tokens = Counter[str]()
    for ticket in order[: len(order) // 2]:
        tokens[ticket.key] += ticket.tokens
    assert abs(tokens["long"] - tokens["short"]) <= 1800


def test_priority_orders_one_keys_requests_only() -> None:
    low, high, other = Ticket("a", 10), Ticket("a", 10, priority=5), Ticket("b", 10)
    order = drain(filled(low, high, other))
    assert order.index(high) < order.index(low)
    assert order.index(other) < 2


def test_bounds() -> None:
    queue = FairQueue(2, 100)
    assert queue.offer(Ticket("a", 90), 1)
    assert not queue.offer(Ticket("a", 90), 1)
    with pytest.raises(FullError, match="90 tokens"):
        queue.offer(Ticket("a", 20), 1)
    assert not queue.offer(Ticket("b", 5), 1)
    with pytest.raises(FullError, match="2 requests") as caught:
        queue.offer(Ticket("c", 1), 1)
    assert caught.value.retry_after > 0


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 20))
def test_random_schedules(seed: int, capacity: int, bound: int) -> None:
    """Nobody is lost or served twice, the counts hold, capacity and bounds are kept, everyone is served in the end."""
    chance = random.Random(seed)
    queue = FairQueue(bound, 10_000)
    waiting: list[Ticket] = []
    active: list[Ticket] = []
    served: list[Ticket] = []
    left: list[Ticket] = []
    for step in range(200):
        action = chance.random()
        if action < 0.5:
            ticket = Ticket(chance.choice("abc"), chance.randrange(1, 3000), chance.randrange(-2, 3), float(step))
            try:
                (active if queue.offer(ticket, capacity) else waiting).append(ticket)
            except FullError:
                assert queue.waiting >= bound or queue.waiting_tokens + ticket.tokens > 10_000
        elif action < 0.8 and active:
            ticket = active.pop(chance.randrange(len(active)))
            queue.release(ticket, float(step))
            queue.release(ticket, float(step))
            served.append(ticket)
        elif waiting:
            ticket = waiting.pop(chance.randrange(len(waiting)))
            queue.leave(ticket)
            queue.leave(ticket)
            left.append(ticket)
        for ticket in queue.admit(float(step), capacity):
            waiting.remove(ticket)
            active.append(ticket)
        assert queue.active == len(active) <= capacity
        assert queue.waiting == len(waiting) <= bound
        assert queue.waiting_tokens == sum(ticket.tokens for ticket in waiting)
        assert not waiting or len(active) == capacity
    while active:
        queue.release(active.pop(), 300.0)
        for ticket in queue.admit(300.0, capacity):
            waiting.remove(ticket)
            active.append(ticket)
    assert waiting == []


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 100), st.lists(st.floats(0, 5), min_size=50, max_size=300))
def test_rate_limit_never_lets_more_through_than_it_says(limit: int, gaps: list[float]) -> None:
    rate = RateLimit(limit, None)
    now, let_in = 0.0, []
    for gap in gaps:
        now += gap
        try:
            rate.enter("key", now)
            let_in.append(now)
        except FullError as error:
            with pytest.raises(FullError):
                RateLimit.enter(rate, "key", now + error.retry_after - 1e-3 * error.retry_after - 1e-6)
            continue
    for index, start in enumerate(let_in):
        within = sum(1 for time in let_in[index:] if time < start + 60.0)
        assert within <= 2 * limit, "a burst and a minute's refill at most"
    assert sum(1 for time in let_in if time < 1e-9) <= limit


def test_concurrency_of_a_key() -> None:
    rate = RateLimit(None, 2)
    rate.enter("a", 0.0)
    rate.enter("a", 0.0)
    rate.enter("b", 0.0)
    with pytest.raises(FullError):
        rate.enter("a", 0.0)
    rate.leave("a")
    rate.enter("a", 0.0)


def test_the_gate_waits_times_out_and_forgets_who_left() -> None:
    async def scenario() -> None:
        capacity = 1
        gate = Gate(LimitsConfig(queue_timeout=0.1, key_concurrency=3), lambda model: capacity)
        first = await gate.enter("m", "a", 10)
        with pytest.raises(Refusal) as caught:
            await gate.enter("m", "a", 10)
        assert (caught.value.status, caught.value.code) == (503, "queue_timeout")
        assert caught.value.retry_after
        with pytest.raises(Refusal) as caught:
            await gate.enter("m", "a", 10, deadline=asyncio.get_running_loop().time() + 0.01)
        assert caught.value.status == 504
        task = asyncio.ensure_future(gate.enter("m", "a", 10))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        waiter = asyncio.ensure_future(gate.enter("m", "a", 10))
        await asyncio.sleep(0.01)
        gate.leave(first)
        second = await waiter
        capacity = 2
        third = await gate.enter("m", "a", 1)
        gate.leave(second)
        gate.leave(third)
        queue = gate.queues["m"]
        assert (queue.active, queue.waiting, queue.waiting_tokens) == (0, 0, 0)

    run(scenario)
