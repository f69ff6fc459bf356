"""A streaming client that times tokens: one request to any OpenAI-compatible server, and what became of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lowbit.ops.bench.load import Outcome

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

__all__ = ["Answer", "Target", "ask", "session_for"]


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go: ``extra`` is part of every body, ``timeout`` the seconds of a whole answer."""

    url: str
    model: str
    api: Literal["chat", "completions"] = "chat"
    headers: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 300.0

    def body(self, prompt: str | Sequence[int], output_tokens: int) -> dict[str, Any]:
        """The JSON of a request."""
        asked = {"prompt": prompt} if self.api == "completions" else {"messages": [{"role": "user", "content": prompt}]}
        return {
            "model": self.model,
            **asked,
            "max_tokens": output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.extra,
        }

    @property
    def address(self) -> str:
        """The route."""
        return f"{self.url}/v1/{'chat/completions' if self.api == 'chat' else 'completions'}"


@dataclass(slots=True)
class Answer:
    """What has come of a stream so far; times of :func:`time.perf_counter`."""

    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    counted: int | None = None
    prompt_tokens: int = 0
    complete: bool = False
    error: str | None = None

    def take(self, event: Mapping[str, Any], now: float) -> None:
        """One event of the stream."""
        if event.get("error"):
            self.error = "error in the stream"
            return
        usage = event.get("usage")
        if isinstance(usage, Mapping):
            self.prompt_tokens = int(usage.get("prompt_tokens") or 0)
            self.counted = int(usage.get("completion_tokens") or 0)
        timings = event.get("timings")
        # llama.cpp tells how many tokens there are so far: a chunk may hold several, and a token no text
        so_far = int(timings.get("predicted_n") or 0) if isinstance(timings, Mapping) else 0
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            text = (
                choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
            )
            if text or so_far > self.tokens:
                self._token(max(1, so_far - self.tokens), now)
            if choice.get("finish_reason"):
                self.complete = True

    def _token(self, count: int, now: float) -> None:
        if self.first is None:
            self.first = now
        else:
            self.gaps += [(now - self.last) / count] * count
        self.tokens += count
        self.last = now


async def ask(
    session: ClientSession, target: Target, prompt: str | Sequence[int], output_tokens: int, *, due: float, start: float
) -> Outcome:
    """Send one request and read its answer to the end; never raises for what a server does.

    ``start`` is the beginning of the run on the clock of :func:`time.perf_counter`, ``due`` seconds after it.
    """
    import aiohttp

    answer = Answer()
    sent = time.perf_counter()
    failure: str | None
    try:
        limit = aiohttp.ClientTimeout(total=target.timeout)
        data = json.dumps(target.body(prompt, output_tokens)).encode()
        headers = {"Content-Type": "application/json", **target.headers}
        async with session.post(target.address, data=data, headers=headers, timeout=limit) as response:
            failure = await _read(response, answer)
    except asyncio.TimeoutError:
        failure = "timeout"
    except aiohttp.ClientConnectorError:
        failure = "connection refused"
    except (aiohttp.ClientError, OSError):
        failure = "connection lost"
    finished = answer.last if failure is None and answer.last else time.perf_counter()
    return Outcome(
        due=due,
        sent=sent - start,
        finished=finished - start,
        first=None if answer.first is None else answer.first - start,
        prompt_tokens=answer.prompt_tokens,
        output_tokens=answer.counted if answer.counted is not None else answer.tokens,
        gaps=tuple(answer.gaps),
        failure=failure,
    )


async def _read(response: ClientResponse, answer: Answer) -> str | None:
    """Read a stream into ``answer``; gives the kind of its failure."""
    if response.status != 200:
        await response.read()
        return f"status {response.status}"
    async for data in _events(response):
        if data == b"[DONE]":
            answer.complete = True
            continue
        try:
            event = json.loads(data)
        except ValueError:
            return "unreadable answer"
        if not isinstance(event, dict):
            return "unreadable answer"
        answer.take(event, time.perf_counter())
        if answer.error:
            return answer.error
    if answer.first is None:
        return "no token" if answer.complete else "unreadable answer"
    return None if answer.complete else "cut short"


async def _events(response: ClientResponse) -> AsyncIterator[bytes]:
    """The data of each server-sent event, as it arrives."""
    buffer = b""
    async for piece in response.content.iter_any():
        *lines, buffer = (buffer + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()
            elif line.startswith(b"error:"):  # llama.cpp's own form
                yield b'{"error": true}'
    if buffer.startswith(b"data:"):
        yield buffer[5:].strip()


def session_for(*, keep_alive: bool) -> ClientSession:
    """A session without a limit of connections; without ``keep_alive`` each request has one of its own.

    llama.cpp's server closes kept connections without a word, which would be counted as its failure.
    """
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=not keep_alive),
        timeout=aiohttp.ClientTimeout(total=None),
    )
