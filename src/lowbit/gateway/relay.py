"""A request's way to an engine and back: admission, lease, retry on the next tier until the first token, pass-through.

Nothing of the answer goes to the client before the engine has given a token of it, so an engine that fails before
that costs the client nothing but time. Afterwards bytes pass as they come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from aiohttp import (
    ClientConnectorError,
    ClientError,
    ClientOSError,
    ClientResponse,
    ClientTimeout,
    ServerDisconnectedError,
)

from lowbit.gateway.config import ServeConfig
from lowbit.gateway.dialects import adapt, count_request, counted, engine_error, prompt_bytes
from lowbit.gateway.events import has_token, iter_events
from lowbit.gateway.gate import Gate
from lowbit.gateway.metrics import GapHistogram, Metrics
from lowbit.gateway.policy import Request
from lowbit.gateway.protocol import Failure, Lease, PoolProtocol, RefusedError
from lowbit.gateway.refusal import Refusal
from lowbit.gateway.requests import LowbitOptions
from lowbit.gateway.usage import counts, estimate, tail_usage
from lowbit.gateway.wire import decode, encode

__all__ = ["Answer", "Call", "EngineFailed", "Relay"]

_TAIL = 4096
"""Bytes of a stream's end that are kept, to find ``[DONE]`` and the usage in."""

_HEAD = 1024**2
"""Bytes that a stream may send before its first token."""

_STALE = 0.25
"""Seconds within which a lost connection is put down to an engine that had closed it while idle."""

_CONNECT = 5.0


class EngineFailed(Exception):  # noqa: N818 - the name says whose failure it is
    """An engine that did not do its part; ``kind`` is what the pool hears."""

    def __init__(self, kind: Failure, message: str, retry_after: float | None = None) -> None:
        self.kind = kind
        self.retry_after = retry_after
        super().__init__(message)


@dataclass(slots=True)
class Call:
    """One request on its way; the lower half is filled in as it goes, for the log."""

    id: str
    route: str
    path: str
    body: dict[str, Any]
    model: str
    tier: str | None
    options: LowbitOptions
    key: str
    stream: bool = False
    started: float = field(default_factory=time.perf_counter)
    answered_by: str = ""
    tried: list[str] = field(default_factory=list)
    deadline: float = float("inf")
    waited: float = 0.0
    first_token: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Answer:
    """An engine's answer: status 2xx, and its first token if it is a stream. Used with ``async with``."""

    def __init__(
        self, lease: Lease, response: ClientResponse, body: bytes, call: Call, metrics: Metrics, empty: int = 0
    ) -> None:
        self.lease, self.response, self.body, self.call = lease, response, body, call
        self.complete = not call.stream
        self._metrics, self._empty = metrics, empty

    @property
    def headers(self) -> Mapping[str, str]:
        """What the client learns of who answered."""
        return _who(self.lease.model, self.lease.tier, self.lease.kl)

    def json(self) -> dict[str, Any]:
        """The whole answer as an object; it was checked on arrival."""
        value: dict[str, Any] = decode(self.body)
        return value

    async def chunks(self) -> AsyncIterator[bytes]:
        """The stream as it comes; ``complete`` is true from the last piece on.

        Raises :class:`EngineFailed` if it breaks off.
        """
        lease, content = self.lease, self.response.content
        series = self._metrics.gaps.series(lease.model, lease.tier)
        first = last = time.perf_counter()
        chunk = tail = self.body
        events = -self._empty - 2  # the finish reason and [DONE] carry no token
        try:
            while chunk:
                count = chunk.count(b"\n\n")
                events += count
                self._metrics.flowed += count
                if content.at_eof():
                    break
                yield chunk
                chunk = await content.readany()
                now = time.perf_counter()
                GapHistogram.add(series, now - last)
                last = now
                tail = chunk if len(chunk) >= _TAIL else (tail + chunk)[-_TAIL:]
                lease.progress()
        except (ClientError, OSError, asyncio.TimeoutError) as error:
            if b"[DONE]" not in tail:
                raise self._broke(error) from error
            chunk = b""  # the answer went out to its end: the engine only did not close the stream
        self._finish(tail, events, last - first)
        if chunk:
            yield chunk
        if not self.complete:
            raise self._broke(None)

    def _finish(self, tail: bytes, events: int, seconds: float) -> None:
        lease, call = self.lease, self.call
        if b"[DONE]" not in tail and b"response.completed" not in tail and not call.path.endswith("/responses"):
            return
        self.complete = True
        call.prompt_tokens, call.completion_tokens = tail_usage(tail) or (0, max(1, events))
        self._metrics.tokens(lease.model, lease.tier, call.prompt_tokens, call.completion_tokens)
        lease.done(call.completion_tokens, seconds)

    def _broke(self, error: Exception | None) -> EngineFailed:
        if error is not None and time.perf_counter() >= self.call.deadline - 0.01:
            return EngineFailed("cancelled", "the deadline passed before the answer was complete")
        kind: Failure = "timeout" if isinstance(error, asyncio.TimeoutError) else "disconnected"
        self.lease.failed(kind)
        reason = "sent nothing for too long" if kind == "timeout" else "broke off"
        return EngineFailed(kind, f"the engine of {self.lease.tier_id} {reason} in the middle of its answer")


@lru_cache(256)
def _who(model: str, tier: str, kl: float | None) -> Mapping[str, str]:
    quality = {} if kl is None else {"x-lowbit-kl": f"{kl:.6g}"}
    return {"x-lowbit-model": model, "x-lowbit-tier": tier, **quality}


class Relay:
    """Takes calls to engines."""

    def __init__(self, pool: PoolProtocol, gate: Gate, config: ServeConfig, metrics: Metrics) -> None:
        self.pool, self.gate, self.metrics = pool, gate, metrics
        self._limits = config.limits

    def answer(self, call: Call) -> _Exchange:
        """An answer to ``call``, for ``async with``: leaving it gives place, lease and connection back.

        Raises :class:`Refusal`.
        """
        return _Exchange(self, call)

    @asynccontextmanager
    async def borrow(self, call: Call) -> AsyncIterator[Lease]:
        """A lease for something that costs an engine next to nothing, past the queue."""
        deadline = self.pool.now() + self._limits.request_timeout
        lease = await self._acquire(self._request(call, 0, deadline), call, None)
        call.answered_by = lease.tier
        try:
            yield lease
            lease.done(0, 0.0)
        finally:
            lease.release()

    def _request(self, call: Call, tokens: int, deadline: float) -> Request:
        options = call.options
        return Request(
            model=call.model,
            tier=call.tier or options.tier,
            precision=options.precision,
            memory_limit=options.memory,
            speed=options.speed,
            priority=options.priority,
            tokens_estimate=tokens,
            arrived=self.pool.now(),
            deadline=deadline,
            stream=call.stream,
        )

    async def enter(self, exchange: _Exchange) -> Answer:
        """Admission, then one tier after the other until one answers."""
        call, options = exchange.call, exchange.call.options
        arrived = self.pool.now()
        limit = self._limits.request_timeout
        deadline = arrived + min(limit, options.deadline or limit)
        call.deadline = call.started + deadline - arrived
        tokens = estimate(call.body)
        request = self._request(call, tokens, deadline)
        exchange.permit = await self.gate.enter(call.model, call.key, tokens, options.priority, deadline)
        failure: EngineFailed | None = None
        while True:
            lease = exchange.lease = await self._acquire(request, call, failure)
            if not call.tried:
                call.waited = time.perf_counter() - call.started
                self.metrics.queued(call.model, call.waited)
            call.answered_by = lease.tier
            try:
                return await self._ask(lease, call, exchange, deadline)
            except EngineFailed as error:
                lease.failed(error.kind)
                failure = error
            exchange.close()
            call.tried.append(lease.tier_id)

    async def _acquire(self, request: Request, call: Call, failure: EngineFailed | None) -> Lease:
        try:
            lease = await self.pool.acquire(request, call.tried)
        except RefusedError as error:
            if failure is None:
                raise Refusal(error.status, error.message, code=error.code, retry_after=error.retry_after) from None
            retry = error.retry_after or failure.retry_after
            if failure.kind == "timeout":
                raise Refusal(504, str(failure), code="engine_timeout", retry_after=retry) from None
            status = 503 if failure.retry_after is not None else 502
            raise Refusal(status, str(failure), code="engine_failed", retry_after=retry) from None
        if failure is not None:
            self.metrics.on_event("fallback", call.tried[-1], {"to": lease.tier_id})
        return lease

    async def _ask(self, lease: Lease, call: Call, exchange: _Exchange, deadline: float) -> Answer:
        body = adapt(call.body, lease)
        await self._check_length(lease, call, body)
        try:
            payload = encode(body)
        except ValueError:
            raise Refusal(400, "a number is too large", code="invalid_json") from None
        remaining = deadline - self.pool.now()
        if remaining <= 0:
            raise Refusal(504, "the deadline passed before an engine was free")
        timeout = ClientTimeout(total=remaining, sock_connect=_CONNECT, sock_read=self._limits.first_byte_timeout)
        try:
            response = exchange.response = await self._post(lease, call.path, payload, timeout)
            return await self._receive(lease, call, response)
        except asyncio.TimeoutError as error:
            if self.pool.now() >= deadline - 0.01:
                raise Refusal(504, "the deadline passed before the answer was complete") from None
            raise EngineFailed("timeout", f"the engine of {lease.tier_id} sent nothing for too long") from error
        except ClientConnectorError as error:
            raise EngineFailed("connect", f"the engine of {lease.tier_id} cannot be reached") from error
        except (ClientError, OSError) as error:
            raise EngineFailed("disconnected", f"the engine of {lease.tier_id} broke off") from error

    async def _post(self, lease: Lease, path: str, payload: bytes, timeout: ClientTimeout) -> ClientResponse:
        headers = {"Content-Type": "application/json", **lease.headers}
        url = lease.base_url + path
        started = time.perf_counter()
        while True:  # an engine may have closed any number of kept connections, and each is found out by using it
            try:
                return await lease.session.post(
                    url, data=payload, headers=headers, timeout=timeout, allow_redirects=False
                )
            except (ServerDisconnectedError, ClientOSError, ConnectionResetError) as error:
                if isinstance(error, ClientConnectorError) or time.perf_counter() - started > _STALE:
                    raise

    async def _receive(self, lease: Lease, call: Call, response: ClientResponse) -> Answer:
        if response.status >= 300:
            raise await _refused(lease, response)
        empty = 0
        if call.stream:
            head, empty = await _first_token(lease, response)
        else:
            head = await response.read()
            usage = _checked(head, lease)
            call.prompt_tokens, call.completion_tokens = usage
            self.metrics.tokens(lease.model, lease.tier, *usage)
            self.metrics.flowed += usage[1]
        call.first_token = time.perf_counter() - call.started
        if call.stream:
            self.metrics.first_token(lease.model, lease.tier, call.first_token)
            lease.first_token(call.first_token)
        else:
            lease.done(call.completion_tokens, call.first_token)
        return Answer(lease, response, head, call, self.metrics, empty)

    async def _check_length(self, lease: Lease, call: Call, body: Mapping[str, Any]) -> None:
        """Refuse a prompt that does not fit; only one long enough to be in doubt is counted by the engine."""
        limits = [limit for limit in (lease.context, self._limits.prompt_tokens) if limit is not None]
        size = prompt_bytes(body)
        if not limits or size is None or size < min(limits):
            return
        count = await self.count_tokens(lease, body)
        if count is None:
            return
        param = "messages" if "messages" in body else "prompt"
        limit = self._limits.prompt_tokens
        if limit is not None and count > limit:
            message = f"the prompt has {count} tokens, {count - limit} more than the {limit} that this server takes"
            raise Refusal(400, message, code="context_length_exceeded", param=param)
        if lease.context is not None and count >= lease.context:
            message = (
                f"the prompt has {count} tokens, {count - lease.context + 1} more than fit: "
                f"the context of {lease.tier_id} is {lease.context} tokens, one of them for the answer"
            )
            raise Refusal(400, message, code="context_length_exceeded", param=param)

    async def count_tokens(self, lease: Lease, body: Mapping[str, Any]) -> int | None:
        """How many tokens a prompt has by the engine's own tokenizer, or None where it cannot tell."""
        return counted(await self._tokenized(lease, body))

    async def tokenize(self, lease: Lease, body: Mapping[str, Any]) -> list[int] | None:
        """The tokens of a text or a chat, or None where the engine cannot tell."""
        tokens = (await self._tokenized(lease, body)).get("tokens")
        return tokens if isinstance(tokens, list) else None

    async def _tokenized(self, lease: Lease, body: Mapping[str, Any]) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = {}
        carried: str | None = None
        for path, request, field_name in count_request(body, lease):
            if carried is not None:
                if field_name is None or carried not in answer:
                    return {}
                request = {**request, field_name: answer[carried]}
            carried = field_name
            try:
                payload = encode(request)
                response = await self._post(lease, path, payload, ClientTimeout(total=30.0, sock_connect=_CONNECT))
                async with response:
                    answer = await response.json(content_type=None) if response.status == 200 else {}
            except (ClientError, OSError, asyncio.TimeoutError, ValueError):
                return {}
        return answer


class _Exchange:
    """The scope of one call: what it holds, and how that is given back."""

    __slots__ = ("call", "lease", "permit", "relay", "response")

    def __init__(self, relay: Relay, call: Call) -> None:
        self.relay, self.call = relay, call
        self.permit: Any = None
        self.lease: Lease | None = None
        self.response: ClientResponse | None = None

    async def __aenter__(self) -> Answer:
        try:
            return await self.relay.enter(self)
        except BaseException:
            self._leave()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._leave()

    def close(self) -> None:
        """Give lease and connection back; a connection in mid-answer is cut, which tells the engine to stop."""
        if self.response is not None:
            self.response.close() if not self.response.content.at_eof() else self.response.release()
            self.response = None
        if self.lease is not None:
            self.lease.release()
            self.lease = None

    def _leave(self) -> None:
        self.close()
        if self.permit is not None:
            self.relay.gate.leave(self.permit)
            self.permit = None


async def _refused(lease: Lease, response: ClientResponse) -> Exception:
    """What an answer with an error status means."""
    raw = await response.read()
    try:
        answer = decode(raw)
    except ValueError:
        answer = None
    refusal = engine_error(response.status, answer) if response.status >= 400 else None
    if refusal is not None:
        lease.done(0, 0.0)
        return refusal
    retry = response.headers.get("Retry-After", "1") if response.status in (429, 503) else None
    seconds = None if retry is None else float(retry) if retry.isdecimal() else 1.0
    return EngineFailed("status", f"the engine of {lease.tier_id} answered with status {response.status}", seconds)


async def _first_token(lease: Lease, response: ClientResponse) -> tuple[bytes, int]:
    """The beginning of a stream, up to the chunk with the first token, and the number of events before that."""
    garbage = EngineFailed("garbage", f"the engine of {lease.tier_id} answered with something that is no stream")
    if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
        raise garbage
    head = rest = b""
    empty = 0
    while len(head) < _HEAD:
        chunk = await response.content.readany()
        if not chunk and not rest:
            raise EngineFailed("disconnected", f"the engine of {lease.tier_id} ended before its first token")
        lease.progress()
        head += chunk
        rest += chunk or b"\n\n"
        if b"\r" in rest:
            rest = rest.replace(b"\r\n", b"\n")
        end = 0
        try:
            for event, end in iter_events(rest):  # noqa: B007 - where the last one ended
                if event == b"[DONE]" or _speaks(decode(event), lease):
                    return head, empty
                empty += 1
        except ValueError:
            raise garbage from None
        rest = rest[end:]
    raise garbage


def _speaks(event: object, lease: Lease) -> bool:
    """Whether an event has a token. Raises what an error in it means, :class:`ValueError` for what is no object."""
    if not isinstance(event, dict):
        raise ValueError("no object")
    if "error" in event:
        error = event["error"]
        code = error.get("code") if isinstance(error, dict) else None
        refusal = engine_error(code if isinstance(code, int) else 500, event)
        raise refusal or EngineFailed("status", f"the engine of {lease.tier_id} failed")
    return has_token(event)


def _checked(body: bytes, lease: Lease) -> tuple[int, int]:
    """Prompt and completion tokens of a whole answer. Raises :class:`EngineFailed` for one that is no JSON object."""
    try:
        value = decode(body)
    except ValueError:
        value = None
    if not isinstance(value, (dict, list)):
        raise EngineFailed("garbage", f"the engine of {lease.tier_id} answered with something that is no JSON")
    usage = value.get("usage") if isinstance(value, dict) else None
    return counts(usage) if isinstance(usage, dict) else (0, 0)
