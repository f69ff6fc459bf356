"""vLLM behind the gateway, for real: a dense and a W8A8 tier of one model, in an environment of their own.

    .venv/bin/python tests/engines/vllm_gateway_check.py .venvs/vllm/bin/python

What only a real engine can show: that it starts with the command line that lowbit writes, streams, counts prompts,
searches with beams, gives the prompt back, tells its figures, and ends with the gateway.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import socket
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import psutil

CONTEXT = 256
PATIENCE = 600.0


def make_config(folder: Path, python: str) -> Path:
    """Two tiers: the embedded model as it is, and quantized to W8A8 by the gateway."""
    common = {"engine": "vllm", "python": python, "context": CONTEXT, "concurrency": 4, "ready_timeout": PATIENCE}
    common["flags"] = {"extra": ["--enforce-eager", "--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20)]}
    common["env"] = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    tiers = [
        {"name": "bf16", "path": "demo", **common},
        {"name": "int8", "path": "demo", "quantize": "W8A8", **common},
    ]
    path = folder / "config.yaml"
    path.write_text(json.dumps({"models": {"tiny": {"tiers": tiers}}}))
    return path


@contextmanager
def serving(folder: Path, config: Path) -> Iterator[str]:
    """``lowbit serve`` as a process; afterwards nothing of it may be left."""
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lowbit", "serve", str(config), "--port", str(port), "--log"]
    environment = {**os.environ, "LOWBIT_CACHE": str(folder / "cache")}
    with (folder / "gateway.log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: get(f"{url}/health"), process)
        yield url
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(60) == 0
        gone, left = psutil.wait_procs(family, timeout=20)
        assert not left, f"left behind: {left}; {len(gone)} ended"
    finally:
        if process.poll() is None:
            process.kill()
        for name in ("gateway.log", "cache/logs/tiny_bf16.log", "cache/logs/tiny_int8.log"):
            if sys.exc_info()[0] is not None and (folder / name).exists():
                print(f"--- {name}\n" + "\n".join((folder / name).read_text().splitlines()[-25:]))


def until(condition: Any, process: subprocess.Popen[bytes]) -> None:
    """Wait for a condition while the process lives."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert process.poll() is None, "the gateway ended"
        try:
            condition()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("never answered")


def get(url: str) -> str:
    with urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


def post(url: str, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON."""
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, {key.lower(): value for key, value in answer.headers.items()}, json.load(answer)
    except HTTPError as error:
        return error.code, {}, json.load(error)


def check(url: str, tier: str) -> None:
    """Everything that a client may want of one tier."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
    ask: dict[str, Any] = {"model": f"tiny@{tier}", "prompt": "def add(a, b):\n", "max_tokens": 16, "temperature": 0}
    began = time.monotonic()
    whole = client.completions.create(**ask)
    print(f"{tier}: first answer after {time.monotonic() - began:.0f} s")
    pieces = list(client.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole.choices[0].text != ""
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == 16
    print(f"{tier}: streams the same text in {len(pieces)} pieces")

    status, headers, answer = post(f"{url}/v1/completions", {**ask, "use_beam_search": True, "n": 2})
    assert (status, headers["x-lowbit-tier"]) == (200, tier)
    assert len(answer["choices"]) == 2
    print(f"{tier}: beam search; x-lowbit-kl {headers.get('x-lowbit-kl')}")
    status, _, answer = post(f"{url}/v1/completions", {**ask, "echo": True, "logprobs": 1, "max_tokens": 1})
    assert status == 200
    assert answer["choices"][0]["text"].startswith(ask["prompt"])
    assert answer["choices"][0]["logprobs"]["token_logprobs"][1] < 0
    print(f"{tier}: gives the prompt back with its log-probabilities")
    status, _, answer = post(f"{url}/v1/completions", {**ask, "prompt": "word " * 2000})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded"), answer
    print(f"{tier}: {answer['error']['message']}")
    status, _, answer = post(f"{url}/tokenize", {"model": f"tiny@{tier}", "prompt": ask["prompt"]})
    assert status == 200
    assert len(answer["tokens"]) == whole.usage.prompt_tokens  # type: ignore[union-attr]
    chat = client.chat.completions.create(
        model=f"tiny@{tier}", messages=[{"role": "user", "content": "hello"}], max_tokens=4, temperature=0
    )
    assert chat.usage is not None
    assert chat.usage.completion_tokens <= 4
    print(f"{tier}: tokenizes and chats")


def check_metrics(url: str, tiers: list[str]) -> None:
    """The engines' own figures under the gateway's names."""
    samples = dict(line.rsplit(" ", 1) for line in get(f"{url}/metrics").splitlines() if not line.startswith("#"))
    for tier in tiers:
        labels = f'{{engine="vllm",model="tiny",tier="{tier}"}}'
        assert 0 <= float(samples[f"lowbit_kv_cache_usage_ratio{labels}"]) <= 1
        assert float(samples[f"lowbit_engine_generated_tokens{labels}"]) >= 36
        assert float(samples[f"lowbit_engine_memory_bytes{labels}"]) > 100e6
        planned = float(samples[f'lowbit_tier_memory_bytes{{model="tiny",tier="{tier}"}}'])
        print(f"{tier}: holds {planned / 2**20:.0f} MiB; KV usage and tokens told by the engine")
    if "int8" in tiers:
        assert float(samples['lowbit_quantization_kl{model="tiny",tier="int8"}']) > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="interpreter of the environment that has vLLM")
    parser.add_argument("--tiers", nargs="+", choices=("bf16", "int8"), default=["bf16", "int8"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        with serving(folder, make_config(folder, str(Path(arguments.python).absolute()))) as url:
            for tier in arguments.tiers:
                check(url, tier)
            time.sleep(6)  # the engines' memory is measured every five seconds
            check_metrics(url, arguments.tiers)
    print("vLLM behind the gateway: all as it should be")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
