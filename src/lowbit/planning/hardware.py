"""What the machine has: processors, number formats they compute in, memory, disk, and a measured GEMM rate."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from lowbit.devices.gpu import Gpu
from lowbit.devices.nvml import nvml_gpus

_UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True)
class NumaNode:
    """A memory node of the machine: its number, the processors beside it, its memory in bytes."""

    number: int
    cpus: int
    memory: int


@dataclass(frozen=True, slots=True)
class Hardware:
    """One machine. Bytes are ints; ``cpus`` counts those that this process may use.

    ``memory`` respects a container's limit; ``available`` is what can still be taken. ``bf16`` means native bf16
    arithmetic: without it torch's bf16 products are many times slower than float32.
    """

    cpus: float
    cpu_name: str
    avx2: bool
    avx512: bool
    bf16: bool
    memory: int
    available: int
    gpus: tuple[Gpu, ...] = ()
    numa: tuple[NumaNode, ...] = ()


def probe(root: Path = Path("/")) -> Hardware:
    """Look at this machine; ``root`` stands in for ``/`` in tests. What cannot be read is taken as absent."""
    text = _read(root / "proc/cpuinfo")
    flags = cpu_flags(text)
    limit, used = memory_limit(root)
    memory = psutil.virtual_memory()
    return Hardware(
        cpus=_usable_cpus(root),
        cpu_name=_cpu_name(text),
        avx2="avx2" in flags or "asimd" in flags,
        avx512="avx512f" in flags,
        bf16=bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
        memory=min(memory.total, limit),
        available=max(0, min(memory.available, limit - used)),
        gpus=_gpus(),
        numa=numa_nodes(root),
    )


def free_disk(path: Path) -> int:
    """Free bytes where ``path`` is or, while it does not exist, where it will be."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def measure_gemm(size: int = 1024, seconds: float = 0.25, device: str = "cpu") -> float:
    """Float32 matrix products on this machine in FLOP/s: the best of what fits into ``seconds``."""
    a = torch.ones(size, size, device=device)
    out = torch.empty_like(a)
    best, end = float("inf"), time.perf_counter() + seconds
    torch.mm(a, a, out=out)
    while True:
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        _wait(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return 2.0 * size**3 / best


def peak_memory(root: Path = Path("/")) -> int:
    """The most resident bytes that this process has had.

    ``getrusage`` also counts what the process was forked from, so where there is a ``/proc`` that is asked.
    """
    for line in _read(root / "proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def reset_peak_memory() -> bool:
    """Let :func:`peak_memory` count from now on; False where the system cannot (it has no Linux ``/proc``)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    """Feature flags in the text of ``/proc/cpuinfo``, of x86 (``flags``) or Arm (``Features``)."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def memory_limit(root: Path) -> tuple[int, int]:
    """``(limit, in use)`` in bytes of this process's control group, version 2 or 1; a huge limit when there is none.

    Pages of the file cache count as free: the kernel drops them before it kills.
    """
    for limit_file, usage_file, stat_file, cache_key in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        group = root / "sys/fs/cgroup"
        limit = _read(group / limit_file).strip()
        if not limit.isdigit():
            continue
        used = _read(group / usage_file).strip()
        stat = dict(line.split(maxsplit=1) for line in _read(group / stat_file).splitlines() if " " in line)
        in_use = (int(used) if used.isdigit() else 0) - int(stat.get(cache_key, "0"))
        return min(int(limit), _UNLIMITED), max(0, in_use)
    return _UNLIMITED, 0


def numa_nodes(root: Path = Path("/")) -> tuple[NumaNode, ...]:
    """The memory nodes in ``/sys``, by number; empty where the system does not tell."""
    found = []
    for path in (root / "sys/devices/system/node").glob("node[0-9]*"):
        total = next((line for line in _read(path / "meminfo").splitlines() if "MemTotal:" in line), "")
        kilobytes = [word for word in total.split() if word.isdigit()][1:]
        memory = int(kilobytes[0]) * 1024 if kilobytes else 0
        found.append(NumaNode(int(path.name[4:]), _count_cpus(_read(path / "cpulist")), memory))
    return tuple(sorted(found, key=lambda node: node.number))


def _count_cpus(text: str) -> int:
    """Processors in a list such as ``0-15,32-47``."""
    count = 0
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            count += int(last) - int(first) + 1 if last.isdigit() else 1
    return count


def _usable_cpus(root: Path) -> float:
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota = _read(root / "sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and int(quota[1]) > 0:
        count = min(count, int(quota[0]) / int(quota[1]))
    return count


def _cpu_name(cpuinfo: str) -> str:
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return nvml_gpus()
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Gpu(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), total, free))
    return tuple(found)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
