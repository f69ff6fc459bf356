"""A headless Chromium by its DevTools protocol: open a page, run scripts in it, look at it."""

from __future__ import annotations

import asyncio
import base64
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aiohttp import ClientSession, ClientWebSocketResponse

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """One tab."""

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self.socket = socket
        self.requests: list[str] = []
        self.errors: list[str] = []
        self._number = 0

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json(timeout=30)
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        details = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(details["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded" and details["entry"]["level"] == "error":
            self.errors.append(details["entry"]["text"])

    async def open(self, url: str) -> None:
        for domain in ("Network", "Runtime", "Log", "Page"):
            await self.send(f"{domain}.enable")
        await self.send("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def run(self, script: str) -> Any:
        result = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def until(self, condition: str, seconds: float = 15.0) -> None:
        for _ in range(int(seconds / 0.05)):
            if await self.run(condition):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"never came true: {condition}; {self.errors}")

    async def look(self, path: Path, width: int = 1200, height: int = 800) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        await asyncio.sleep(0.3)
        picture = await self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(picture["data"]))


@asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    assert CHROMIUM is not None
    with TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        command += ["--no-first-run", "--disable-dev-shm-usage", f"--user-data-dir={directory}", "about:blank"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            port_file = Path(directory) / "DevToolsActivePort"
            for _ in range(600):
                if port_file.exists() and len(port_file.read_text().split()) == 2:
                    break
                await asyncio.sleep(0.05)
            port = port_file.read_text().split()[0]
            async with ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json") as response:
                    target = next(each for each in await response.json() if each["type"] == "page")
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    yield Page(socket)
        finally:
            process.kill()
            process.wait()
