"""Runs one engine so that nothing of it outlives its gateway: ``python -I guard.py FD NICE COMMAND …``.

The gateway holds the other end of the socket ``FD``. The guard reports the engine's process id there; when the socket
closes, however the gateway died, it kills the engine's process group. When the engine ends, it kills what is left of
the group (workers, compilers) and ends with the same status. It is a file of its own, with nothing but the standard
library, so that it starts in milliseconds and forks without threads.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import sys

_SET_PARENT_DEATH_SIGNAL = 1
_SET_CHILD_SUBREAPER = 36
_NOT_FOUND = 127


def process_control(option: int, value: int) -> None:
    """Linux's ``prctl``; elsewhere nothing, the socket alone does it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def start(command: list[str], nice: int) -> int:
    """Fork and run ``command`` as the leader of a process group that dies with this process."""
    guard = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if nice:
            os.nice(nice)
        process_control(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() == guard:
            os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
    os._exit(_NOT_FOUND)


def kill_group(pid: int) -> None:
    """SIGKILL everything in the engine's process group."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def main(arguments: list[str]) -> int:
    """Guard one engine and return its exit status (128 + signal for one that was killed)."""
    gateway = socket.socket(fileno=int(arguments[0]))
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(write_end)
    process_control(_SET_CHILD_SUBREAPER, 1)
    pid = start(arguments[2:], int(arguments[1]))
    gateway.sendall(f"{pid}\n".encode())
    while True:
        ready, _, _ = select.select([gateway.fileno(), read_end], [], [])
        if read_end in ready:
            os.read(read_end, 512)
            done, status = reap(pid)
            if done:
                kill_group(pid)
                return status
        if gateway.fileno() in ready:
            kill_group(pid)
            return _NOT_FOUND


def reap(engine: int) -> tuple[bool, int]:
    """Collect every child that has ended; whether the engine is among them, and its status."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False, 0
        if pid == 0:
            return False, 0
        if pid == engine:
            return True, os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
