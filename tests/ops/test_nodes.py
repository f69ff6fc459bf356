"""One engine over several machines: each node's command, and the preflight over fabricated facts."""

from __future__ import annotations

import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lowbit.engines.nodes import check_nodes, node_commands
from lowbit.errors import UsageError
from lowbit.ops.node_preflight import NodeFacts, gather, preflight, report

BASE = ("vllm", "serve", "/models/m", "--tensor-parallel-size", "8", "--pipeline-parallel-size", "2")
NODE = NodeFacts(
    "a",
    {"vllm": "0.32.0", "torch": "2.13.0", "nccl": "2.27.7", "python": "3.12"},
    ("H100",) * 8,
    80 << 30,
    64 << 30,
    True,
)
GOOD = [NODE, replace(NODE, node="b")]


def test_each_node_has_its_rank_and_all_but_the_first_are_headless() -> None:
    first, second = node_commands(BASE, ["10.0.0.1", "10.0.0.2"], 29600)
    shared = ["--nnodes", "2", "--master-addr", "10.0.0.1", "--master-port", "29600"]
    for rank, each in enumerate((first, second)):
        assert each.command[: len(BASE)] == BASE
        rest = list(each.command[len(BASE) :])
        assert rest[rest.index("--node-rank") + 1] == str(rank)
        assert all(part in rest for part in shared)
        assert ("--headless" in rest) is (rank > 0)
        assert each.environment == {"VLLM_HOST_IP": f"10.0.0.{rank + 1}"}


@pytest.mark.parametrize("flag", ["--nnodes", "--node-rank=1", "-r", "--headless"])
def test_a_command_that_says_where_it_runs_is_refused(flag: str) -> None:
    with pytest.raises(UsageError, match=r"flags\.extra"):
        node_commands((*BASE, flag), ["a", "b"])


@pytest.mark.parametrize(
    ("nodes", "tensor", "pipeline", "reason"),
    [
        (["a", "b"], 8, 2, None),
        (["a", "b"], 2, 1, None),
        (["a", "b", "c"], 8, 2, "evenly"),
        (["a", "a"], 8, 2, "twice"),
        (["a", "b"], 1, 1, "evenly"),
    ],
)
def test_gpus_are_shared_evenly(nodes: list[str], tensor: int, pipeline: int, reason: str | None) -> None:
    reasons = check_nodes(nodes, tensor, pipeline)
    assert bool(reasons) is (reason is not None)
    assert reason is None or reason in reasons[0]


def test_two_nodes_alike_have_nothing_in_the_way() -> None:
    assert preflight(GOOD, 16) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpus": ("H200",) * 8}, "GPU differs: b has H200"),
        ({"gpus": ("H100",) * 4}, "b: 4 GPUs of the 8"),
        ({"versions": {**NODE.versions, "vllm": "0.31.0"}}, "vllm differs: b has 0.31.0, the others 0.32.0"),
        ({"versions": {**NODE.versions, "nccl": "2.26.2"}}, "nccl differs"),
        ({"versions": {**NODE.versions, "torch": "2.12.0"}}, "torch differs"),
        ({"versions": {"torch": "2.13.0", "nccl": "2.27.7"}}, "b: vllm is not installed"),
        ({"shm": 64 << 20}, "b: /dev/shm has 64 MiB free"),
        ({"reaches": False}, "b: the master's port cannot be reached"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else None,
)
def test_what_is_wrong_with_one_node_is_said(change: dict[str, object], words: str) -> None:
    nodes = [NODE, replace(NODE, node="c"), replace(NODE, node="b", **change)]  # type: ignore[arg-type]
    errors = [str(finding) for finding in preflight(nodes, 24) if finding.level == "error"]
    assert any(words in error for error in errors), errors


def test_no_gpu_anywhere_is_one_line() -> None:
    nodes = [replace(node, gpus=(), versions={**node.versions}) for node in GOOD]
    errors = [str(finding) for finding in preflight(nodes, 16) if "GPU" in str(finding)]
    assert errors == ["error: no GPU on any node (a, b): an engine over several nodes needs NVIDIA's"]


def test_nodes_that_did_not_answer_are_missed_and_errors_come_first() -> None:
    found = preflight(
        [replace(NODE, reaches=None), replace(NODE, node="b", versions={**NODE.versions, "python": "3.11"})],
        24,
        wanted=3,
    )
    assert found[0].level == "error"
    assert "3 nodes are needed, and 2 answered" in found[0].message
    assert [finding.level for finding in found[-2:]] == ["warning", "warning"]


def test_this_machine_tells_its_facts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as master:
        facts = gather("here", sys.executable, master.getsockname()[:2])
    assert facts.reaches is True
    assert facts.versions["python"] == f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert facts.versions["torch"]
    assert facts.shm > 0 or not Path("/dev/shm").exists()
    assert "here: " in report([facts], [])[0]
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    assert gather("here", sys.executable, ("127.0.0.1", port)).reaches is False


def test_an_interpreter_that_is_not_there_is_named() -> None:
    with pytest.raises(UsageError, match="/nowhere/python does not run"):
        gather("here", "/nowhere/python")


def test_print_command_has_a_line_for_each_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lowbit.gateway.config import parse_config
    from lowbit.gateway.launch import TierFacts, plan_tiers, printable

    tier = {"name": "t", "path": str(tmp_path), "engine": "vllm", "nodes": ["10.0.0.1", "10.0.0.2"]}
    config = parse_config({"models": {"m": {"tiers": [{**tier, "flags": {"tensor_parallel": 2}}]}}})
    facts = {"m@t": TierFacts("vllm", str(tmp_path))}
    plan = plan_tiers(config, facts)["m@t"]
    lines = printable(plan, config.models["m"].tiers[0].nodes).splitlines()
    assert lines[0] == "# on 10.0.0.1"
    assert lines[2] == "# on 10.0.0.2"
    assert "VLLM_HOST_IP=10.0.0.1" in lines[1]
    assert "--node-rank 0" in lines[1]
    assert "--headless" not in lines[1]
    assert "VLLM_HOST_IP=10.0.0.2" in lines[3]
    assert lines[3].endswith("--headless")
    with pytest.raises(UsageError, match="evenly"):
        parse_config({"models": {"m": {"tiers": [{**tier, "flags": {"tensor_parallel": 3}}]}}})
    with pytest.raises(UsageError, match="that vLLM serves"):
        parse_config({"models": {"m": {"tiers": [{**tier, "engine": "sglang"}]}}})
