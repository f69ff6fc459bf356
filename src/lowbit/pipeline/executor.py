"""Where the work of a quantization runs: the one seam between the pipeline and a cluster.

The pipeline hands pure functions and a few objects that live on workers to an :class:`Executor` and goes by references
to results. :class:`Here` runs everything at once in this process; a cluster's executor runs it elsewhere
(:mod:`lowbit.ops.ray_quantize`). Results do not depend on where, or in which order, they were computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from lowbit.errors import ResourceError

__all__ = ["Executor", "Here", "Ref", "WorkerLostError", "insist"]

_LOSSES = 8
"""Losses of workers in a row, without anything done between them, that are made up for."""

Ref: TypeAlias = Any
"""A result to come. As an argument of a call it stands for its value; as a part of one it does not."""


class WorkerLostError(Exception):
    """A worker went away with what it had: its objects are gone, and results that came from it may be."""


class Executor(Protocol):
    """Runs functions and keeps objects on ``workers`` workers.

    A function may change its arguments only where its caller does not look at them again: whether they are copies
    depends on the executor. References are freed when nobody has them any more.
    """

    @property
    def workers(self) -> int:
        """How many there are at the moment."""

    @property
    def apart(self) -> bool:
        """Whether workers share no memory with this process, so that what they get must be data."""

    def share(self, value: Any) -> Ref:
        """``value`` as an argument for many calls, sent to each worker once at most."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Ref:
        """What ``function``, of a module's top level, will return, on any worker."""

    def start(self, kind: type[Any], *arguments: Any) -> Any:
        """An object of class ``kind`` on a worker, for :meth:`call`."""

    def call(self, target: Any, method: str, *arguments: Any) -> Ref:
        """What the method of an object from :meth:`start` will return. Its calls run one by one in order."""

    def result(self, ref: Ref) -> Any:
        """The value; raises what the call raised, and :class:`WorkerLostError` when it will never come."""

    def stop(self, target: Any) -> None:
        """Let go of an object from :meth:`start`."""

    def mend(self) -> None:
        """Replace workers that were lost; raises :class:`lowbit.errors.ResourceError` when none is left."""


def insist(work: Callable[[], None], again: Callable[[], None]) -> None:
    """Call ``work``; whenever a worker is lost meanwhile, call ``again`` and then ``work`` once more.

    Raises :class:`ResourceError` after too many losses.
    """
    lost: WorkerLostError | None = None
    for _ in range(_LOSSES):
        try:
            if lost is not None:
                again()
            return work()
        except WorkerLostError as error:
            lost = error
    raise ResourceError(f"workers were lost {_LOSSES} times in a row ({lost}): mend the cluster, then --resume")


class Here:
    """In this process, each call before the next, references being the values themselves."""

    workers = 1
    apart = False

    def share(self, value: Any) -> Any:
        """The value itself."""
        return value

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What it returns."""
        return function(*arguments)

    def start(self, kind: type[Any], *arguments: Any) -> Any:
        """The object."""
        return kind(*arguments)

    def call(self, target: Any, method: str, *arguments: Any) -> Any:
        """What it returns."""
        return getattr(target, method)(*arguments)

    def result(self, ref: Any) -> Any:
        """The reference."""
        return ref

    def stop(self, target: Any) -> None:
        """Nothing to do."""

    def mend(self) -> None:
        """Nothing to do."""
