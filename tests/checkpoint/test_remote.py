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
from huggingface_hub import constants

from lowbit import estimate, quantize
from lowbit.codecs.gguf.remote import PIECE_BYTES, open_gguf_headers
from lowbit.errors import CheckpointError
from lowbit.sizing.headers import open_header_model

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
            sizes = {file.name: file.stat().st_size for file in sorted(found.root.iterdir())}
            if "/tree/" in path:
                entries = [{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in sizes.items()]
                return json.dumps(entries).encode()
            siblings = [{"rfilename": name, "size": size} for name, size in sizes.items()]
            return json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode()

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


@pytest.fixture(scope="module")
def gguf_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two GGUF models, one of them in three parts, and what looks like a third."""
    folder = tmp_path_factory.mktemp("gguf")
    quantize("demo", folder / "demo-F16.gguf", scheme="F16", certify_tokens=0)
    quantize("demo", folder / "demo-Q8_0.gguf", scheme="Q8_0", certify_tokens=0, split_bytes=1_000_000)
    (folder / "mmproj-demo-F16.gguf").write_bytes(b"an encoder")
    return folder


@pytest.fixture
def gguf_hub(hub: Hub, gguf_files: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """The server with GGUF files only, and this process turned to it."""
    hub.root = gguf_files
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return hub


@pytest.mark.parametrize("name", [f"{NAME}/demo-F16.gguf", f"{NAME}:f16"])
def test_a_gguf_file_by_its_header(gguf_hub: Hub, gguf_files: Path, name: str) -> None:
    found, local = open_header_model(name), open_header_model(gguf_files / "demo-F16.gguf")
    assert (found.dense, found.description, found.layers) == (local.dense, local.description, local.layers)
    assert found.file_sizes == local.file_sizes
    size = (gguf_files / "demo-F16.gguf").stat().st_size
    assert gguf_hub.sent == {"demo-F16.gguf": gguf_hub.sent["demo-F16.gguf"]}
    assert gguf_hub.sent["demo-F16.gguf"] <= 2 * PIECE_BYTES + 1024 < size / 2
    with pytest.raises(CheckpointError, match="only headers: download the file first"):
        found.checkpoint.read("model.norm.weight")
    with pytest.raises(CheckpointError, match="only headers"):
        found.checkpoint.copy_bytes("model.norm.weight")


def test_a_split_gguf_file_is_estimated(gguf_hub: Hub, gguf_files: Path) -> None:
    parts = sorted(gguf_files.glob("demo-Q8_0-*.gguf"))
    assert len(parts) > 2
    found = estimate(f"{NAME}:Q8_0", schemes=["stored", "Q4_K_M"], engine="llama.cpp", gpus=0)
    assert found.precisions[0].file_bytes == sum(part.stat().st_size for part in parts)
    assert all(entry.exact for entry in found.precisions)
    assert set(gguf_hub.sent) == {part.name for part in parts}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (NAME, "has 2 GGUF models: name one, such as someone/model/demo-F16.gguf"),
        (f"{NAME}:Q4_K_M", "no GGUF file of that name: it has demo-F16.gguf, demo-Q8_0-00001"),
        (f"{NAME}/other.gguf", "no file other.gguf: it has demo-F16.gguf"),
        ("someone/else:Q4_K_M", "the hub has no such public model"),
        (f"{NAME}/mmproj-demo-F16.gguf", "10 bytes are too few"),
    ],
)
def test_gguf_names_that_lead_nowhere(gguf_hub: Hub, name: str, message: str) -> None:
    with pytest.raises(CheckpointError) as found:
        open_header_model(name)
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_what_is_no_gguf_file_on_the_hub(gguf_hub: Hub, tiny_llama: Path, gguf_files: Path) -> None:
    gguf_hub.root = tiny_llama
    assert open_gguf_headers(NAME) is None
    assert open_gguf_headers("demo") is None
    assert open_gguf_headers(gguf_files / "demo-F16.gguf") is None
    assert open_gguf_headers("a/b/c/d") is None
