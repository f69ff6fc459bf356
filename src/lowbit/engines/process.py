"""Engines as supervised processes: started, found healthy and warm, watched, restarted, drained and ended.

A :class:`Supervisor` owns one engine. No process survives it: each runs under :mod:`lowbit.engines.guard`, which kills
the whole process group when the gateway is gone.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import psutil

from lowbit.engines import guard
from lowbit.engines.logs import EngineLog
from lowbit.errors import ResourceError

if TYPE_CHECKING:
    from aiohttp import ClientSession

__all__ = ["EngineSpec", "Supervisor", "SupervisorEvent", "free_port"]

SupervisorEvent: TypeAlias = Literal["crashed", "hung", "restarted", "failed"]

_HOST = "127.0.0.1"
_POLL = 0.05
_MAX_POLL = 0.5
_STEADY = 60.0
"""Up for so many seconds, an engine's earlier crashes are forgotten."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """How to run one engine; seconds.

    ``command`` with ``{port}`` and ``{host}`` filled in when it starts; ``health`` is polled until it answers 200, then
    ``warmup`` (path and JSON body) is posted once. ``probe`` is asked when requests are under way and nothing came for
    ``hang_timeout``: a path to GET that only a working engine answers, or a path and body to POST. ``nice`` is added to
    the engine's niceness: the gateway beside it must answer at once, an engine need not. ``headers`` go with every
    request to it.
    """

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    health: str = "/health"
    warmup: tuple[str, Mapping[str, Any]] | None = None
    probe: str | tuple[str, Mapping[str, Any]] | None = None
    ready_timeout: float = 600.0
    hang_timeout: float = 60.0
    health_interval: float = 2.0
    health_timeout: float = 5.0
    health_failures: int = 3
    stop_timeout: float = 10.0
    backoff: float = 0.5
    max_backoff: float = 30.0
    restarts: int = 5
    nice: int = 5
    log: Path | None = None


def free_port(host: str = _HOST) -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


class Supervisor:
    """One engine. ``listener`` hears ``crashed``, ``hung`` (both: it is being restarted), ``restarted`` and ``failed``
    (given up after ``restarts`` in a row), each with a reason.

    ``busy`` is the number of requests under way and :meth:`progress` is called for every piece of an answer: that is
    how a hang is told from a pause.
    """

    def __init__(
        self, spec: EngineSpec, session: ClientSession, listener: Callable[[SupervisorEvent, str], None] | None = None
    ) -> None:
        self.spec = spec
        self.busy = 0
        self.restarted = 0
        self.pid: int | None = None
        self.base_url = ""
        self._session = session
        self._listener = listener or (lambda event, reason: None)
        self._log = EngineLog(spec.log)
        self._guard: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._reader: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._last_progress = 0.0

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._guard is not None and self._guard.returncode is None

    def progress(self) -> None:
        """Something came from the engine."""
        self._last_progress = time.monotonic()

    def resident_bytes(self) -> int:
        """Memory that the engine's processes hold now."""
        if self.pid is None:
            return 0
        try:
            process = psutil.Process(self.pid)
            return sum(each.memory_info().rss for each in (process, *process.children(recursive=True)))
        except psutil.Error:
            return 0

    async def start(self) -> None:
        """Run the engine until it is healthy and warm, then watch over it.

        Raises :class:`ResourceError` with the engine's own last words when it ends or is not ready in time; no process
        is left then.
        """
        await self._start()
        self._watch = asyncio.create_task(self._supervise(), name=f"watch {self.spec.name}")

    async def stop(self) -> None:
        """End the engine: SIGTERM, and SIGKILL after ``stop_timeout``. Idempotent."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            self._watch = None
        await self._end(gently=True)
        self._log.close()

    def kill_now(self) -> None:
        """SIGKILL the engine without waiting: the last resort when the loop is gone."""
        if self.pid is not None and self.alive:
            guard.kill_group(self.pid)

    async def _start(self) -> None:
        try:
            await self._launch()
            await asyncio.wait_for(self._become_ready(), self.spec.ready_timeout)
        except asyncio.TimeoutError:
            await self._end(gently=False)
            raise ResourceError(
                f"{self.spec.name}: not ready after {self.spec.ready_timeout:g} s{self._last_words()}"
            ) from None
        except BaseException:
            await self._end(gently=False)
            raise
        self.progress()

    async def _launch(self) -> None:
        port = free_port()
        self.base_url = f"http://{_HOST}:{port}"
        command = [part.replace("{port}", str(port)).replace("{host}", _HOST) for part in self.spec.command]
        ours, theirs = socket.socketpair()
        try:
            self._guard = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", guard.__file__, str(theirs.fileno()), str(self.spec.nice), *command),
                env={**os.environ, **self.spec.env},
                cwd=self.spec.cwd,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise ResourceError(f"{self.spec.name}: cannot be started: {error.strerror or error}") from error
        finally:
            theirs.close()
        self._control = ours
        ours.setblocking(False)
        self._reader = asyncio.create_task(self._read_log(self._guard), name=f"log {self.spec.name}")
        answer = await asyncio.get_running_loop().sock_recv(ours, 32)
        self.pid = int(answer) if answer.strip().isdigit() else None

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        if process.stdout is None:
            return
        while data := await process.stdout.read(65536):
            self._log.write(data)

    async def _become_ready(self) -> None:
        pause = _POLL
        while not await self._healthy(self.spec.health_timeout):
            if not self.alive:
                raise ResourceError(await self._why_ended())
            await asyncio.sleep(pause)
            pause = min(_MAX_POLL, pause * 1.2)
        if self.spec.warmup is not None and not await self._ask(self.spec.warmup, self.spec.ready_timeout):
            reason = await self._why_ended() if not self.alive else f"{self.spec.name}: warm-up failed"
            raise ResourceError(f"{reason}{self._last_words()}" if self.alive else reason)

    async def _why_ended(self) -> str:
        """The engine's exit status, and its last words once they are read."""
        if self._reader is not None:
            await asyncio.wait([self._reader], timeout=1.0)
        status = self._guard.returncode if self._guard is not None else None
        how = f"exit status {status}"
        if status is not None and status > 128:
            number = status - 128
            how = f"killed by {signal.Signals(number).name}" if number in list(signal.Signals) else how
            if number == signal.SIGKILL:
                how += " (out of memory?)"
        return f"{self.spec.name}: engine ended: {how}{self._last_words()}"

    def _last_words(self) -> str:
        tail = " | ".join(self._log.tail(3))
        return f"; it said: {tail[-600:]}" if tail else ""

    async def _healthy(self, timeout: float) -> bool:
        return await self._ask(self.spec.health, timeout)

    async def _ask(self, what: str | tuple[str, Mapping[str, Any]], timeout: float) -> bool:
        """Whether the engine answers 200 in time."""
        import aiohttp

        path, body = (what, None) if isinstance(what, str) else what
        limit = aiohttp.ClientTimeout(total=timeout)
        try:
            async with self._session.request(
                "GET" if body is None else "POST",
                self.base_url + path,
                json=body,
                timeout=limit,
                headers=self.spec.headers,
            ) as response:
                await response.read()
                return response.status == 200
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
            return False

    async def _supervise(self) -> None:
        """Watch; restart with growing pauses; give up after too many restarts in a row."""
        attempts = 0
        while True:
            began = time.monotonic()
            event, reason = await self._trouble()
            if time.monotonic() - began > _STEADY:
                attempts = 0
            self._listener(event, reason)
            await self._end(gently=False)
            while True:
                if attempts >= self.spec.restarts:
                    self._listener("failed", f"given up after {attempts} restarts: {reason}")
                    return
                pause = min(self.spec.max_backoff, self.spec.backoff * 2.0**attempts) if attempts else 0.0
                attempts += 1
                await asyncio.sleep(pause)
                try:
                    await self._start()
                except ResourceError as error:
                    reason = str(error)
                    continue
                break
            self.restarted += 1
            self._listener("restarted", f"after {attempts} attempts")

    async def _trouble(self) -> tuple[SupervisorEvent, str]:
        """Return when the engine has ended by itself or hangs."""
        process = self._guard
        if process is None:
            return "crashed", "no process"
        ended = asyncio.create_task(process.wait())
        failures = 0
        try:
            while True:
                done, _ = await asyncio.wait([ended], timeout=self.spec.health_interval)
                if done:
                    return "crashed", await self._why_ended()
                failures = 0 if await self._healthy(self.spec.health_timeout) else failures + 1
                if failures >= self.spec.health_failures and self.alive:
                    return "hung", f"{self.spec.name}: {failures} health checks failed"
                if await self._stuck():
                    return (
                        "hung",
                        f"{self.spec.name}: nothing came for {self.spec.hang_timeout:g} s and no probe either",
                    )
        finally:
            ended.cancel()

    async def _stuck(self) -> bool:
        """Whether requests are under way, nothing has come for too long, and a probe gets no answer either."""
        if not self.busy or self.spec.probe is None:
            self.progress()
            return False
        if time.monotonic() - self._last_progress < self.spec.hang_timeout:
            return False
        if await self._ask(self.spec.probe, self.spec.hang_timeout):
            self.progress()
            return False
        return self.alive

    async def _end(self, *, gently: bool) -> None:
        """End the process and wait until it and its group are gone."""
        process, self._guard = self._guard, None
        if process is not None:
            if process.returncode is None and self.pid is not None:
                if gently:
                    _signal_group(self.pid, signal.SIGTERM)
                    await asyncio.wait([asyncio.ensure_future(process.wait())], timeout=self.spec.stop_timeout)
                if process.returncode is None:
                    guard.kill_group(self.pid)
            if self._control is not None:
                self._control.close()  # the guard ends now if it has not yet
                self._control = None
            await process.wait()
        self.pid = None
        if self._reader is not None:
            await asyncio.wait([self._reader], timeout=1.0)
            self._reader.cancel()
            self._reader = None


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return
