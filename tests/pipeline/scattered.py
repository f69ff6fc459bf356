"""An executor for tests: workers that are threads, share nothing, finish in any order and may be killed."""

from __future__ import annotations

import copyreg
import io
import pickle
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from lowbit.errors import ResourceError
from lowbit.pipeline.executor import WorkerLostError
from lowbit.pipeline.transport import packed, unpacked

_ONE_AT_A_TIME = threading.Lock()
"""What workers intercept is a process's own, and they share one here."""


class _Thread:
    """One worker: jobs in order, each with copies of its arguments, on a thread of its own."""

    def __init__(self, delay: Callable[[], float]) -> None:
        self.kept: dict[int, Any] = {}
        self.dead = False
        self._delay = delay
        self._pool = ThreadPoolExecutor(1)

    def send(self, function: Callable[..., Any], *arguments: Any) -> Future[bytes]:
        return self._pool.submit(self._run, function, arguments)

    def end(self) -> None:
        self._pool.shutdown()

    def _run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
        time.sleep(self._delay())
        given = [pickle.loads(a.result()) if isinstance(a, Future) else copied(a) for a in arguments]
        with _ONE_AT_A_TIME, torch.no_grad():
            if not self.dead:
                value = dumped(function(*given))
        if self.dead:
            raise WorkerLostError("killed")
        return value


def dumped(value: Any) -> bytes:
    """``value`` as it is sent."""
    sent = io.BytesIO()
    pickler = pickle.Pickler(sent, protocol=5)
    pickler.dispatch_table = copyreg.dispatch_table | {torch.Tensor: lambda t: (unpacked, (packed(t),))}
    pickler.dump(value)
    return sent.getvalue()


def copied(value: Any) -> Any:
    """What arrives of ``value`` on another machine."""
    return pickle.loads(dumped(value))


class Scattered:
    """``workers`` threads; ``losses`` are the numbers of the calls at which the worker that gets them is lost."""

    apart = True

    def __init__(self, workers: int, *, seed: int = 0, losses: tuple[int, ...] = (), spare: int = 99) -> None:
        self._rng = random.Random(seed)
        self._losses, self._spare = set(losses), spare
        self._threads = [_Thread(self._delay) for _ in range(workers)]
        self.calls = 0
        self.lost = 0
        self.by_worker: dict[_Thread, int] = {}

    def __enter__(self) -> Scattered:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.end()

    def _delay(self) -> float:
        return self._rng.random() * 1e-3

    @property
    def workers(self) -> int:
        return len(self._threads)

    def share(self, value: Any) -> Any:
        future: Future[bytes] = Future()
        future.set_result(dumped(value))
        return future

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._send(self._rng.choice(self._threads), function, *arguments)

    def start(self, kind: type[Any], *arguments: Any) -> Any:
        thread = min(self._threads, key=lambda each: len(each.kept))
        key = self.calls
        thread.kept[key] = None

        def make(*given: Any) -> None:
            thread.kept[key] = kind(*given)

        self._send(thread, make, *arguments)
        return thread, key

    def call(self, target: Any, method: str, *arguments: Any) -> Any:
        thread, key = target
        return self._send(thread, lambda *given: getattr(thread.kept[key], method)(*given), *arguments)

    def _send(self, thread: _Thread, function: Callable[..., Any], *arguments: Any) -> Future[bytes]:
        self.calls += 1
        self.by_worker[thread] = self.by_worker.get(thread, 0) + 1
        if self.calls in self._losses:
            thread.dead = True
            self.lost += 1
        return thread.send(function, *arguments)

    def result(self, ref: Any) -> Any:
        return pickle.loads(ref.result(timeout=120)) if isinstance(ref, Future) else ref

    def stop(self, target: Any) -> None:
        thread, key = target
        thread.send(lambda: thread.kept.pop(key, None))

    def mend(self) -> None:
        live = [thread for thread in self._threads if not thread.dead]
        new = min(self._spare, len(self._threads) - len(live))
        self._spare -= new
        self._threads = live + [_Thread(self._delay) for _ in range(new)]
        if not self._threads:
            raise ResourceError("no worker is left")
