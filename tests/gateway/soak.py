"""An hour's trouble in minutes, on real processes: `make soak`, or ``python tests/gateway/soak.py --minutes 5``.

``lowbit serve`` runs with six models (eight engines, a budget that not all of them fit into), a load of every route,
and faults all the time: engines killed, stopped, slow, answering garbage, errors or nothing; bursts that fill the
queue; the gateway itself ended and killed in the first third. Then every request must be accounted for: complete to
the last token, refused or broken off with a proper error, and in the gateway's log exactly once. Memory, open files and
processes of the gateway that ran last must be flat. With ``--alerts`` a Prometheus watches it, a minute for an hour:
the alerts that the faults call for must fire, no others, and all must resolve when the trouble ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket
from typing import Any

import psutil
from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector

sys.path.insert(0, str(Path(__file__).parent))

from soak_alerts import Alarms, alarms_for
from soak_calls import CALLS, Outcome, WrongError, ask

FAKE = Path(__file__).with_name("fake_engine.py")
GENERATION_FAULTS = ("die", "die_mid", "hang", "stall_mid", "close_mid", "garbage", "error500", "error503")
QUIET = 20.0
"""Seconds without faults at the end, in which everything must come back."""


def lives(process: psutil.Process) -> bool:
    """Whether a process runs, rather than waits for somebody to hear of its end."""
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@dataclass(frozen=True)
class Sample:
    """The gateway at a moment: memory, open files, processes below it, sockets."""

    rss: int
    files: int
    processes: int
    sockets: int


@dataclass
class Soak:
    """One gateway after the other on one port, and what happened."""

    folder: Path
    seconds: float
    seed: int
    alarms: Alarms | None = None
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    gateways: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    seen: dict[int, psutil.Process] = field(default_factory=dict)
    numbers: int = 0
    settled: asyncio.Event = field(default_factory=asyncio.Event)  # the last gateway is up, its models were asked
    stopping: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def gateway(self) -> psutil.Process:
        assert self.process is not None
        return psutil.Process(self.process.pid)

    # the gateway

    def configure(self) -> None:
        def tier(name: str, memory: int, *arguments: str, **settings: Any) -> dict[str, Any]:
            command = [sys.executable, str(FAKE), "--port", "{port}", "--token-time", "0.005", *arguments]
            limits = {"ready_timeout": 30, "hang_timeout": 3, "concurrency": 16, "context": 4096}
            return {
                "name": name,
                "command": command,
                "engine": "openai",
                "memory": f"{memory}MiB",
                **limits,
                **settings,
            }

        policy = {"cooldown": "1s", "max_cooldown": "4s", "grace": 0.5, "patience": "1s"}
        models = {
            "assistant": {"tiers": [tier("int8", 200), tier("int4", 100)], "policy": policy},
            "coder": {"tiers": [tier("int4", 300)], "policy": policy},
            "writer": {"tiers": [tier("int4", 300)], "policy": policy},
            "embedder": {"kind": "embedding", "tiers": [tier("fp32", 50)], "policy": policy},
            "ranker": {"kind": "rerank", "tiers": [tier("fp32", 50)], "policy": policy},
            "giant": {"tiers": [tier("bf16", 900_000)], "policy": policy},
        }
        limits = {"queue_requests": 60, "first_byte_timeout": 4, "request_timeout": 30, "queue_timeout": 15}
        settings = {"memory": "800MiB", "limits": limits, "logs": str(self.folder / "engines")}
        (self.folder / "serve.yaml").write_text(json.dumps({"models": models, **settings}))
        with socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    async def start(self, http: ClientSession) -> None:
        self.gateways += 1
        log = (self.folder / f"gateway-{self.gateways}.log").open("wb")
        command = [sys.executable, "-m", "lowbit", "serve", str(self.folder / "serve.yaml")]
        self.process = subprocess.Popen([*command, "--port", str(self.port), "--log"], stderr=log)
        log.close()
        for _ in range(1200):
            if self.process.poll() is not None:
                raise SystemExit((self.folder / f"gateway-{self.gateways}.log").read_text())
            with suppress(ClientError, OSError):
                async with http.get(f"{self.url}/health"):
                    return
            await asyncio.sleep(0.05)
        raise SystemExit("the gateway did not start")

    async def end(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        await asyncio.to_thread(self.process.wait, 60)

    def engines(self) -> list[psutil.Process]:
        """The engines' processes, without their guards."""
        found = []
        with suppress(psutil.Error):
            for each in self.gateway.children(recursive=True):
                with suppress(psutil.Error):
                    command = each.cmdline()
                    if len(command) > 1 and command[1] == str(FAKE):
                        found.append(each)
        self.seen |= {each.pid: each for each in found}
        return found

    # load and faults

    async def load(self, http: ClientSession, until: float, chance: random.Random) -> None:
        kinds = [kind for kind, (weight, _) in CALLS.items() for _ in range(weight)]
        while time.monotonic() < until:
            await self.one(http, chance.choice(kinds))
            away = bool(self.outcomes) and self.outcomes[-1].result == "unreachable"
            await asyncio.sleep(1.0 if away else chance.expovariate(8.0))

    async def one(self, http: ClientSession, kind: str) -> None:
        self.numbers += 1
        try:
            self.outcomes.append(await ask(http, self.url, kind, self.numbers, self.seed))
        except WrongError as error:
            self.wrong.append(str(error))

    async def trouble(self, http: ClientSession, until: float, chance: random.Random) -> None:
        restarts = [until - 0.9 * self.seconds, until - 0.8 * self.seconds, until - 0.7 * self.seconds]
        signals = [signal.SIGTERM, signal.SIGKILL, signal.SIGTERM]
        while time.monotonic() < until:
            await asyncio.sleep(chance.uniform(0.3, 2.0))
            if restarts and time.monotonic() > restarts[0]:
                restarts.pop(0)
                number = signals.pop(0)
                self.faults[f"gateway {number.name}"] += 1
                await self.end(number)
                await self.start(http)
                continue
            if not restarts and not self.settled.is_set():
                await self.every_kind(http)
                self.settled.set()
            engines = self.engines()
            if engines:
                await self.harm(http, chance.choice(engines), chance)

    async def harm(self, http: ClientSession, engine: psutil.Process, chance: random.Random) -> None:
        kind = chance.choice(["kill -9", "stop", "slow", "burst", *GENERATION_FAULTS])
        with suppress(psutil.Error, ClientError, OSError, asyncio.TimeoutError):
            if kind == "kill -9":
                engine.kill()
            elif kind == "stop":
                engine.suspend()
            elif kind == "burst":
                await asyncio.gather(*(self.one(http, "chat stream") for _ in range(150)))
            else:
                command = engine.cmdline()
                port = command[command.index("--port") + 1]
                slow = {"kind": None, "token_time": chance.choice([0.0, 0.1])}
                body = slow if kind == "slow" else {"kind": kind, "count": chance.randint(1, 5)}
                async with http.post(
                    f"http://127.0.0.1:{port}/fault", json=body, timeout=ClientTimeout(total=2)
                ) as response:
                    await response.read()
            self.faults[kind] += 1

    async def watch(self) -> None:
        """Samples of the gateway that runs last, once it has loaded what it can."""
        await self.settled.wait()
        while not self.stopping:
            self.samples.append(self.sample())
            await asyncio.sleep(1.0)

    def sample(self) -> Sample:
        gateway = self.gateway
        below = [each for each in gateway.children(recursive=True) if each.is_running()]
        self.seen |= {each.pid: each for each in below}
        return Sample(gateway.memory_info().rss, gateway.num_fds(), len(below), len(gateway.net_connections("tcp")))

    async def run(self) -> None:
        self.configure()
        chance = random.Random(self.seed)
        connector = TCPConnector(limit=0, force_close=True)
        async with ClientSession(connector=connector, timeout=ClientTimeout(total=None)) as http:
            await self.start(http)
            if self.alarms is not None:
                self.alarms.start(self.port)
                listening = asyncio.create_task(self.alarms.watch(http))
            until = time.monotonic() + self.seconds
            watching = asyncio.create_task(self.watch())
            loads = [self.load(http, until, random.Random(self.seed + number)) for number in range(24)]
            await asyncio.gather(self.trouble(http, until, chance), *loads)
            await self.recover(http)
            self.stopping = True
            self.settled.set()
            await watching
            self.samples.append(self.sample())
            if self.alarms is not None:
                listening.cancel()
                await self.alarms.resolve(http, 5 * QUIET)
            await self.end(signal.SIGTERM)

    async def recover(self, http: ClientSession) -> None:
        """Without faults every model answers again, and nothing is under way any more."""
        for engine in self.engines():
            with suppress(psutil.Error):
                engine.resume()
        end = time.monotonic() + 2 * QUIET
        while time.monotonic() < end:
            before = len(self.outcomes)
            kinds = await self.every_kind(http)
            good = sum(each.result == "answered" for each in self.outcomes[before:])
            if good == 3 * sum(not self.senseless(kind) for kind in kinds):
                break
            await asyncio.sleep(1.0)
        else:
            self.wrong.append("not everything came back after the faults")
        await asyncio.sleep(QUIET / 4)
        async with http.get(f"{self.url}/status") as response:
            status = await response.json()
        for model in status["models"]:
            if model["queued"] or any(tier["in_flight"] for tier in model["tiers"]):
                self.wrong.append(f"{model['name']}: something is still under way: {model}")

    async def every_kind(self, http: ClientSession) -> list[str]:
        """Three calls of each kind, so that every model is loaded."""
        kinds = [kind for kind in CALLS if "leaving" not in kind]
        await asyncio.gather(*(self.one(http, kind) for kind in kinds for _ in range(3)))
        return kinds

    @staticmethod
    def senseless(kind: str) -> bool:
        return kind in ("broken JSON", "unknown model", "too long", "over the budget")

    # the account

    def account(self) -> list[str]:
        """Everything that is wrong: what no fault explains, what the logs have twice or not at all, what grew."""
        found = list(self.wrong)
        logged: Counter[str] = Counter()
        for path in self.folder.glob("gateway-*.log"):
            for line in path.read_text(errors="replace").splitlines():
                entry = json.loads(line) if line.startswith("{") else {}
                if entry.get("event") == "request" and str(entry.get("id", "")).startswith("soak-"):
                    logged[entry["id"]] += 1
                if entry.get("event") == "bug":
                    found.append(f"a bug in the gateway: {line[:2000]}")
        seen = {each.id: each.result for each in self.outcomes}
        if len(seen) != len(self.outcomes) or len(self.outcomes) + len(self.wrong) < self.numbers:
            found.append(f"{self.numbers} requests, {len(self.outcomes)} outcomes")
        found += [f"{name}: {count} lines in the log" for name, count in logged.items() if count > 1]
        lost = [name for name, result in seen.items() if not logged[name] and result == "answered"]
        # what a gateway that was killed had answered in its last tenth of a second is not in its log
        if len(lost) > 60 * self.faults["gateway SIGKILL"]:
            found.append(f"{len(lost)} answers are in no log: {lost[:5]}")
        found += [f"left behind: process {each.pid}" for each in self.seen.values() if lives(each)]
        found += self.alarms.account() if self.alarms is not None else []
        return found + self.growth()

    def growth(self) -> list[str]:
        """Whether the end, without load, is above what was usual under load in the first half."""
        half = max(1, len(self.samples) // 2)
        found = []
        for name, allowed in (("rss", 24 * 2**20), ("files", 40), ("processes", 4), ("sockets", 40)):
            early = statistics.median(getattr(each, name) for each in self.samples[:half])
            late = getattr(self.samples[-1], name)
            if late > early + allowed:
                found.append(f"{name} grew from {early} to {late}")
        return found

    def show(self) -> None:
        """The tables."""
        kinds: dict[str, Counter[str]] = {}
        for each in self.outcomes:
            kinds.setdefault(each.kind, Counter())[each.result.partition(":")[0]] += 1
        columns = ("answered", "refused", "broken", "left", "cut", "unreachable")
        print(f"\n{'call':24}" + "".join(f"{column:>13}" for column in columns))
        for kind in CALLS:
            print(f"{kind:24}" + "".join(f"{kinds.get(kind, Counter())[column]:>13}" for column in columns))
        total = Counter(each.result.partition(":")[0] for each in self.outcomes)
        print(f"{'all':24}" + "".join(f"{total[column]:>13}" for column in columns))
        errors = Counter(each.result for each in self.outcomes if ":" in each.result)
        print("\nerrors: " + ", ".join(f"{name} {count}" for name, count in errors.most_common()))
        print("faults: " + ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items())))
        quarter = max(1, len(self.samples) // 4)
        print(f"\n{'gateway':14}{'early':>10}{'late':>10}{'end':>10}{'most':>10}")
        for name, unit in (("rss", 2**20), ("files", 1), ("sockets", 1), ("processes", 1)):
            values = [getattr(each, name) / unit for each in self.samples]
            early, late = statistics.median(values[:quarter]), statistics.median(values[-quarter:])
            title = "rss, MiB" if name == "rss" else name
            print(f"{title:14}{early:>10.1f}{late:>10.1f}{values[-1]:>10.1f}{max(values):>10.1f}")
        if self.alarms is not None:
            print("\nalerts, a minute for an hour:", *self.alarms.history, sep="\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for logs (default: a temporary one)")
    parser.add_argument("--alerts", action="store_true", help="watch it with a Prometheus (Debian: prometheus)")
    arguments = parser.parse_args()
    if arguments.alerts and shutil.which("prometheus") is None:
        parser.error("--alerts wants Debian's package prometheus, which is not installed")
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        alarms = alarms_for(folder / "prometheus") if arguments.alerts else None
        soak = Soak(folder, 60 * arguments.minutes, arguments.seed, alarms)
        try:
            asyncio.run(soak.run())
        finally:
            if soak.process is not None and soak.process.poll() is None:
                soak.process.kill()
            if alarms is not None:
                alarms.end()
        soak.show()
        wrong = soak.account()
    for line in wrong[:40]:
        print("WRONG:", line[:600])
    print(
        f"\n{soak.numbers} requests, {sum(soak.faults.values())} faults: {'FAILED' if wrong else 'all accounted for'}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
