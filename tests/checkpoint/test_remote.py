"""Hub models by their headers: a small server in the place of the hub counts what is fetched."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/model"


@dataclass
class Hub:
    """A server of one model's files; ``sent`` are the bytes that went out by file."""

    url: str
    root: Path
    sent: dict[str, int] = field(default_factory=dict)


@pytest.fixture
def hub(tmp_path: Path, tiny_llama: Path) -> Iterator[Hub]:
    found = Hub("", tiny_llama)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(send=False)

        def do_GET(self) -> None:
            self.answer(send=True)

        def answer(self, *, send: bool) -> None:
            path = self.path.partition("?")[0]
            if not path.startswith((f"/api/models/{NAME}", f"/{NAME}/resolve/")):
                return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"}, send=send)
            if path.startswith("/api/"):
                return self.reply(200, self.listing(path), {"Content-Type": "application/json"}, send=send)
            name = path.split("/resolve/")[1].partition("/")[2]
            file = found.root / name
            if not file.is_file():
                return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, send=send)
            data = file.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            status = 200
            if (wanted := self.headers.get("Range")) is not None:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                end = min(int(last or len(data) - 1), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{end}/{len(data)}"
                data, status = data[int(first) : end + 1], 206
            if send:
                found.sent[name] = found.sent.get(name, 0) + len(data)
            return self.reply(status, data, headers, send=send)

        def listing(self, path: str) -> bytes:
            names = sorted(file.name for file in found.root.iterdir())
            if "/tree/" in path:
                return json.dumps([{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names]).encode()
            return json.dumps({"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}).encode()

        def reply(self, status: int, data: bytes, headers: dict[str, str], *, send: bool) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if send:
                self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()


def run(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A ``lowbit estimate`` in a process of its own, for the hub's address is read when its client is imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    command = [sys.executable, "-m", "lowbit", "estimate", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=home, timeout=120, check=False)


def test_only_headers_are_fetched(hub: Hub, tmp_path: Path) -> None:
    local = run(
        hub, tmp_path, str(hub.root), "--scheme", "int4-g64-sym", "--gpus", "1", "--gpu-memory", "1GiB", "--json"
    )
    done = run(hub, tmp_path, NAME, "--scheme", "int4-g64-sym", "--gpus", "1", "--gpu-memory", "1GiB", "--json")
    assert done.returncode == 0, done.stderr
    found, expected = json.loads(done.stdout), json.loads(local.stdout)
    assert found["precisions"] == expected["precisions"]
    assert found["parameters"] == expected["parameters"]
    weights = (hub.root / "model.safetensors").stat().st_size
    assert weights > 300_000
    assert hub.sent["model.safetensors"] <= 100_001 < weights
    assert set(hub.sent) == {"config.json", "model.safetensors"}


def test_a_model_that_is_not_there_is_one_line(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "someone/else")
    assert done.returncode == 2
    assert "the hub has no such public model" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
