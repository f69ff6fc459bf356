"""The alert rules in promtool, and in a real Prometheus that scrapes a real gateway while its engine is broken.

    make test-alerts

Wants Debian's package `prometheus` (prometheus and promtool); what is absent is said, and the exit status is then 1. In
the second part all windows and waits are a sixtieth of what they are, so that a minute is a second.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

ENGINE = Path(__file__).parents[1] / "gateway" / "fake_engine.py"
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    print(f"{' '.join(command[:3])}: {'ok' if done.returncode == 0 else 'FAILED'}", flush=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def faster(text: str) -> str:
    """The same rules, a minute as a second; no window is shorter than five scrapes."""

    def shrink(amount: str, unit: str, least: int) -> str:
        return f"{max(least, int(amount) * SECONDS[unit] // 60)}s"

    text = re.sub(r"\[(\d+)([smhd])\]", lambda match: f"[{shrink(match[1], match[2], 5)}]", text)
    return re.sub(r"(?m)^( +for: )(\d+)([smhd])$", lambda match: match[1] + shrink(match[2], match[3], 1), text)


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return json.load(answer)


def post(url: str, body: Any, timeout: float = 60.0) -> int:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@contextmanager
def process(*command: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        started = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            yield started
        finally:
            started.terminate()
            started.wait(30)


class Watch:
    """One gateway under one Prometheus."""

    def __init__(self, gateway: subprocess.Popen[bytes], url: str, prometheus: str) -> None:
        self.gateway, self.url, self.prometheus = gateway, url, prometheus
        self.begun = time.monotonic()
        self.stop = threading.Event()

    def firing(self) -> set[str]:
        alerts = get(f"{self.prometheus}/api/v1/alerts")["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def until(self, names: set[str], *, on: bool, limit: float = 90.0) -> None:
        """Wait until all of ``names`` fire, or none does."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            now = self.firing()
            if (names <= now) if on else not (names & now):
                at = time.monotonic() - self.begun
                print(f"{at:5.0f} s  {'firing' if on else 'resolved'}: {', '.join(sorted(names))}", flush=True)
                return
            time.sleep(0.3)
        raise SystemExit(f"{names} should{'' if on else ' not'} fire; firing: {sorted(self.firing())}")

    def engine(self) -> tuple[int, str]:
        """Process and address of the engine as it is now."""
        for child in psutil.Process(self.gateway.pid).children(recursive=True):
            try:
                line = child.cmdline()
            except psutil.Error:
                continue
            if str(ENGINE) in line and "python" in Path(line[0]).name and "--port" in line:
                return child.pid, f"http://127.0.0.1:{line[line.index('--port') + 1]}"
        return 0, ""

    def fault(self, kind: str | None, **settings: Any) -> None:
        assert post(f"{self.engine()[1]}/fault", {"kind": kind, "count": None, **settings}) == 200

    def ask(self) -> int:
        return post(f"{self.url}/v1/completions", {"model": "chat", "prompt": "x", "max_tokens": 4})

    def traffic(self) -> None:
        """A few requests a second, until told to stop."""
        while not self.stop.wait(0.15):
            self.ask()


def scenario(watch: Watch) -> None:
    watch.until({"LowbitCertificateMissing"}, on=True)
    traffic = threading.Thread(target=watch.traffic, daemon=True)
    traffic.start()
    time.sleep(8)
    others = watch.firing() - {"LowbitCertificateMissing"}
    assert not others, f"a healthy gateway: {others}"
    print("       a healthy gateway under traffic: no other alert", flush=True)

    watch.fault("error500")
    watch.until({"LowbitErrorBudgetBurnFast", "LowbitCircuitOpen"}, on=True)
    watch.fault(None)
    watch.until({"LowbitErrorBudgetBurnFast", "LowbitCircuitOpen"}, on=False)

    for _ in range(4):
        before, _ = watch.engine()
        psutil.Process(before).send_signal(signal.SIGKILL)
        end = time.monotonic() + 30
        while (watch.engine()[0] in (0, before) or watch.ask() != 200) and time.monotonic() < end:
            time.sleep(0.2)
        watch.until({"LowbitEngineEnded"}, on=True)
    watch.until({"LowbitEngineRestarts"}, on=True)
    watch.until({"LowbitEngineEnded", "LowbitEngineRestarts"}, on=False)

    watch.stop.set()
    traffic.join()
    watch.fault(None, first_token=4.0)
    crowd = [threading.Thread(target=watch.ask, daemon=True) for _ in range(9)]
    for each in crowd:
        each.start()
    watch.until({"LowbitQueueFilling"}, on=True)
    watch.fault(None, first_token=0.0)
    for each in crowd:
        each.join()
    watch.until({"LowbitQueueFilling"}, on=False)

    watch.gateway.terminate()
    watch.until({"LowbitDown"}, on=True)


def main() -> int:
    absent = [name for name in ("promtool", "prometheus") if shutil.which(name) is None]
    if absent:
        print(f"NOT CHECKED: {', '.join(absent)} (Debian: apt-get install prometheus) is not installed")
        return 1
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run(sys.executable, "-m", "lowbit", "alerts", "-o", str(home / "made"))
        run("promtool", "check", "rules", str(home / "made" / "rules.yaml"))
        run("promtool", "test", "rules", str(home / "made" / "tests.yaml"))
        (home / "rules.yaml").write_text(faster((home / "made" / "rules.yaml").read_text()))
        run("promtool", "check", "rules", str(home / "rules.yaml"))
        port, other = free_port(), free_port()
        tier = {
            "name": "int4",
            "command": [sys.executable, str(ENGINE), "--port", "{port}"],
            "memory": "100MiB",
            "concurrency": 1,
            "pinned": True,
        }
        policy = {"failures": 3, "cooldown": "1s", "max_cooldown": "2s"}
        config = {
            "port": port,
            "memory": "1GiB",
            "limits": {"queue_requests": 8},
            "models": {"chat": {"policy": policy, "tiers": [tier]}},
        }
        (home / "serve.yaml").write_text(yaml.safe_dump(config))
        scrape = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": "lowbit", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}],
        }
        (home / "prometheus.yml").write_text(yaml.safe_dump(scrape))
        run("promtool", "check", "config", str(home / "prometheus.yml"))
        serve = (sys.executable, "-m", "lowbit", "serve", str(home / "serve.yaml"))
        gateway = stack.enter_context(process(*serve, log=home / "gateway.log"))
        url = f"http://127.0.0.1:{port}"
        wait(f"{url}/ready", home / "gateway.log")
        stack.enter_context(
            process(
                "prometheus",
                f"--config.file={home / 'prometheus.yml'}",
                f"--storage.tsdb.path={home / 'data'}",
                f"--web.listen-address=127.0.0.1:{other}",
                log=home / "prometheus.log",
            )
        )
        wait(f"http://127.0.0.1:{other}/api/v1/alerts", home / "prometheus.log")
        scenario(Watch(gateway, url, f"http://127.0.0.1:{other}"))
    print("all alerts fired and resolved as expected")
    return 0


def wait(url: str, log: Path) -> None:
    """Until something answers there with 200."""
    for _ in range(300):
        try:
            get(url)
            return
        except (OSError, ValueError):
            time.sleep(0.2)
    raise SystemExit(f"{url} does not answer\n{log.read_text()[-3000:]}")


if __name__ == "__main__":
    sys.exit(main())
