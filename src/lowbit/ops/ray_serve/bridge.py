"""The bridge: HTTP on the gateway's side, a deployment's replicas on the other.

An engine is anything that speaks OpenAI's HTTP. The bridge makes a whole deployment look like one: a request that a
replica lost before it said anything goes to another replica, and one that was cut off in mid-answer is cut off here,
which the gateway reports as it does for any engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from typing import TypeAlias

from aiohttp import web

from lowbit.ops.ray_serve.affinity import affinity_of
from lowbit.ops.ray_serve.replica import Head

__all__ = ["Ask", "Bridge", "ReplicaLostError"]

_ATTEMPTS = 8
_PAUSE, _LONGEST = 0.02, 2.0
_SENT = ("content-type", "accept")


class ReplicaLostError(Exception):
    """A replica, its node or its engine went away; another may be asked. ``replica`` is its name where it is known."""

    def __init__(self, message: str, replica: str | None = None) -> None:
        super().__init__(message)
        self.replica = replica


Ask: TypeAlias = Callable[[str, str, bytes, Mapping[str, str], str, Collection[str]], AsyncIterator[Head | bytes]]
"""``(method, path, body, headers, affinity, avoid)`` to a replica's answer, or :class:`ReplicaLostError`."""


class Bridge:
    """An application with ``/NAME/...`` for each deployment; ``asks`` by name."""

    def __init__(self, asks: Mapping[str, Ask]) -> None:
        self._asks = dict(asks)
        self.retried = 0
        self.app = web.Application(client_max_size=1 << 30)
        self.app.router.add_route("*", "/{name}/{path:.*}", self._handle)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        ask = self._asks.get(request.match_info["name"])
        if ask is None:
            raise web.HTTPNotFound(text=f"no deployment {request.match_info['name']}")
        body = await request.read()
        path = "/" + request.match_info["path"] + (f"?{request.query_string}" if request.query_string else "")
        headers = {name: value for name, value in request.headers.items() if name.lower() in _SENT}
        affinity = affinity_of(body)
        lost: set[str] = set()
        for attempt in range(1, _ATTEMPTS + 1):
            answer = ask(request.method, path, body, headers, affinity, lost)
            try:
                head = await anext(answer)
                assert isinstance(head, Head)
                if head.is_stream:
                    return await _passed_on(request, head, answer)
                # An answer that comes in one piece can be asked for again until its last byte is here.
                whole = b"".join([part async for part in answer if isinstance(part, bytes)])
                return web.Response(status=head.status, headers=dict(head.headers), body=whole)
            except ReplicaLostError as error:
                if attempt == _ATTEMPTS:
                    return web.json_response({"error": {"message": str(error), "type": "engine_error"}}, status=502)
                self.retried += 1
                if error.replica is not None:
                    lost.add(error.replica)
                await asyncio.sleep(min(_PAUSE * 2**attempt, _LONGEST))
        raise AssertionError("the last attempt returns")


async def _passed_on(request: web.Request, head: Head, answer: AsyncIterator[Head | bytes]) -> web.StreamResponse:
    """A stream, piece by piece; one that is cut off ends in a broken connection, so that it does not look whole.

    Raises :class:`ReplicaLostError` while nothing has been sent.
    """
    first = await anext(answer, b"")
    response = web.StreamResponse(status=head.status, headers=dict(head.headers))
    await response.prepare(request)
    try:
        assert isinstance(first, bytes)
        await response.write(first)
        async for chunk in answer:
            assert isinstance(chunk, bytes)
            await response.write(chunk)
    except ReplicaLostError:
        if request.transport is not None:
            request.transport.abort()
        return response
    await response.write_eof()
    return response
