"""``lowbit serve`` as people run it: a process, a real model in llama.cpp, the official client."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import psutil
import pytest
from openai.types.chat import ChatCompletionToolParam

from lowbit.cli.main import main

pytest.importorskip("xllamacpp")


@contextmanager
def serving(cache: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that is ready; gives the process and the address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lowbit", "serve", *arguments, "--port", "0", "--threads", "1"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LOWBIT_CACHE": str(cache)},
    )
    try:
        assert process.stderr is not None
        url, said = "", ""
        for line in process.stderr:
            said += line
            if match := re.search(r"at (http://\S+)/v1", line):
                url = match[1]
            if ": ready" in line:
                break
        assert url, said
        yield process, url
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def server(cache: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with serving(cache, "demo", "--context", "512", "--name", "tiny", "--quantize", "int8") as found:
        yield found
        ends_with_everything(found[0], signal.SIGTERM)


def ends_with_everything(process: subprocess.Popen[str], number: int) -> None:
    """Send the signal; the server and all it started must be gone soon."""
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("lowbit.engines.llama_server" in each.cmdline() for each in family)
    process.send_signal(number)
    assert process.wait(20) == (0 if number == signal.SIGTERM else -number)
    end = time.monotonic() + 10
    while any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in family):
        assert time.monotonic() < end, "a process outlived the server"
        time.sleep(0.05)


def test_the_official_client_talks_to_a_real_model(server: tuple[subprocess.Popen[str], str]) -> None:
    client = openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0)
    assert "tiny" in [model.id for model in client.models.list()]
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "def add(a, b):"}], "temperature": 0, "seed": 1}
    whole = client.chat.completions.with_raw_response.create(**ask, max_tokens=12)
    assert whole.headers["x-lowbit-tier"] == "int8"
    assert 0 < float(whole.headers["x-lowbit-kl"]) < 0.1
    text = whole.parse().choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**ask, max_tokens=12, stream=True)
        if chunk.choices
    ]
    assert "".join(pieces) == text
    assert len(pieces) > 3
    completion = client.completions.create(model="tiny@int8", prompt="import os\n", max_tokens=4, logprobs=2)
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 4
    with pytest.raises(openai.BadRequestError, match="more than"):
        client.completions.create(model="tiny", prompt="word " * 2000, max_tokens=4)
    with pytest.raises(openai.NotFoundError, match="did you mean 'tiny'"):
        client.completions.create(model="tinny", prompt="x")


def test_structured_output_from_a_real_model(server: tuple[subprocess.Popen[str], str]) -> None:
    client = openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none")
    schema = {"enum": ["red", "blue"]}
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "a colour"}],
        response_format={"type": "json_schema", "json_schema": {"name": "colour", "schema": schema}},
        max_tokens=40,
    )
    assert json.loads(answer.choices[0].message.content or "") in ("red", "blue")


def test_tools_that_the_template_would_pass_over_are_refused(server: tuple[subprocess.Popen[str], str]) -> None:
    client = openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none")
    tools: list[ChatCompletionToolParam] = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    with pytest.raises(openai.BadRequestError, match="chat template of tiny@int8 knows none"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], tools=tools)
    show = urllib.request.Request(f"{server[1]}/api/show", b'{"model": "tiny"}', {"Content-Type": "application/json"})
    with urllib.request.urlopen(show) as response:
        assert json.load(response)["capabilities"] == ["completion"]


def test_the_engine_is_reached_only_through_the_gateway(server: tuple[subprocess.Popen[str], str]) -> None:
    """Its port is open on the loopback device: without the key that only the gateway has, it answers nothing."""
    children = psutil.Process(server[0].pid).children(recursive=True)
    engine = next(each for each in children if "lowbit.engines.llama_server" in each.cmdline())
    port = engine.cmdline()[engine.cmdline().index("--port") + 1]
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", b'{"prompt": "x"}')
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, timeout=10)
    assert not any("KEY" in argument.upper() for argument in engine.cmdline())


def test_killed_outright_it_leaves_nothing_behind(cache: Path) -> None:
    with serving(cache, "demo", "--context", "256", "--quantize", "int8") as (process, _):
        ends_with_everything(process, signal.SIGKILL)


def test_a_model_that_cannot_be_served_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF" + bytes(100))
    assert main(["serve", str(bad), "--port", "0", "--quiet"]) == 2
    assert main(["serve", str(tmp_path / "none.gguf"), "--port", "0", "--quiet"]) == 2
    error = capfd.readouterr().err
    assert error.count("lowbit: error:") == 2
    assert "bad.gguf" in error
    assert "Traceback" not in error


def test_usage_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "serve.yaml"
    config.write_text("models:\n  a:\n    tiers:\n      - {name: x, path: demo, contxt: 3}\n")
    for arguments, words in (
        ([], "name a model"),
        (["demo", "--api-key", "short"], "shorter than 8"),
        ([str(config)], "serve.yaml:4: unknown key 'models.a.tiers.0.contxt': did you mean 'context'?"),
        ([str(config), "--name", "b"], "--name is for one model"),
        (["demo", "--engine", "llama"], "invalid choice"),
    ):
        assert main(["serve", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_keys_are_made_and_hashed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--hash-key"]) == 0
    key, digest = re.findall(r"(?:key|hash): +(\S+)", capsys.readouterr().out)
    assert key.startswith("lb-")
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", digest)


def test_print_command(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(cache))
    assert main(["serve", "demo", "--quantize", "int8", "--print-command", "--quiet", "--context", "128"]) == 0
    out = capsys.readouterr().out
    assert "lowbit.engines.llama_server" in out
    assert "--context 128" in out
    assert "LOWBIT_ENGINE_KEY" not in out
