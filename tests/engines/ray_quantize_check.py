"""Quantizing on a real Ray cluster of three nodes on this machine writes the bytes of a run without one.

Run by `make test-ray`, in an environment with Ray. Workers and nodes are killed in the middle.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.cluster_utils import Cluster

from lowbit.errors import UsageError
from lowbit.ops.ray_quantize import RayExecutor
from lowbit.pipeline.progress import Silent
from lowbit.pipeline.quantize import quantize

torch.set_num_threads(1)
SETTINGS: dict[str, Any] = {"samples": 24, "seq_len": 256, "group_size": 64}
FLAGS = ["--samples", "24", "--seq-len", "256", "--group-size", "64", "--certify-tokens", "0", "--quiet"]


class At(Silent):
    """Does something when the given number of modules has been begun."""

    def __init__(self, module: int, act: Callable[[], object]) -> None:
        self._left, self._act = module, act

    def at(self, name: str) -> None:
        self._left -= 1
        if self._left == 0:
            self._act()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(2):
        made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, new_checkpoint: Callable[..., Path]) -> Path:
    """A tiny Llama whose widest Gram matrix has three panels."""
    return new_checkpoint(tmp_path_factory.mktemp("model"), "llama", intermediate_size=1152)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize(
    "settings",
    [{"method": "gptq"}, {"method": "awq", "symmetric": False}, {"method": "rtn"}, {"method": "gptaq"}],
    ids=lambda settings: str(settings["method"]),
)
def test_the_bytes_of_one_machine(
    settings: dict[str, Any], cluster: Cluster, model: Path, calibration_file: Path, tmp_path: Path
) -> None:
    given = {"calibration": calibration_file, **SETTINGS, **settings}
    quantize(model, tmp_path / "one", **given)
    with RayExecutor(cluster.address) as executor:
        assert executor.workers == 3
        assert len({node for node, _ in executor.places()}) == 3, "workers are spread over nodes"
        quantize(model, tmp_path / "many", executor=executor, **given)
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_a_killed_worker_changes_no_byte(cluster: Cluster, model: Path, calibration_file: Path, tmp_path: Path) -> None:
    given = {"calibration": calibration_file, **SETTINGS}
    quantize(model, tmp_path / "one", **given)
    with RayExecutor(cluster.address) as executor:
        killed = executor.places()[1]
        progress = At(3, lambda: os.kill(killed[1], signal.SIGKILL))
        quantize(model, tmp_path / "many", executor=executor, progress=progress, **given)
        assert killed not in executor.places()
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_a_lost_node_changes_no_byte(cluster: Cluster, model: Path, calibration_file: Path, tmp_path: Path) -> None:
    given = {"calibration": calibration_file, **SETTINGS}
    quantize(model, tmp_path / "one", **given)
    with RayExecutor(cluster.address) as executor:
        node = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)
        progress = At(2, lambda: cluster.remove_node(node, allow_graceful=False))
        quantize(model, tmp_path / "many", executor=executor, progress=progress, **given)
        assert executor.workers == 2
    cluster.add_node(num_cpus=1)
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_a_killed_run_goes_on(cluster: Cluster, model: Path, calibration_file: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "one", calibration=calibration_file, held_out_tokens=0, **SETTINGS)
    out = tmp_path / "many"
    command = [str(Path(sys.executable).with_name("lowbit")), "quantize", str(model), str(out), *FLAGS]
    command += ["--calibration", str(calibration_file), "--ray", cluster.address]
    run = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline, journal = time.monotonic() + 120, tmp_path / "many.partial" / "journal.jsonl"
    while run.poll() is None and time.monotonic() < deadline:
        if journal.exists() and journal.read_bytes().count(b"\n") >= 2:
            break
        time.sleep(0.01)
    run.kill()
    run.wait()
    assert not out.exists(), "it was killed before its end"
    subprocess.run([*command, "--resume"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200)
    assert files(out) == files(tmp_path / "one")


def test_no_cluster_is_one_line() -> None:
    with pytest.raises(UsageError, match=r"--ray 127.0.0.1:1: no cluster answers there"):
        RayExecutor("127.0.0.1:1")
