"""Memory that engines may take on this machine, found without importing torch."""

from __future__ import annotations

from pathlib import Path

import psutil

__all__ = ["available_bytes", "oom_kills", "total_bytes"]

_GROUP = Path("sys/fs/cgroup")
_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that can still be taken, a container's limit respected; ``root`` stands in for ``/`` in tests.

    Pages of the file cache count as free: the kernel drops them before it kills.
    """
    available = psutil.virtual_memory().available
    for limit_file, usage_file, stat_file, cached in _FILES:
        limit, usage = _text(root / _GROUP / limit_file).strip(), _text(root / _GROUP / usage_file).strip()
        if limit.isdigit() and usage.isdigit():
            stat = dict(line.split(maxsplit=1) for line in _text(root / _GROUP / stat_file).splitlines() if " " in line)
            available = min(available, max(0, int(limit) - int(usage) + int(stat.get(cached, "0"))))
    return available


def total_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this machine, or the container, has; ``root`` stands in for ``/`` in tests."""
    limits = [_text(root / _GROUP / files[0]).strip() for files in _FILES]
    return min([psutil.virtual_memory().total, *(int(limit) for limit in limits if limit.isdigit())])


def oom_kills(root: Path = Path("/")) -> int:
    """Processes that the kernel has killed for want of memory: in this container, or on this machine since its start.

    ``root`` stands in for ``/`` in tests.
    """
    for name in ("sys/fs/cgroup/memory.events", "sys/fs/cgroup/memory/memory.oom_control", "proc/vmstat"):
        for line in _text(root / name).splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill" and value.strip().isdigit():
                return int(value)
    return 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
