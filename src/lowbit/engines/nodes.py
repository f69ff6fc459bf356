"""One vLLM over several machines: the command of each, as vLLM 0.32 takes it without Ray.

Every node runs the same command with its own ``--node-rank``; the first listens, the others run ``--headless`` and
come up with it. Facts: ``vllm/config/parallel.py`` and ``vllm/entrypoints/cli/serve.py`` of 0.32.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowbit.errors import UsageError

__all__ = ["MASTER_PORT", "NodeCommand", "check_nodes", "from_first", "node_commands"]

MASTER_PORT = 29501
"""Where the first node waits for the others, vLLM's own default."""


@dataclass(frozen=True, slots=True)
class NodeCommand:
    """What node ``rank`` at the address ``node`` runs."""

    node: str
    rank: int
    command: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        """Variables beside the engine's own: the address that it gives to the others."""
        return {"VLLM_HOST_IP": self.node}


def check_nodes(nodes: Sequence[str], tensor: int, pipeline: int) -> list[str]:
    """Reasons why ``tensor`` x ``pipeline`` GPUs cannot be spread over ``nodes``."""
    gpus, count = tensor * pipeline, len(nodes)
    reasons = []
    if len(set(nodes)) < count:
        reasons.append("nodes names one twice")
    if gpus % count:
        reasons.append(f"{count} nodes cannot share {gpus} GPUs (tensor_parallel x pipeline_parallel) evenly")
    elif gpus < count:
        reasons.append(f"{count} nodes need at least {count} GPUs: raise pipeline_parallel or tensor_parallel")
    return reasons


def node_commands(command: Sequence[str], nodes: Sequence[str], port: int = MASTER_PORT) -> list[NodeCommand]:
    """The command of each of ``nodes`` (addresses, the first is the master), from that of a single machine.

    Raises :class:`UsageError` for a command that says itself where it runs.
    """
    own = ("--nnodes", "-n", "--node-rank", "-r", "--master-addr", "--master-port", "--headless")
    for flag in own:
        if any(part == flag or part.startswith(f"{flag}=") for part in command):
            raise UsageError(f"nodes and {flag} in flags.extra both say where vLLM runs: leave {flag} out")
    found = []
    for rank, node in enumerate(nodes):
        place = ("--nnodes", str(len(nodes)), "--node-rank", str(rank), "--master-addr", nodes[0])
        rest = ("--master-port", str(port), *(() if rank == 0 else ("--headless",)))
        found.append(NodeCommand(node, rank, (*command, *place, *rest)))
    return found


def from_first(command: Sequence[str], nodes: Sequence[str]) -> list[NodeCommand]:
    """The commands of all ``nodes`` from that of the first, as :func:`node_commands` made it."""
    place = list(command).index("--nnodes")
    port = command[list(command).index("--master-port", place) + 1]
    return node_commands(command[:place], nodes, int(port))
