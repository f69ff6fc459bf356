"""Whether several machines can run one engine together: facts of each, gathered there, and what is wrong with them.

The judgement is a function of the facts alone. They are gathered by :func:`gather` on a machine, and on every node of a
Ray cluster by :func:`gather_on_ray`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowbit.devices.nvml import nvml_gpus
from lowbit.errors import UsageError
from lowbit.gateway.config import ServeConfig
from lowbit.ops.ray_cluster import connect
from lowbit.planning.serving import shared_memory

__all__ = ["Finding", "NodeFacts", "gather", "gather_on_ray", "preflight", "preflight_tiers", "report"]

_VERSIONS = (
    "import importlib.metadata as m\n"
    "for name in ('vllm', 'torch'):\n"
    "    try: print(name, m.version(name))\n"
    "    except m.PackageNotFoundError: pass\n"
    "try:\n"
    "    import torch\n"
    "    print('nccl', '.'.join(map(str, torch.cuda.nccl.version())))\n"
    "except Exception: pass\n"
)
_TIMEOUT = 3.0


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One machine. ``versions`` are those of vllm, torch, nccl and python that are there.

    ``gpus`` are the names of its GPUs, ``gpu_memory`` the bytes of the smallest; ``shm`` bytes of ``/dev/shm`` free;
    ``reaches`` whether the master's port could be reached, or bound on the master (None: not tried).
    """

    node: str
    versions: dict[str, str]
    gpus: tuple[str, ...] = ()
    gpu_memory: int = 0
    shm: int = 0
    reaches: bool | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a node (all of them: an empty name) and what mends it."""

    level: Literal["error", "warning"]
    node: str
    message: str

    def __str__(self) -> str:
        where = f"{self.node}: " if self.node else ""
        return f"{self.level}: {where}{self.message}"


def preflight(nodes: Sequence[NodeFacts], gpus: int, *, wanted: int | None = None) -> list[Finding]:
    """What keeps ``nodes`` (``wanted`` of them, None: as many as there are) from running ``gpus`` GPUs of one engine.

    Errors first; none means that nothing is known to be in the way.
    """
    count = wanted or len(nodes)
    found: list[Finding] = []
    if len(nodes) < count:
        found.append(Finding("error", "", f"{count} nodes are needed, and {len(nodes)} answered: start the others"))
    each = -(-gpus // count)
    if nodes and not any(node.gpus for node in nodes):
        names = ", ".join(node.node for node in nodes)
        found.append(Finding("error", "", f"no GPU on any node ({names}): an engine over several nodes needs NVIDIA's"))
    else:
        for node in nodes:
            if len(node.gpus) < each:
                has = f"{len(node.gpus)} GPUs of the {each} that each node needs"
                found.append(Finding("error", node.node, f"{has}: lower tensor_parallel or add nodes"))
        found += _unlike(nodes, "GPU", lambda node: ", ".join(sorted(set(node.gpus))) or "none")
    for name in ("vllm", "torch", "nccl", "python"):
        strict = name != "python"
        found += _unlike(nodes, name, lambda node, name=name: node.versions.get(name, "not installed"), strict=strict)  # type: ignore[misc]
    for node in nodes:
        if "vllm" not in node.versions:
            found.append(Finding("error", node.node, "vllm is not installed: pip install vllm, the same everywhere"))
        elif "nccl" not in node.versions and node.gpus:
            found.append(Finding("error", node.node, "torch there has no NCCL: install torch's CUDA build"))
        need = shared_memory(each)
        if node.shm < need:
            size = f"/dev/shm has {node.shm >> 20} MiB free, {need >> 20} MiB are needed"
            found.append(Finding("error", node.node, f"{size}: mount it larger, or --shm-size of a container"))
        if node.reaches is False:
            found.append(
                Finding("error", node.node, "the master's port cannot be reached: open it, or name another address")
            )
    if len(nodes) > 1 and any(node.reaches is None for node in nodes):
        found.append(Finding("warning", "", "the master's port was not tried from every node"))
    return sorted(found, key=lambda finding: finding.level != "error")


def _unlike(
    nodes: Sequence[NodeFacts], what: str, value: Callable[[NodeFacts], str], *, strict: bool = True
) -> list[Finding]:
    """One finding that names every node with another value than most have."""
    values = Counter(value(node) for node in nodes)
    if len(values) < 2:
        return []
    usual = values.most_common(1)[0][0]
    others = ", ".join(f"{node.node} has {value(node)}" for node in nodes if value(node) != usual)
    message = f"{what} differs: {others}, the others {usual}: it has to be the same everywhere"
    return [Finding("error" if strict else "warning", "", message)]


def report(nodes: Sequence[NodeFacts], findings: Sequence[Finding]) -> list[str]:
    """A line for each node and each finding."""
    lines = []
    for node in nodes:
        gpus = ", ".join(f"{count} x {name}" for name, count in Counter(node.gpus).items()) or "no GPU"
        versions = " ".join(f"{name} {version}" for name, version in node.versions.items())
        lines.append(f"{node.node}: {gpus}, {node.shm >> 20} MiB of /dev/shm, {versions}")
    return [*lines, *map(str, findings)]


def preflight_tiers(config: ServeConfig, address: str | None) -> tuple[list[str], bool]:
    """What to print of the preflight of every tier that needs several GPUs, and whether all of them passed.

    The nodes of the Ray cluster at ``address`` are asked; without one, this machine alone. Raises :class:`UsageError`
    where no tier needs several GPUs, and what :func:`gather_on_ray` raises.
    """
    lines: list[str] = []
    passed = True
    for name, model in config.models.items():
        for tier in model.tiers:
            gpus = (tier.flags.tensor_parallel or 1) * (tier.flags.pipeline_parallel or 1)
            if gpus == 1:
                continue
            if address is not None:
                nodes = gather_on_ray(address, tier.python)
                nodes = [node for node in nodes if node.gpus] or nodes  # a head may have none
                wanted = len(tier.nodes) or tier.flags.pipeline_parallel or 1
            else:
                nodes, wanted = [gather(socket.gethostname(), tier.python)], 1
                gpus //= max(1, len(tier.nodes))
            found = preflight(nodes, gpus, wanted=wanted)
            lines += [f"# {name}@{tier.name}", *report(nodes, found)]
            if address is None and tier.nodes:
                lines.append("note: this machine only: run the same on each of the others, or on a cluster with --ray")
            passed &= not any(finding.level == "error" for finding in found)
    if not lines:
        raise UsageError("--preflight: no tier has tensor_parallel or pipeline_parallel, so one machine will do")
    return lines, passed


# ---- gathering --------------------------------------------------------------------------------------------------


def gather(name: str, python: str | None = None, master: tuple[str, int] | None = None) -> NodeFacts:
    """The facts of this machine, called ``name``; ``python`` is the interpreter that has the engine.

    ``master`` is where the others will find the first node: tried by connecting to it.
    """
    interpreter = python or sys.executable
    try:
        shown = subprocess.run([interpreter, "-c", _VERSIONS], capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(
            f"{name}: {interpreter} does not run ({error}): name the environment's own (python)"
        ) from error
    versions = dict(line.split() for line in shown.stdout.splitlines())
    versions["python"] = ".".join(map(str, sys.version_info[:2]))
    gpus = nvml_gpus()
    try:
        room = os.statvfs("/dev/shm")
        shm = room.f_bavail * room.f_frsize
    except OSError:
        shm = 0
    return NodeFacts(
        name,
        versions,
        tuple(gpu.name for gpu in gpus),
        min((gpu.memory for gpu in gpus), default=0),
        shm,
        None if master is None else _reaches(*master),
    )


def _reaches(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=_TIMEOUT):
            return True
    except OSError:
        return False


def gather_on_ray(address: str, python: str | None = None, port: int = 0) -> list[NodeFacts]:
    """The facts of every node of the cluster at ``address``; a listener on its head stands in for the master.

    ``port`` is the one that the master will have (0: any). Raises as :func:`lowbit.ops.ray_cluster.connect` does.
    """
    connect(address)
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def there(node: str) -> Any:
        return NodeAffinitySchedulingStrategy(node, soft=False)

    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        nodes.sort(key=lambda node: ("node:__internal_head__" not in node["Resources"], node["NodeManagerAddress"]))
        head = nodes[0]
        listener = ray.remote(_Listener).options(num_cpus=0, scheduling_strategy=there(head["NodeID"])).remote(port)
        where = (head["NodeManagerAddress"], ray.get(listener.port.remote()))
        task = ray.remote(gather)
        asked = [
            task.options(num_cpus=0, scheduling_strategy=there(node["NodeID"])).remote(
                f"{node['NodeManagerAddress']}/{node['NodeID'][:6]}", python, where
            )
            for node in nodes
        ]
        found: list[NodeFacts] = ray.get(asked)
        ray.kill(listener)
    finally:
        ray.shutdown()
    return found


class _Listener:
    """Listens in the master's place."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_server(("", port))

    def port(self) -> int:
        """The port that it has."""
        return int(self._socket.getsockname()[1])
