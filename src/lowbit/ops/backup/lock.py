"""Locks in a place of backups: any number of backups at once, or one prune and nothing else.

There is no atomic "create unless there" in every store, so a lock is two steps: write one's own, then list all; whoever
sees a conflicting one takes its own back. Two that begin together both see each other, and both give way: safe, if not
greedy. A lock names its owner and expires; the owner of one renews it as the work goes on. An owner on this machine
that no longer runs has lost its lock at once.
"""

from __future__ import annotations

import getpass
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import psutil

from lowbit.checkpoint.files import parse_json_object
from lowbit.errors import CheckpointError, ResourceError, UsageError
from lowbit.ops.backup.store import Store

__all__ = ["EXPIRY", "Lock", "locked"]

Kind: TypeAlias = Literal["backup", "prune"]

EXPIRY = 1800.0
"""Seconds after its last renewal at which a lock no longer counts; clocks may differ by less than that."""
RENEWAL = 60.0


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a lock: for people to read, and to find out whether that process still runs."""

    kind: Kind
    user: str
    host: str
    machine: str
    pid: int
    started: float
    renewed: float

    def ended(self) -> bool:
        """Whether the process was on this machine and is no more."""
        if self.machine != _machine():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > 1
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


class Lock:
    """A lock that is held. :meth:`renew` often, and before anything that relies on it."""

    def __init__(self, store: Store, kind: Kind, clock: Callable[[], float]) -> None:
        self.name = f"locks/{secrets.token_hex(16)}.json"
        self._store, self._kind, self._clock = store, kind, clock
        self._renewed = clock()

    def renew(self, *, now: bool = False) -> None:
        """Renew it if that was a minute ago, or ``now``. Raises :class:`ResourceError` if it has been lost."""
        age = self._clock() - self._renewed
        if age < RENEWAL and not now:
            return
        if age > EXPIRY / 2 or not self._is_there():
            raise ResourceError(
                f"{self._store.shown}: this run was held up for {age:.0f} s and lost its lock: run it again, it goes on"
            )
        self.write()

    def write(self) -> None:
        """Put it there, as of now."""
        self._renewed = self._clock()
        process = psutil.Process()
        owner = Owner(
            self._kind, getpass.getuser() if "HOME" in os.environ else str(os.getuid()), socket.gethostname(),
            _machine(), process.pid, process.create_time(), self._renewed,
        )  # fmt: skip
        self._store.write(self.name, json.dumps(asdict(owner)).encode())

    def release(self) -> None:
        """Take it away."""
        self._store.delete(self.name)

    def conflicts(self) -> Iterator[tuple[str, Owner]]:
        """Locks of others that exclude this one; those that no longer count are removed."""
        for name, _ in self._store.find("locks"):
            path = f"locks/{name}"
            if path == self.name or not name.endswith(".json"):
                continue
            try:
                owner = _parse(self._store.read(path), f"{self._store.shown}/{path}")
            except FileNotFoundError:
                continue
            if owner.ended() or self._clock() - owner.renewed > EXPIRY:
                self._store.delete(path)
            elif "prune" in (owner.kind, self._kind):
                yield path, owner

    def _is_there(self) -> bool:
        try:
            self._store.read(self.name)
        except FileNotFoundError:
            return False
        return True


@contextmanager
def locked(store: Store, kind: Kind, clock: Callable[[], float] = time.time) -> Iterator[Lock]:
    """Hold a lock. Raises :class:`UsageError` naming the owner of one that excludes it."""
    lock = Lock(store, kind, clock)
    lock.write()
    try:
        for path, owner in lock.conflicts():
            left = max(0.0, EXPIRY - (clock() - owner.renewed)) / 60
            raise UsageError(
                f"{store.shown}: a {owner.kind} by {owner.user}@{owner.host} (process {owner.pid}) is at work: wait "
                f"for it; if it is dead, its lock ({path}) expires in {left:.0f} min"
            )
        yield lock
    finally:
        lock.release()


def _machine() -> str:
    """This machine since its start, and this container: where a process id means something."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()}/{psutil.boot_time():.0f}"


def _parse(data: bytes, where: str) -> Owner:
    value = parse_json_object(data, where)
    try:
        owner = Owner(**value)
        known = owner.kind in ("backup", "prune") and isinstance(owner.pid, int) and isinstance(owner.machine, str)
        if known and isinstance(owner.started, float) and isinstance(owner.renewed, float):
            return owner
    except TypeError:
        pass
    raise CheckpointError(f"{where}: is no lock that this lowbit understands; delete it if no lowbit is at work there")
