"""One replica: an engine process under supervision, and the way of a request to it and of its answer back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass

import aiohttp

from lowbit.engines.process import EngineSpec, Supervisor

__all__ = ["EngineAwayError", "EngineReplica", "Head"]

_KEPT = ("content-type", "retry-after")
_CHUNK = 64 * 1024


@dataclass(frozen=True, slots=True)
class Head:
    """What comes before an answer's body."""

    status: int
    headers: Mapping[str, str]

    @property
    def is_stream(self) -> bool:
        """Whether the body is server-sent events."""
        kind = next((value for name, value in self.headers.items() if name.lower() == "content-type"), "")
        return kind.startswith("text/event-stream")


class EngineAwayError(Exception):
    """The replica lives, but its engine does not answer at the moment; ``args`` are its name and the reason."""


class EngineReplica:
    """A Ray Serve deployment's class: it starts the engine of ``spec`` on its node and is up when the engine is."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._session: aiohttp.ClientSession | None = None
        self._engine: Supervisor | None = None
        self._starting = asyncio.Lock()
        self._failed = ""

    async def _running(self) -> tuple[Supervisor, aiohttp.ClientSession]:
        async with self._starting:
            if self._engine is None:
                session = aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None, sock_connect=10)
                )
                engine = Supervisor(self._spec, session, self._heard)
                try:
                    await engine.start()
                except BaseException:
                    await session.close()
                    raise
                self._session, self._engine = session, engine
        assert self._engine is not None
        assert self._session is not None
        return self._engine, self._session

    def _heard(self, event: str, reason: str) -> None:
        if event == "failed":
            self._failed = reason

    async def check_health(self) -> None:
        """Raise when the engine is beyond help, so that Ray replaces this replica."""
        if self._failed:
            raise RuntimeError(f"{self._spec.name}: {self._failed}")
        await self._running()

    async def answer(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], affinity: str, avoid: Collection[str]
    ) -> AsyncIterator[Head | bytes]:
        """The engine's answer: its head first, then the body as it comes; the last two arguments are the router's.

        Raises :class:`EngineAwayError`.
        """
        engine, session = await self._running()
        engine.busy += 1
        try:
            sent = {**headers, **self._spec.headers}
            url = f"{engine.base_url}{path}"
            async with session.request(method, url, data=body or None, headers=sent) as response:
                kept = {name: value for name, value in response.headers.items() if name.lower() in _KEPT}
                yield Head(response.status, {**kept, "x-lowbit-replica": _replica_name()})
                async for chunk in response.content.iter_any():
                    engine.progress()
                    yield chunk
        except (aiohttp.ClientError, OSError) as error:
            raise EngineAwayError(_replica_name(), str(error)) from None
        finally:
            engine.busy -= 1

    async def where(self) -> tuple[str, int]:
        """The node's id and the engine's process id, for operators and tests."""
        import ray

        engine, _ = await self._running()
        return str(ray.get_runtime_context().get_node_id()), engine.pid or 0


def _replica_name() -> str:
    from ray import serve

    return str(serve.get_replica_context().replica_id.unique_id)
