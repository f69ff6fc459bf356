"""Quantizing on a Ray cluster: an :class:`lowbit.pipeline.executor.Executor` whose workers are Ray actors.

Results and what is shared go through Ray's object store by reference and are freed when nobody refers to them. Bits
depend on how a processor's libraries cut products up, so workers compute with as many threads as this process, and
must have its versions and its processor's instructions.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import torch

from lowbit import __version__
from lowbit.errors import LowbitError, ResourceError, UnsupportedError
from lowbit.ops.ray_cluster import connect
from lowbit.pipeline.executor import WorkerLostError
from lowbit.pipeline.transport import packed, unpacked

__all__ = ["RayExecutor", "Worker"]

_PATIENCE = 120.0
"""Seconds that the first worker, or any when all are lost, may take to come up."""


def facts() -> dict[str, str]:
    """What has to be the same everywhere for the same bits to come out."""
    return {
        "lowbit": __version__,
        "torch": str(torch.__version__),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def register_tensors() -> None:
    """Send tensors as :mod:`lowbit.pipeline.transport` packs them, from this process on."""
    import ray.util

    ray.util.register_serializer(torch.Tensor, serializer=packed, deserializer=unpacked)


class Worker:
    """One process of the cluster: it runs functions and keeps objects."""

    def __init__(self, threads: int) -> None:
        register_tensors()
        torch.set_num_threads(threads)
        self._kept: dict[int, Any] = {}

    def facts(self) -> dict[str, str]:
        """:func:`facts` here."""
        return facts()

    def place(self) -> tuple[str, int]:
        """Node and process, for operators and tests."""
        import ray

        return str(ray.get_runtime_context().get_node_id()), os.getpid()

    @torch.no_grad()
    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What ``function`` returns."""
        return function(*arguments)

    @torch.no_grad()
    def start(self, key: int, kind: type[Any], *arguments: Any) -> None:
        """Make the object ``key``."""
        self._kept[key] = kind(*arguments)

    @torch.no_grad()
    def call(self, key: int, method: str, *arguments: Any) -> Any:
        """What the object's method returns."""
        return getattr(self._kept[key], method)(*arguments)

    def stop(self, key: int) -> None:
        """Let the object go."""
        self._kept.pop(key, None)


class RayExecutor:
    """As many workers as the cluster has room for, up to ``most`` (None: all of it); to be used in a ``with``.

    Each takes as many processors as this process computes with threads. Raises
    :class:`UnsupportedError` without Ray and for workers that differ from this process, :class:`ResourceError` when no
    worker can start, and :class:`lowbit.errors.UsageError` where no cluster answers.
    """

    apart = True

    def __init__(self, address: str, *, most: int | None = None) -> None:
        connect(address)
        import ray

        register_tensors()
        self._ray = ray
        self.threads = torch.get_num_threads()
        self._numbers = itertools.count()
        self._live: list[Any] = []
        self._joining: dict[Any, Any] = {}
        try:
            self._begin_all(address, most)
        except LowbitError:
            self.__exit__()
            raise

    def _begin_all(self, address: str, most: int | None) -> None:
        room = self._room() if most is None else min(most, self._room())
        if room == 0:
            raise ResourceError(
                f"--ray {address}: no node has {self.threads} processors, as many as this process computes with: "
                "set OMP_NUM_THREADS to fewer (a run without --ray gives the same bytes with the same number)"
            )
        for _ in range(room):
            self._begin()
        self._admit(_PATIENCE)
        if not self._live:
            raise ResourceError(f"--ray {address}: no worker came up in {_PATIENCE:.0f} s: are its processors in use?")

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (*self._live, *self._joining.values()):
            self._ray.kill(worker)
        self._live, self._joining = [], {}
        self._ray.shutdown()

    def _room(self) -> int:
        """Workers that the nodes have processors for, whether or not they are in use."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return sum(int(resources.get("CPU", 0)) // self.threads for resources in nodes)

    def _begin(self) -> None:
        threads = str(self.threads)
        worker = (
            self._ray.remote(Worker)
            .options(
                num_cpus=self.threads,
                scheduling_strategy="SPREAD",
                runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}},
            )
            .remote(self.threads)
        )
        self._joining[worker.facts.remote()] = worker

    def _admit(self, patience: float) -> None:
        """Take in workers that have come up; wait up to ``patience`` seconds for one where there is none."""
        waiting = list(self._joining)
        if not waiting:
            return
        ready, _ = self._ray.wait(waiting, num_returns=1, timeout=0 if self._live else patience)
        # those that started together come up together
        ready, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=10 if ready and not self._live else 0)
        for ref in ready:
            worker = self._joining.pop(ref)
            try:
                _check_same(self.result(ref))
            except WorkerLostError:
                continue
            self._live.append(worker)

    # ---- the executor -----------------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        """How many are up."""
        self._admit(0)
        return len(self._live)

    def places(self) -> list[tuple[str, int]]:
        """Node and process of each worker."""
        return [self.result(worker.place.remote()) for worker in self._live]

    def share(self, value: Any) -> Any:
        """Put it into the object store."""
        return self._ray.put(value)

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """To the workers in turn."""
        return self._any().run.remote(function, *arguments)

    def start(self, kind: type[Any], *arguments: Any) -> Any:
        """On the workers in turn."""
        worker, key = self._any(), next(self._numbers)
        worker.start.remote(key, kind, *arguments)
        return worker, key

    def _any(self) -> Any:
        if not self._live:
            raise WorkerLostError("no worker is left")
        self._live.append(self._live.pop(0))
        return self._live[-1]

    def call(self, target: Any, method: str, *arguments: Any) -> Any:
        """On the worker that has the object."""
        worker, key = target
        return worker.call.remote(key, method, *arguments)

    def result(self, ref: Any) -> Any:
        """Fetch it."""
        from ray import exceptions

        if not isinstance(ref, self._ray.ObjectRef):
            return ref
        lost = (
            exceptions.RayActorError,
            exceptions.ObjectLostError,
            exceptions.OutOfMemoryError,
            exceptions.WorkerCrashedError,
            exceptions.NodeDiedError,
        )
        try:
            return self._ray.get(ref)
        except lost as error:
            raise WorkerLostError(_first_line(error)) from error
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, lost):
                raise WorkerLostError(_first_line(error.cause)) from error
            if isinstance(error.cause, LowbitError):
                raise error.cause from error
            raise

    def stop(self, target: Any) -> None:
        """Let the worker forget it."""
        worker, key = target
        worker.stop.remote(key)

    def mend(self) -> None:
        """Begin a worker for each that was lost, and go on with those that are there."""
        lost = []
        for worker in self._live:
            try:
                self.result(worker.facts.remote())
            except WorkerLostError:
                lost.append(worker)
        self._live = [worker for worker in self._live if worker not in lost]
        for _ in lost:
            self._begin()
        self._admit(_PATIENCE)
        if not self._live:
            raise ResourceError("--ray: every worker was lost and none came up: mend the cluster, then --resume")


def _check_same(there: dict[str, str]) -> None:
    for name, here in facts().items():
        if there[name] != here:
            raise UnsupportedError(
                f"--ray: {name} is {there[name]} on a worker and {here} here",
                ["results would differ: install the same versions on machines of one kind"],
            )


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
