"""Servers that the clients ask: `lowbit serve` as a process, over a real model and over a fake engine.

These checks run with the interpreter of the environment ``clients`` (``make test-clients``); the servers with the
project's own, which LOWBIT_PYTHON names.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("LOWBIT_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
FAKE = ROOT / "tests" / "gateway" / "fake_engine.py"


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[str]:
    """``lowbit serve`` with its log in ``folder``; gives the address once every model can answer."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "gateway.log"
    command = [PYTHON, "-m", "lowbit", "serve", *arguments, "--port", str(port), "--log", "--threads", "1"]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stderr=stream, env={**os.environ, "LOWBIT_CACHE": str(folder / "cache")})
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            assert process.poll() is None, log.read_text()
            try:
                with urlopen(f"{url}/ready"):
                    break
            except OSError:
                time.sleep(0.1)
        else:
            raise AssertionError(log.read_text())
        yield url
        assert process.poll() is None, log.read_text()
        assert '"event":"bug"' not in log.read_text(), log.read_text()
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real model in llama.cpp, as ``tiny``."""
    folder = tmp_path_factory.mktemp("tiny")
    with serving(folder, "demo", "--context", "1024", "--name", "tiny", "--quantize", "int8") as url:
        yield url


@pytest.fixture(scope="session")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An engine that says only ``w0 w1 …`` but knows tools and schemas: ``assistant``, ``embedder``, ``ranker``."""
    folder = tmp_path_factory.mktemp("fake")
    command = [PYTHON, str(FAKE), "--port", "{port}"]

    def model(kind: str) -> dict[str, object]:
        tier = {"name": "int4", "command": command, "engine": "openai", "memory": "64MiB", "pinned": True}
        return {"kind": kind, "tiers": [{**tier, "concurrency": 16}]}

    kinds = {"assistant": "chat", "embedder": "embedding", "ranker": "rerank"}
    config = folder / "serve.yaml"
    config.write_text(json.dumps({"models": {name: model(kind) for name, kind in kinds.items()}}))
    with serving(folder, str(config)) as url:
        yield url


@pytest.fixture(scope="session")
def open_to_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An engine elsewhere, so that no memory limit or precision is out of reach."""
    folder = tmp_path_factory.mktemp("open")
    engine = subprocess.Popen([PYTHON, str(FAKE), "--context", "1000000"], stdout=subprocess.PIPE, text=True)
    try:
        assert engine.stdout is not None
        url = f"http://127.0.0.1:{engine.stdout.readline().split()[1]}"
        kinds = {"assistant": "chat", "embedder": "embedding", "ranker": "rerank"}
        tier = {"name": "bf16", "url": url, "concurrency": 16}
        models = {name: {"kind": kind, "tiers": [tier]} for name, kind in kinds.items()}
        config = folder / "serve.yaml"
        config.write_text(json.dumps({"models": models}))
        with serving(folder, str(config)) as gateway:
            yield gateway
    finally:
        engine.kill()
        engine.wait()
