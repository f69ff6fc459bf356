"""What the gateway costs: against the engine asked directly, and against a bare pass-through in the same framework.

    python benchmarks/gateway.py [--url http://127.0.0.1:PORT --model NAME] [--streams 32] [--seconds 5]
    python benchmarks/gateway.py --gguf MODEL.gguf --threads 1        # llama.cpp, run as the gateway runs it

Without ``--url`` three processes run: a fake engine that streams instantly, a bare pass-through (aiohttp, no checks,
no metrics, nothing), and the gateway with validation, admission, policy, metrics and logs. Each is asked the same way
by a client in this process, in turns, so that a machine that slows down slows all of them. With ``--url`` the engine
there takes the fake one's place; ``--token-time`` makes the fake engine as slow as a real one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import urlopen

import psutil
from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

from lowbit.engines.process import EngineSpec
from lowbit.gateway.launch import thread_variables

ROOT = Path(__file__).parents[1]
TEXT = re.compile(rb'"content": ?"[^"]')
"""In the first event that carries some of the answer, rather than only announcing it."""
FAKE = ROOT / "tests" / "gateway" / "fake_engine.py"


@dataclass
class Figures:
    """What was seen of one server, over all its turns."""

    first: list[float] = field(default_factory=list)
    requests: int = 0
    chunks: int = 0
    seconds: float = 0.0
    cpu: float = 0.0
    turns: list[float] = field(default_factory=list)
    """Chunks per second of each turn."""

    @property
    def rate(self) -> float:
        return self.requests / self.seconds

    @property
    def chunk_rate(self) -> float:
        return self.chunks / self.seconds


def connector(reuse: bool) -> TCPConnector:
    """llama.cpp's server closes kept connections without a word, which a bare client takes for a failure."""
    return TCPConnector(limit=0, force_close=not reuse)


async def passthrough(port: int, upstream: str, reuse: bool) -> None:
    """The least that a proxy can do."""

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        async with session.post(
            upstream + request.path, data=body, headers={"Content-Type": "application/json"}
        ) as answer:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    app = web.Application()
    app.router.add_post("/{path:.*}", handle)
    async with ClientSession(connector=connector(reuse), timeout=ClientTimeout(total=None)) as session:
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
        print("ready", runner.addresses[0][1], flush=True)
        await asyncio.Event().wait()


def start_gateway(stack: ExitStack, upstream: str, model: str, engine: str) -> tuple[str, int]:
    """``lowbit serve`` over one tier that runs already, its log on; gives its url and id."""
    tier = {"name": "int4", "url": upstream, "engine": engine, "upstream_model": model, "concurrency": 256}
    directory = stack.enter_context(TemporaryDirectory())
    config = Path(directory) / "config.yaml"
    config.write_text(json.dumps({"models": {model: {"tiers": [tier]}}}))
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lowbit", "serve", str(config), "--port", str(port), "--log"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            with urlopen(f"{url}/ready"):
                return url, process.pid
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the gateway did not start")


async def one(session: ClientSession, url: str, body: bytes, figures: Figures) -> None:
    """One stream, read to its end."""
    started = time.perf_counter()
    first = True
    async with session.post(
        f"{url}/v1/chat/completions", data=body, headers={"Content-Type": "application/json"}
    ) as answer:
        if answer.status != 200:
            raise SystemExit(f"{url}: {answer.status} {await answer.text()}")
        async for chunk in answer.content.iter_any():
            if first and TEXT.search(chunk):
                figures.first.append(time.perf_counter() - started)
                first = False
            figures.chunks += chunk.count(b"\n\n")
    figures.requests += 1


async def load(session: ClientSession, url: str, body: bytes, figures: Figures, streams: int, seconds: float) -> None:
    """Keep ``streams`` requests under way for a while."""
    started, before = time.perf_counter(), figures.chunks

    async def client() -> None:
        while time.perf_counter() - started < seconds:
            await one(session, url, body, figures)

    await asyncio.gather(*(client() for _ in range(streams)))
    took = time.perf_counter() - started
    figures.seconds += took
    figures.turns.append((figures.chunks - before) / took)


def cpu_seconds(pid: int | None) -> float:
    """CPU seconds of a process so far: what a server costs, however busy the machine is with others."""
    if pid is None:
        return 0.0
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


async def measure(
    urls: dict[str, str],
    pids: dict[str, int | None],
    body: bytes,
    streams: int,
    seconds: float,
    turns: int,
    reuse: bool = True,
) -> dict[str, Figures]:
    """Ask every server in turns."""
    found = {name: Figures() for name in urls}
    async with ClientSession(connector=connector(reuse), timeout=ClientTimeout(total=None)) as session:
        for turn in range(-1, turns):
            for name, url in list(urls.items())[:: 1 if turn % 2 else -1]:
                figures = Figures() if turn < 0 else found[name]
                before = cpu_seconds(pids[name])
                warm = (min(streams, 4), 0.5)
                await load(session, url, body, figures, *(warm if turn < 0 else (streams, seconds / turns)))
                figures.cpu += cpu_seconds(pids[name]) - before
    return found


def start(stack: ExitStack, *arguments: str) -> tuple[str, int]:
    """Start a process that prints ``ready PORT``; gives its url and id."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ready"):
            return f"http://127.0.0.1:{line.split()[1]}", process.pid
    raise SystemExit(f"{arguments} did not start")


def start_llama(stack: ExitStack, model: str, threads: int, streams: int, tokens: int) -> tuple[str, int]:
    """llama.cpp's server with a place for every stream, its process as nice as a supervised one; its url and id."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lowbit.engines.llama_server", "--model", model, "--port", str(port)]
    command += ["--threads", str(threads), "--parallel", str(streams), "--context", str(tokens + 128)]
    environment = {**os.environ, **thread_variables(Path(model).stat().st_size)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    os.setpriority(os.PRIO_PROCESS, process.pid, EngineSpec("llama.cpp", ()).nice)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    url = f"http://127.0.0.1:{port}"
    for _ in range(1200):
        try:
            with urlopen(f"{url}/health"):
                return url, process.pid
        except OSError:
            time.sleep(0.1)
    raise SystemExit("llama.cpp did not start")


def paired(ours: Figures, theirs: Figures) -> float:
    """The median over turns of one server's chunks per second against the other's next to it."""
    return statistics.median(a / b for a, b in zip(ours.turns, theirs.turns, strict=True))


def show(found: dict[str, Figures], title: str) -> dict[str, Any]:
    """Print a table, give the same for JSON."""
    print(f"\n{title}\n{'':14}{'first token ms':>16}{'p95':>8}{'requests/s':>12}{'chunks/s':>11}{'CPU ms':>8}")
    table: dict[str, Any] = {}
    for name, figures in found.items():
        first = statistics.median(figures.first) * 1e3
        late = statistics.quantiles(figures.first, n=20)[-1] * 1e3
        cost = figures.cpu / figures.requests * 1e3
        print(f"{name:14}{first:>16.2f}{late:>8.2f}{figures.rate:>12.1f}{figures.chunk_rate:>11.0f}{cost:>8.2f}")
        table[name] = {
            "first_ms": first,
            "p95_ms": late,
            "requests": figures.rate,
            "chunks": figures.chunk_rate,
            "cpu_ms": cost,
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url")
    parser.add_argument("--gguf", metavar="FILE", help="start llama.cpp over this file")
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp")
    parser.add_argument("--engine", default="openai")
    parser.add_argument("--model", default="fake")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--token-time", type=float, default=0.0)
    parser.add_argument("--json")
    parser.add_argument(
        "--close", action="store_true", help="a connection a request, for an engine that closes kept ones"
    )
    parser.add_argument("--no-pass-through", action="store_true", help="leave it out, for an engine that takes long")
    parser.add_argument("--role", choices=("passthrough",))
    arguments = parser.parse_args()
    if arguments.role == "passthrough":
        asyncio.run(passthrough(0, arguments.url, not arguments.close))
    else:
        compare(arguments)


def per_cpu(figures: Figures) -> float:
    """Requests that a server answers for each second of its own CPU time."""
    return figures.requests / figures.cpu


def compare(arguments: argparse.Namespace) -> None:
    """The measurement."""
    if arguments.gguf:
        arguments.engine, arguments.close = "llama.cpp", True
    body = json.dumps(
        {
            "model": arguments.model,
            "messages": [{"role": "user", "content": "Tell me something about foxes."}],
            "max_tokens": arguments.tokens,
            "temperature": 0,
            "stream": True,
        }
    ).encode()
    with ExitStack() as stack:
        pace = ["--tokens", str(arguments.tokens), "--token-time", str(arguments.token_time)]
        pid: int | None = None
        engine = arguments.url
        if arguments.gguf:
            engine, pid = start_llama(stack, arguments.gguf, arguments.threads, arguments.streams, arguments.tokens)
        elif not engine:
            engine, pid = start(stack, str(FAKE), *pace)
        reuse = not arguments.close
        role = [__file__, "--url", engine, *([] if reuse else ["--close"]), "--role"]
        servers = {"engine": (engine, pid)}
        if not arguments.no_pass_through:
            servers["pass-through"] = start(stack, *role, "passthrough")
        servers["gateway"] = start_gateway(stack, engine, arguments.model, arguments.engine)
        urls = {name: url for name, (url, _) in servers.items()}
        pids = {name: pid for name, (_, pid) in servers.items()}
        single = asyncio.run(measure(urls, pids, body, 1, arguments.seconds / 2, arguments.turns, reuse))
        many = asyncio.run(measure(urls, pids, body, arguments.streams, arguments.seconds, arguments.turns, reuse))
    tables = {
        "1 stream": show(single, "1 stream"),
        f"{arguments.streams} streams": show(many, f"{arguments.streams} streams"),
    }
    added = statistics.median(single["gateway"].first) - statistics.median(single["engine"].first)
    summary = {
        "added to the first token, ms": added * 1e3,
        "throughput against the engine": paired(many["gateway"], many["engine"]),
    }
    if (bare := many.get("pass-through")) is not None:
        summary |= {
            "  of the pass-through": paired(bare, many["engine"]),
            "requests against the pass-through": many["gateway"].rate / bare.rate,
            "chunks against the pass-through": paired(many["gateway"], bare),
            "per CPU second, against the same": per_cpu(many["gateway"]) / per_cpu(bare),
        }
    print()
    for name, value in summary.items():
        print(f"{name:36}{value:8.3f}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"summary": summary, "tables": tables}, indent=2) + "\n")


if __name__ == "__main__":
    main()
