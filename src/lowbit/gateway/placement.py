"""The GPUs that engines may fill, and which of them each tier gets: decided once, before anything is loaded.

A tier keeps its GPUs for as long as the gateway runs. Several tiers may share a GPU; the policy sees to it that those
that are loaded fit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lowbit.devices.gpu import Gpu
from lowbit.devices.nvml import nvml_gpus
from lowbit.errors import UsageError
from lowbit.gateway.config import ServeConfig, TierConfig

__all__ = ["GPU_SHARE", "Device", "Wanted", "find_devices", "place", "split_over", "variables"]

GPU_SHARE = 0.9
"""Of what is free on a GPU, where the configuration does not say ``gpu_memory``."""

_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU: what CUDA_VISIBLE_DEVICES calls it, its bytes in all (0: not known), and those that tiers may take."""

    visible: str
    name: str
    memory: int
    budget: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a tier wants: ``count`` GPUs with ``bytes`` on each; ``chosen`` by number in the configuration, or None."""

    count: int
    bytes: int
    chosen: tuple[int, ...] | None = None
    pinned: bool = False


def find_devices(
    config: ServeConfig,
    gpus: Callable[[], Sequence[Gpu]] = nvml_gpus,
    environment: Mapping[str, str] = os.environ,
) -> tuple[Device, ...]:
    """The GPUs that this process may use, with the budget of each: ``gpu_memory``, or 90 % of what is free.

    Where the driver tells of none but ``gpu_memory`` names sizes, those are believed. Raises :class:`UsageError` for
    another number of sizes than there are GPUs.
    """
    sizes = config.gpu_memory
    found = _visible(tuple(gpus()), environment.get(_VISIBLE))
    if not found:
        return tuple(Device(str(number), "GPU", 0, size) for number, size in enumerate(sizes or ()) if size)
    if sizes is None:
        return tuple(Device(name, gpu.name, gpu.memory, int(GPU_SHARE * gpu.free)) for name, gpu in found)
    if len(sizes) not in (1, len(found)):
        raise UsageError(f"gpu_memory has {len(sizes)} sizes for {len(found)} GPUs: give one for all, or one for each")
    each = sizes * len(found) if len(sizes) == 1 else sizes
    return tuple(Device(name, gpu.name, gpu.memory, size) for (name, gpu), size in zip(found, each, strict=True))


def _visible(gpus: Sequence[Gpu], mask: str | None) -> list[tuple[str, Gpu]]:
    """GPUs under the names that CUDA takes; of one named by its UUID the smallest there is is assumed."""
    if mask is None or not gpus:
        return [(str(number), gpu) for number, gpu in enumerate(gpus)]
    found = []
    for name in filter(None, (part.strip() for part in mask.split(","))):
        if name.isdigit() and int(name) >= len(gpus):
            break  # as CUDA does
        found.append((name, gpus[int(name)] if name.isdigit() else min(gpus, key=lambda gpu: gpu.free)))
    return found


def split_over(tier: TierConfig) -> int:
    """GPUs of this machine that the configuration splits a tier over."""
    return (tier.flags.tensor_parallel or 1) * (tier.flags.pipeline_parallel or 1) // max(1, len(tier.nodes))


def place(wanted: Mapping[str, Wanted], devices: Sequence[Device]) -> dict[str, tuple[int, ...]]:
    """The GPUs of each tier by number: those chosen, else those with the most left; pinned tiers first, then in order.

    Raises :class:`UsageError` for GPUs that are not there.
    """
    left = [device.budget for device in devices]
    homes: dict[str, tuple[int, ...]] = {}
    for tier_id, want in sorted(wanted.items(), key=lambda item: (item[1].chosen is None, not item[1].pinned)):
        if want.count > len(devices) or any(number >= len(devices) for number in want.chosen or ()):
            asked = f"GPU {max(want.chosen)}" if want.chosen else f"{want.count} GPUs"
            raise UsageError(f"{tier_id}: wants {asked}, and there are {len(devices)} here")
        home = want.chosen or tuple(sorted(sorted(range(len(left)), key=lambda n: (-left[n], n))[: want.count]))
        for number in home:
            left[number] -= want.bytes
        homes[tier_id] = home
    return homes


def variables(home: Sequence[int], devices: Sequence[Device]) -> dict[str, str]:
    """Environment variables that show an engine its GPUs only, counted as the driver counts them."""
    if not devices:
        return {}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", _VISIBLE: ",".join(devices[number].visible for number in home)}
