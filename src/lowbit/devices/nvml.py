"""GPUs as the driver's own library (NVML) tells them, for a torch without CUDA. No library: no GPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from lowbit.devices.gpu import Gpu

_LIBRARIES = ("libnvidia-ml.so.1", "nvml.dll")
_NAME_BYTES = 96


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def nvml_gpus(load: Callable[[str], Any] = ctypes.CDLL) -> tuple[Gpu, ...]:
    """Every GPU that the driver knows; empty where there is no driver. ``load`` opens a library by name."""
    library = None
    for name in _LIBRARIES:
        try:
            library = load(name)
            break
        except OSError:
            continue
    if library is None or library.nvmlInit_v2() != 0:
        return ()
    try:
        count = ctypes.c_uint()
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return ()
        found = [_describe(library, index) for index in range(count.value)]
        return tuple(gpu for gpu in found if gpu is not None)
    finally:
        library.nvmlShutdown()


def _describe(library: Any, index: int) -> Gpu | None:
    handle, memory = ctypes.c_void_p(), _Memory()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    major, minor = ctypes.c_int(), ctypes.c_int()
    failed = (
        library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))
        or library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        or library.nvmlDeviceGetName(handle, name, ctypes.c_uint(_NAME_BYTES))
        or library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    )
    if failed:
        return None
    text = name.value.decode("utf-8", errors="replace")
    return Gpu(text, (major.value, minor.value), int(memory.total), int(memory.free))
