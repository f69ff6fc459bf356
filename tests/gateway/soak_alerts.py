"""A real Prometheus beside the soak, with the rules of `lowbit alerts` and an hour pressed into a minute.

What must fire, what may, and what must never: an alert that no fault explains is as wrong as one that stays silent.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from aiohttp import ClientError, ClientSession

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))

from alerts_check import faster, free_port

MUST = {"LowbitEngineEnded", "LowbitCircuitOpen", "LowbitErrorBudgetBurnFast"}
"""What killed, hanging and failing engines have to raise."""
MAY = {
    "LowbitDown",  # a gateway that is ended for two seconds is down for two minutes
    "LowbitEngineRestarts",
    "LowbitEngineHoldsBack",
    "LowbitEngineLoadFailed",
    "LowbitErrorBudgetBurn",
    "LowbitErrorBudgetBurnSlow",
    "LowbitNoTierReady",
    "LowbitQueueFilling",
    "LowbitQueueSlow",
    "LowbitFirstTokenSlow",
    "LowbitDegraded",
    "LowbitSlowerThanBaseline",  # engines are told to be slow
    "LowbitMachineMemoryLow",  # that of the machine on which this runs
}
"""What the faults may raise, as it happens."""
ALWAYS = {"LowbitCertificateMissing"}
"""The fake engines serve 4 bits, and nobody has measured them."""
LASTING = {"LowbitErrorBudgetBurnSlow", "LowbitErrorBudgetBurn"}
"""Windows of six hours, in which what was burnt is counted long after the trouble."""


@dataclass
class Alarms:
    """Prometheus' process, and when each alert began and ceased to fire."""

    folder: Path
    port: int
    begun: float = field(default_factory=time.monotonic)
    process: subprocess.Popen[bytes] | None = None
    firing: set[str] = field(default_factory=set)
    fired: Counter[str] = field(default_factory=Counter)
    history: list[str] = field(default_factory=list)

    def start(self, target: int) -> None:
        """Make the rules and scrape ``target`` every second."""
        made = self.folder / "alerts"
        subprocess.run([sys.executable, "-m", "lowbit", "alerts", "-o", str(made)], check=True, capture_output=True)
        (self.folder / "rules.yaml").write_text(faster((made / "rules.yaml").read_text()))
        scrape = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": "lowbit", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}],
        }
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(scrape))
        command = [
            "prometheus",
            f"--config.file={self.folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]
        with (self.folder / "prometheus.log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def end(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(30)

    async def look(self, http: ClientSession) -> None:
        """Note what fires now."""
        with suppress(ClientError, OSError):
            async with http.get(f"http://127.0.0.1:{self.port}/api/v1/alerts") as response:
                alerts = (await response.json())["data"]["alerts"]
            now = {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}
            at = f"{time.monotonic() - self.begun:6.0f} s"
            self.history += [f"{at}  firing    {name}" for name in sorted(now - self.firing)]
            self.history += [f"{at}  resolved  {name}" for name in sorted(self.firing - now)]
            self.fired.update(now - self.firing)
            self.firing = now

    async def watch(self, http: ClientSession) -> None:
        """Look every second, until cancelled."""
        while True:
            await self.look(http)
            await asyncio.sleep(1.0)

    async def resolve(self, http: ClientSession, limit: float) -> None:
        """Wait until nothing fires that should not, the trouble being over."""
        end = time.monotonic() + limit
        while time.monotonic() < end and self.firing - ALWAYS - LASTING:
            await self.look(http)
            await asyncio.sleep(1.0)

    def account(self) -> list[str]:
        """Everything that is wrong: silent where it had to fire, firing without reason, not resolved."""
        found = [f"{name} did not fire" for name in sorted((MUST | ALWAYS) - set(self.fired))]
        found += [f"{name} fired without a reason" for name in sorted(set(self.fired) - MUST - MAY - ALWAYS)]
        return found + [f"{name} still fires" for name in sorted(self.firing - ALWAYS - LASTING)]


def alarms_for(folder: Path) -> Alarms:
    """Alarms with a port of their own, their files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    return Alarms(folder, free_port())
