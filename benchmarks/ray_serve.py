"""Replicas on a Ray cluster: how throughput grows with them, and what Ray costs beside the gateway alone.

    .venvs/ray/bin/python benchmarks/ray_serve.py [--engine sleep llama.cpp] [--replicas 1 2 4] [--seconds 8]

A cluster of a head and two nodes runs on this machine. Two engines: one that sleeps for every token and computes next
to nothing, with four slots, whose throughput is what its replicas allow until something else limits it; and llama.cpp
with the embedded model and one thread, which needs a processor for each replica. Each is asked by the same clients,
without pause, through the gateway alone (one engine process, ``lowbit serve``) and through Ray with 1, 2, 4 replicas;
one client at a time gives what a request costs more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import yaml
from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

TOKENS, TOKEN_TIME, SLOTS = 24, 0.02, 4


@dataclass(frozen=True)
class Row:
    """What was measured of one way to serve one engine; ``alone`` is one request at a time, in milliseconds."""

    engine: str
    way: str
    replicas: int
    requests_per_second: float
    tokens_per_second: float
    median_ms: float
    alone_ms: float
    processor: float
    failed: int


async def sleeping_engine(port: int) -> None:
    """An OpenAI-compatible engine that waits, for ``max_tokens`` times :data:`TOKEN_TIME`, in one of its slots."""
    slots = asyncio.Semaphore(SLOTS)

    async def completions(request: web.Request) -> web.Response:
        body = await request.json()
        count = int(body.get("max_tokens", TOKENS))
        async with slots:
            await asyncio.sleep(count * TOKEN_TIME)
        choice = {"index": 0, "text": " w" * count, "finish_reason": "length", "logprobs": None}
        usage = {"prompt_tokens": 4, "completion_tokens": count, "total_tokens": 4 + count}
        shown = {"id": "cmpl-1", "object": "text_completion", "created": int(time.time()), "model": body.get("model")}
        return web.json_response({**shown, "choices": [choice], "usage": usage})

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    app = web.Application()
    app.add_routes(
        [web.post("/v1/completions", completions), web.get("/v1/models", models), web.get("/health", health)]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


def config_of(engine: str, replicas: int) -> dict[str, Any]:
    """The configuration that serves ``engine``."""
    tier: dict[str, Any] = {"name": "t", "concurrency": SLOTS, "replicas": replicas, "hang_timeout": 120}
    if engine == "sleep":
        command = [sys.executable, str(Path(__file__).resolve()), "--serve-engine", "{port}"]
        tier |= {"command": command, "engine": "openai", "context": 4096, "memory": 1 << 28}
    else:
        tier |= {"path": "demo", "engine": "llama.cpp", "context": 512, "flags": {"threads": 1}}
    return {"models": {"m": {"tiers": [tier]}}, "port": 0}


async def ask(session: ClientSession, url: str, number: int) -> float | None:
    """Seconds that one request took, None where it failed."""
    body = {"model": "m", "prompt": f"def f{number}(", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    began = time.perf_counter()
    async with session.post(f"{url}/completions", json=body) as answer:
        content = await answer.json()
    return time.perf_counter() - began if answer.status == 200 and content["choices"] else None


async def load(url: str, clients: int, seconds: float) -> tuple[list[float], int, float]:
    """Latencies of what ``clients`` asked for without pause, failures, and the seconds it took."""
    taken: list[float] = []
    failed = 0
    numbers = iter(range(1 << 30))
    async with ClientSession(connector=TCPConnector(limit=0), timeout=ClientTimeout(total=120)) as session:
        until = time.perf_counter() + seconds

        async def client() -> None:
            nonlocal failed
            while time.perf_counter() < until:
                spent = await ask(session, url, next(numbers))
                failed += spent is None
                taken.extend([] if spent is None else [spent])

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return taken, failed, time.perf_counter() - began


def measure(url: str, engine: str, way: str, replicas: int, clients: int, seconds: float) -> Row:
    """Warm up, then one client alone, then all of them."""
    asyncio.run(load(url, clients, 2))
    alone, _, _ = asyncio.run(load(url, 1, 3))
    psutil.cpu_percent()
    taken, failed, spent = asyncio.run(load(url, clients, seconds))
    processor = psutil.cpu_percent() / 100 * (psutil.cpu_count() or 1)
    rate = len(taken) / spent
    median = 1e3 * statistics.median(taken)
    return Row(
        engine, way, replicas, rate, rate * TOKENS, median, 1e3 * statistics.median(alone or [0.0]), processor, failed
    )


@contextmanager
def gateway_alone(engine: str) -> Iterator[str]:
    """``lowbit serve`` with one engine process."""
    with TemporaryDirectory() as scratch:
        path, log = Path(scratch) / "config.yaml", Path(scratch) / "log"
        path.write_text(yaml.safe_dump(config_of(engine, 1)))
        command = [str(Path(sys.executable).with_name("lowbit")), "serve", str(path), "--memory", "8GiB"]
        with log.open("w") as out:
            process = subprocess.Popen(command, stderr=out, stdout=out)
        try:
            deadline = time.monotonic() + 120
            while "/v1" not in (text := log.read_text()) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            url = next((word for word in text.split() if word.startswith("http")), None)
            if url is None:
                raise SystemExit(f"the gateway did not come up: {text}")
            yield url
        finally:
            process.terminate()
            process.wait(timeout=30)


@contextmanager
def on_ray(engine: str, replicas: int) -> Iterator[str]:
    """The same on a cluster that is there already."""
    from ray import serve

    from lowbit.gateway.config import parse_config
    from lowbit.gateway.launch import plan_tiers
    from lowbit.gateway.prepare import prepare
    from lowbit.ops.ray_serve.application import APPLICATION, run_application

    config = parse_config(config_of(engine, replicas))
    facts = asyncio.run(prepare(config, quiet=True))
    host, port = run_application(config, plan_tiers(config, facts), facts)
    try:
        yield f"http://{host}:{port}/v1"
    finally:
        serve.delete(APPLICATION)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--engine", nargs="+", choices=("sleep", "llama.cpp"), default=["sleep", "llama.cpp"])
    parser.add_argument("--replicas", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--serve-engine", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_engine is not None:
        asyncio.run(sleeping_engine(options.serve_engine))
        return
    rows: list[Row] = []
    clients = 2 * SLOTS * max(options.replicas)
    for engine in options.engine:
        with gateway_alone(engine) as url:
            rows.append(measure(url, engine, "gateway alone", 1, clients, options.seconds))
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from lowbit.ops.ray_cluster import connect

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=4)
    cluster.wait_for_nodes()
    connect(cluster.address)
    try:
        for engine in options.engine:
            for replicas in options.replicas:
                with on_ray(engine, replicas) as url:
                    rows.append(measure(url, engine, "Ray", replicas, clients, options.seconds))
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()
    print(f"{os.cpu_count()} processors, {clients} clients, {TOKENS} tokens for each request\n")
    print("| engine | way | replicas | requests/s | tokens/s | median ms | alone ms | processors | failed |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row.engine} | {row.way} | {row.replicas} | {row.requests_per_second:.1f} "
            f"| {row.tokens_per_second:.0f} | {row.median_ms:.0f} | {row.alone_ms:.1f} | {row.processor:.2f} "
            f"| {row.failed} |"
        )
    if options.json:
        Path(options.json).write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
