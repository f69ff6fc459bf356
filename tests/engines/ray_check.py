"""Serving on a real Ray cluster of three nodes on this machine: run by `make test-ray`, in an environment with Ray.

The head has the gateway and no processors; two nodes hold the engines (llama.cpp with the embedded model).
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from lowbit.gateway.config import parse_config
from lowbit.gateway.launch import plan_tiers
from lowbit.gateway.prepare import prepare
from lowbit.ops.ray_cluster import connect
from lowbit.ops.ray_serve.application import APPLICATION, run_application

TIER = {"name": "q8", "path": "demo", "engine": "llama.cpp", "context": 512, "concurrency": 8, "flags": {"threads": 1}}
CLIENTS = 12


@dataclass
class Running:
    cluster: Cluster
    url: str

    def handle(self) -> Any:
        return serve.get_deployment_handle("demo--q8", APPLICATION)

    def places(self) -> set[tuple[str, int]]:
        """Node and engine process of every replica that answers."""
        handle = self.handle().options(method_name="where")
        return {handle.remote().result(timeout_s=30) for _ in range(24)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        made.add_node(num_cpus=4)
    made.wait_for_nodes()
    connect(made.address)
    yield made
    serve.shutdown()
    ray.shutdown()
    made.shutdown()


@contextmanager
def served(cluster: Cluster, replicas: int | dict[str, int]) -> Iterator[Running]:
    """The application with so many replicas, in the place of any other."""
    _remove()
    config = parse_config({"models": {"demo": {"tiers": [{**TIER, "replicas": replicas}]}}, "port": 0})
    facts = asyncio.run(prepare(config, quiet=True))
    host, port = run_application(config, plan_tiers(config, facts), facts)
    yield Running(cluster, f"http://{host}:{port}/v1")
    _remove()


def _remove() -> None:
    if APPLICATION in serve.status().applications:
        serve.delete(APPLICATION)


@pytest.fixture(scope="module")
def two(cluster: Cluster) -> Iterator[Running]:
    """One application for all tests that take it: what they break has to mend."""
    with served(cluster, 2) as application:
        yield application


@pytest.fixture
def running(two: Running) -> Running:
    """It, once both replicas answer."""
    _mended(two)
    return two


def _mended(application: Running) -> None:
    """Wait until two replicas answer."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with suppress(ray.exceptions.RayError, TimeoutError):
            if len(application.places()) == 2:
                return
        time.sleep(1)
    raise AssertionError("Ray has not replaced what was lost")


@dataclass
class Load:
    """Clients that ask without pause until told to stop; every request ends in one of the lists."""

    url: str
    whole: list[float] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _asked: int = 0

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(CLIENTS)
        self._clients = [self._pool.submit(self._client, number) for number in range(CLIENTS)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for client in self._clients:
            client.result(timeout=120)
        self._pool.shutdown()

    def _client(self, number: int) -> None:
        client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=90)
        turn = 0
        while not self._stop.is_set():
            turn += 1
            began = time.monotonic()
            streams = number % 2 == 1
            started = False
            try:
                answer = client.completions.create(
                    model="demo", prompt=f"def f{number}_{turn}(", max_tokens=24, stream=streams, temperature=0
                )
                if streams:
                    for _ in answer:
                        started = True
                self.whole.append(time.monotonic() - began)
            except openai.OpenAIError as error:
                (self.cut if started else self.failed).append(f"{type(error).__name__}: {error}")


def test_clients_are_answered_by_every_replica(running: Running) -> None:
    client = openai.OpenAI(base_url=running.url, api_key="none")
    assert [model.id for model in client.models.list()][:1] == ["demo"]
    answer = client.completions.with_raw_response.create(model="demo", prompt="import os", max_tokens=4)
    assert answer.headers["x-lowbit-tier"] == "q8"
    assert answer.parse().usage.completion_tokens == 4
    places = running.places()
    assert len(places) == 2
    assert len({node for node, _ in places}) == 2, "replicas are spread over nodes"


def test_a_conversation_returns_to_its_replica(running: Running) -> None:
    ask = running.handle().options(method_name="answer", stream=True)

    def replica(affinity: str) -> str:
        parts = list(ask.remote("GET", "/health", b"", {}, affinity, ()))
        return str(parts[0].headers["x-lowbit-replica"])

    homes = {name: {replica(name) for _ in range(6)} for name in ("a", "b", "c", "d", "e", "f")}
    assert all(len(seen) == 1 for seen in homes.values())
    assert len(set.union(*homes.values())) == 2


def test_nothing_is_lost_when_an_engine_dies_under_load(running: Running) -> None:
    (_, victim), *_ = running.places()
    with Load(running.url) as load:
        time.sleep(3)
        os.kill(victim, signal.SIGKILL)
        time.sleep(10)
    assert not load.failed, sorted(set(load.failed))
    assert len(load.cut) <= CLIENTS
    assert len(load.whole) > CLIENTS


def test_nothing_is_lost_when_a_replica_dies_under_load(running: Running) -> None:
    with Load(running.url) as load:
        time.sleep(3)
        actors = [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "demo--q8" in actor["name"]]
        ray.kill(ray.get_actor(actors[0]["name"], namespace=actors[0]["namespace"]), no_restart=False)
        time.sleep(5)
        _mended(running)
    assert not load.failed, sorted(set(load.failed))
    assert len(load.cut) <= CLIENTS


def test_nothing_is_lost_when_a_node_goes_away_under_load(running: Running) -> None:
    head = running.cluster.head_node
    with Load(running.url) as load:
        time.sleep(3)
        node = next(node for node in running.cluster.list_all_nodes() if node is not head)
        running.cluster.remove_node(node, allow_graceful=False)
        time.sleep(20)
    running.cluster.add_node(num_cpus=4)
    assert not load.failed, sorted(set(load.failed))
    assert len(load.cut) <= CLIENTS
    assert len(load.whole) > CLIENTS


def test_replicas_are_added_under_load(cluster: Cluster) -> None:
    with served(cluster, {"min": 1, "max": 3, "target": 2}) as running:
        assert len(running.places()) == 1
        with Load(running.url) as load:
            deadline = time.monotonic() + 90
            while len(running.places()) < 2 and time.monotonic() < deadline:
                time.sleep(2)
            assert len(running.places()) >= 2
        assert not load.failed, sorted(set(load.failed))


def test_the_preflight_asks_every_node(cluster: Cluster) -> None:
    """It runs in a process of its own, as a user's; without GPUs that is what it says, in one line."""
    code = (
        "from lowbit.gateway.config import parse_config\n"
        "from lowbit.ops.node_preflight import preflight_tiers\n"
        "tier = {'name': 't', 'path': 'x', 'engine': 'vllm', 'flags': {'tensor_parallel': 2}}\n"
        "lines, passed = preflight_tiers(parse_config({'models': {'m': {'tiers': [tier]}}}), ADDRESS)\n"
        "print('\\n'.join(lines)); print('passed', passed)\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code.replace("ADDRESS", repr(cluster.address))],
        capture_output=True,
        text=True,
        timeout=150,
        check=True,
    ).stdout.splitlines()
    assert sum("MiB of /dev/shm" in line for line in shown) == len(cluster.list_all_nodes())
    assert "passed False" in shown
    if not Path("/proc/driver/nvidia").exists():
        assert sum("no GPU on any node" in line for line in shown) == 1
    assert not any("cannot be reached" in line for line in shown)
