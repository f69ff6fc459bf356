"""GPUs through the driver's library, and memory nodes, on made-up machines."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from lowbit.devices.nvml import nvml_gpus
from lowbit.planning import NumaNode
from lowbit.planning.hardware import numa_nodes


class Driver:
    """NVML with two GPUs, of which the second does not answer."""

    def __init__(self, starts: int = 0) -> None:
        self.starts = starts
        self.closed = False

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return self.starts

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.closed = True
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, handle: Any) -> int:  # noqa: N802
        handle._obj.value = 7
        return 0 if index.value == 0 else 15

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:  # noqa: N802
        memory._obj.total, memory._obj.free = 24 << 30, 20 << 30
        return 0

    def nvmlDeviceGetName(self, handle: Any, name: Any, size: ctypes.c_uint) -> int:  # noqa: N802
        name.value = b"Some GPU"
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:  # noqa: N802
        major._obj.value, minor._obj.value = 8, 9
        return 0


def test_gpus_that_answer_are_told() -> None:
    driver = Driver()
    (gpu,) = nvml_gpus(lambda name: driver)
    assert (gpu.name, gpu.capability, gpu.memory, gpu.free) == ("Some GPU", (8, 9), 24 << 30, 20 << 30)
    assert driver.closed


def test_no_driver_no_gpus() -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    assert nvml_gpus(missing) == ()
    assert nvml_gpus(lambda name: Driver(starts=999)) == ()


def test_memory_nodes(tmp_path: Path) -> None:
    for number, cpus in ((1, "16-31,48-63\n"), (0, "0-15\n")):
        node = tmp_path / f"sys/devices/system/node/node{number}"
        node.mkdir(parents=True)
        (node / "cpulist").write_text(cpus)
        (node / "meminfo").write_text(f"Node {number} MemTotal:       1048576 kB\nNode {number} MemFree: 1 kB\n")
    assert numa_nodes(tmp_path) == (NumaNode(0, 16, 1 << 30), NumaNode(1, 32, 1 << 30))
    assert numa_nodes(tmp_path / "absent") == ()
