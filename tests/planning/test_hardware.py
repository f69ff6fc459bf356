"""The hardware probe, on made-up machines and on this one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowbit.planning import free_disk, measure_gemm, peak_memory, probe
from lowbit.planning.hardware import cpu_flags, memory_limit

XEON = "processor\t: 0\nmodel name\t: Some Xeon\nflags\t\t: fpu avx2 avx512f avx512_bf16\n\nprocessor\t: 1\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16\n"


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_flags() -> None:
    assert cpu_flags(XEON) >= {"avx2", "avx512f"}
    assert cpu_flags(ARM) == {"fp", "asimd", "bf16"}
    assert cpu_flags("") == frozenset()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (1 << 60, 0)),
        ({"sys/fs/cgroup/memory.max": "max\n"}, (1 << 60, 0)),
        (
            {
                "sys/fs/cgroup/memory.max": "1000\n",
                "sys/fs/cgroup/memory.current": "700\n",
                "sys/fs/cgroup/memory.stat": "anon 400\ninactive_file 250\n",
            },
            (1000, 450),
        ),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "300",
            },
            (2000, 300),
        ),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": str((1 << 63) - 4096)}, (1 << 60, 0)),
    ],
)
def test_memory_limits(tmp_path: Path, files: dict[str, str], expected: tuple[int, int]) -> None:
    assert memory_limit(machine(tmp_path, files)) == expected


def test_a_container(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/cpuinfo": XEON,
            "sys/fs/cgroup/cpu.max": "50000 100000",
            "sys/fs/cgroup/memory.max": "100000000",
            "sys/fs/cgroup/memory.current": "40000000",
        },
    )
    found = probe(root)
    assert (found.cpus, found.cpu_name) == (0.5, "Some Xeon")
    assert found.avx2
    assert found.avx512
    assert found.bf16
    assert found.memory == 100_000_000
    assert found.available <= 60_000_000


def test_this_machine(tmp_path: Path) -> None:
    found = probe()
    assert found.cpus > 0
    assert 0 < found.available <= found.memory
    assert bool(found.gpus) == torch.cuda.is_available()
    assert free_disk(tmp_path / "not" / "there" / "yet") > 0
    assert measure_gemm(64, seconds=0.0) > 0


def test_peak_memory_is_of_this_process_alone(tmp_path: Path) -> None:
    """A child of a large process does not report its parent's memory."""
    code = "from lowbit.planning import peak_memory; print(peak_memory())"
    ballast = bytearray(1 << 30)
    ballast[::4096] = b"1" * len(ballast[::4096])
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 10 << 20 < child < 1 << 30
    assert peak_memory() > 1 << 30
    assert peak_memory(tmp_path) > 1 << 30  # without /proc
