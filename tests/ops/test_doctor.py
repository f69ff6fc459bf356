"""What doctor finds in damaged checkpoints and ailing gateways, and that it keeps quiet about healthy ones."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from lowbit.checkpoint import MANIFEST_NAME
from lowbit.checkpoint.location import DEMO_DIRECTORY
from lowbit.cli.main import VERBS, main
from lowbit.ops.alerts.table import ALERTS
from lowbit.ops.doctor.gateway import FIGURES, examine_gateway
from lowbit.ops.doctor.model import examine_model
from lowbit.ops.doctor.run import GATEWAY, MODEL, Report
from lowbit.planning.hardware import Hardware

pytest.importorskip("prometheus_client")

MACHINE = Hardware(4, "test", True, False, False, 2**33, 2**33)


def test_commands_that_mend_exist() -> None:
    texts = [text for alert in ALERTS for text in (*alert.look, *alert.mend)]
    texts += [each.mend for table in (MODEL, GATEWAY) for each in table.values()]
    verbs = {verb for text in texts for verb in re.findall(r"(?<![\w@])lowbit ([a-z-]+)", text)}
    assert verbs <= set(VERBS)
    assert {"restore", "quantize", "doctor"} <= verbs
    for table in (MODEL, GATEWAY):
        for each in table.values():
            assert each.symptom
            assert each.measured
            assert each.origin


def test_figures_belong_to_alerts() -> None:
    names = {alert.name for alert in ALERTS}
    assert {figure.alert for figure in FIGURES} <= names


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import lowbit

    out = tmp_path_factory.mktemp("quantized") / "int8"
    lowbit.quantize("demo", str(out), scheme="W8A16", method="rtn", certify_tokens=256)
    return out


@pytest.fixture
def model(quantized: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized, tmp_path / "model"))


def states(report: Report) -> dict[str, str]:
    """Check to its state; a finding wins."""
    found: dict[str, str] = {}
    for result in report.results:
        found[result.check] = result.state if found.get(result.check) != "finding" else "finding"
    return found


def test_a_healthy_checkpoint(quantized: Path) -> None:
    report = examine_model(str(quantized), hardware=MACHINE)
    assert report.healthy, report
    assert set(states(report)) == set(MODEL)
    assert all(not result.mend for result in report.results)


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def uncertified(model: Path) -> None:
    edit(model / MANIFEST_NAME, lambda manifest: manifest.update(quality=None))


def diverging(model: Path) -> None:
    edit(model / MANIFEST_NAME, lambda manifest: manifest["quality"].update(kl_divergence=0.4, verdicts=[]))


def outlier(model: Path) -> None:
    edit(model / MANIFEST_NAME, lambda m: next(iter(m["modules"].values())).update(weight_error=0.3))


def flipped(model: Path) -> None:
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1000] ^= 1
    (model / "model.safetensors").write_bytes(data)


def no_tokenizer(model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()


def no_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink()


def truncated(model: Path) -> None:
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "check", "words"),
    [
        (uncertified, "certificate", "nobody measured"),
        (diverging, "certificate", "0.4 nats"),
        (outlier, "modules", "0.3"),
        (flipped, "files", "sha256"),
        (truncated, "files", "cut short"),
        (no_tokenizer, "tokenizer", "there is none"),
        (no_template, "chat template", "there is none"),
    ],
)
def test_damage(damage: Callable[[Path], None], check: str, words: str, model: Path) -> None:
    damage(model)
    report = examine_model(str(model), hardware=MACHINE)
    found = [result for result in report.results if result.check == check and result.state == "finding"]
    assert found, report
    assert any(words in result.detail for result in found)
    assert all(result.mend for result in found)
    assert not report.healthy


def test_zero_scales_are_suspicious(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if "scale" in name)
    tensors[name].view(-1)[:3] = 0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    found = [r for r in examine_model(str(model), hardware=MACHINE).results if r.check == "scales"]
    assert found[0].state == "finding"
    assert "scales are zero" in found[0].detail


def test_too_little_memory_and_no_engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Hardware(4, "test", True, False, False, 2**20, 2**20)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = states(examine_model(str(model), quick=True, hardware=small))
    assert (found["memory"], found["engine"], found["files"], found["scales"]) == (
        "finding",
        "finding",
        "ok",
        "not measured",
    )


def test_a_gguf_file(tmp_path: Path) -> None:
    import lowbit

    lowbit.convert("demo", str(tmp_path / "demo.gguf"))
    found = states(examine_model(str(tmp_path / "demo.gguf"), hardware=MACHINE))
    assert (found["files"], found["tokenizer"], found["chat template"], found["memory"]) == ("ok",) * 4


def test_exit_statuses(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(DEMO_DIRECTORY), "--quick", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["healthy"] is True
    uncertified(model)
    assert main(["doctor", str(model), "--quick", "--quiet"]) == 1
    out = capsys.readouterr().out
    assert "FINDING" in out
    assert "mend certificate: lowbit quantize" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing/here/at/all"], "no such directory"),
        (["ftp://x"], "not an http(s) url"),
        (["http://"], "not an http(s) url"),
        (["http://127.0.0.1:1", "--api-key", "secret"], "env:NAME"),
        (["http://127.0.0.1:1", "--api-key", "env:LOWBIT_NOT_SET"], "not set"),
        (["demo", "--ttft", "soon"], "not a number"),
    ],
)
def test_bad_input(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_nobody_listens() -> None:
    report = examine_gateway("http://127.0.0.1:1")
    assert [(result.check, result.state) for result in report.results] == [("reachable", "finding")]


HEALTHY = """\
# TYPE lowbit_tier_state gauge
lowbit_tier_state{model="chat",tier="int4",state="ready"} 1
# TYPE lowbit_requests counter
lowbit_requests_total{model="chat",status="200"} 5000
lowbit_requests_total{model="chat",status="500"} 1
lowbit_engine_restarts_total{model="chat",tier="int4"} 0
lowbit_engine_crashes_total{model="chat",tier="int4"} 0
lowbit_engine_load_failures_total{model="chat",tier="int4"} 0
lowbit_circuit_open{model="chat",tier="int4"} 0
lowbit_level{model="chat"} 0
lowbit_queue_requests{model="chat"} 3
lowbit_queue_limit_requests 256
lowbit_engine_waiting{model="chat",tier="int4"} 0
lowbit_kv_cache_usage_ratio{model="chat",tier="int4"} 0.4
lowbit_engine_memory_bytes{model="chat",tier="int4"} 100
lowbit_memory_budget_bytes 1000
lowbit_memory_available_bytes 500
lowbit_memory_total_bytes 1000
lowbit_quantization_kl{model="chat",tier="int4"} 0.02
lowbit_quantization_error{model="chat",tier="int4"} 0.1
lowbit_tier_bits{model="chat",tier="int4"} 4
lowbit_tier_bits{model="chat",tier="bf16"} 16
lowbit_inter_token_latency_seconds_sum{model="chat",tier="int4"} 1
lowbit_inter_token_latency_seconds_count{model="chat",tier="int4"} 100
lowbit_inter_token_latency_seconds_sum{model="chat",tier="bf16"} 3
lowbit_inter_token_latency_seconds_count{model="chat",tier="bf16"} 100
"""


class Server:
    """Answers from a table, path to status and text."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, str]] = {
            "/v1/models": (200, json.dumps({"data": [{"id": "chat"}, {"id": "chat@int4"}]})),
            "/ready": (200, "{}"),
            "/v1/completions": (200, "{}"),
            "/metrics": (200, HEALTHY),
        }
        self.keys: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                outer.keys.append(self.headers.get("Authorization"))
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, text = outer.answers.get(self.path, (404, "{}"))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_POST = answer  # noqa: N815

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = Thread(target=made.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield made
    made.http.shutdown()
    made.http.server_close()


def test_a_healthy_gateway(server: Server) -> None:
    report = examine_gateway(f"{server.url}/v1/", key="k")
    assert report.healthy, report
    assert {figure.check for figure in FIGURES} <= set(states(report))
    assert set(server.keys) == {"Bearer k"}


AILMENTS = {
    "tiers": ('state="ready"', 'state="failed"'),
    "errors": ('status="500"} 1', 'status="500"} 99'),
    "restarts": ('restarts_total{model="chat",tier="int4"} 0', 'restarts_total{model="chat",tier="int4"} 2'),
    "crashes": ('crashes_total{model="chat",tier="int4"} 0', 'crashes_total{model="chat",tier="int4"} 1'),
    "failed loads": ('failures_total{model="chat",tier="int4"} 0', 'failures_total{model="chat",tier="int4"} 1'),
    "circuit": ('open{model="chat",tier="int4"} 0', 'open{model="chat",tier="int4"} 1'),
    "degraded": ('level{model="chat"} 0', 'level{model="chat"} 1'),
    "queue": ('requests{model="chat"} 3', 'requests{model="chat"} 250'),
    "engine queue": ('waiting{model="chat",tier="int4"} 0', 'waiting{model="chat",tier="int4"} 4'),
    "KV cache": ('ratio{model="chat",tier="int4"} 0.4', 'ratio{model="chat",tier="int4"} 0.99'),
    "memory": ('memory_bytes{model="chat",tier="int4"} 100', 'memory_bytes{model="chat",tier="int4"} 1050'),
    "machine memory": ("available_bytes 500", "available_bytes 50"),
    "speed": ('sum{model="chat",tier="int4"} 1', 'sum{model="chat",tier="int4"} 4'),
    "divergence": ('kl{model="chat",tier="int4"} 0.02', 'kl{model="chat",tier="int4"} 0.3'),
    "weight error": ('error{model="chat",tier="int4"} 0.1', 'error{model="chat",tier="int4"} 0.4'),
    "certificates": ('lowbit_quantization_kl{model="chat"', 'lowbit_quantization_kl{model="other"'),
}


def test_every_figure_has_its_ailment() -> None:
    assert set(AILMENTS) == {figure.check for figure in FIGURES}


@pytest.mark.parametrize("check", AILMENTS)
def test_an_ailing_gateway(check: str, server: Server) -> None:
    before, after = AILMENTS[check]
    assert before in HEALTHY
    server.answers["/metrics"] = (200, HEALTHY.replace(before, after))
    report = examine_gateway(server.url)
    assert [result.check for result in report.results if result.state == "finding"] == [check]
    assert all(result.mend for result in report.results if result.state == "finding")


@pytest.mark.parametrize(
    ("path", "answer", "check"),
    [
        ("/ready", (503, '{"status": "loading"}'), "ready"),
        ("/v1/models", (200, '{"data": []}'), "models"),
        ("/v1/models", (500, "<html>"), "models"),
        ("/v1/completions", (500, "<html>\nbroken"), "probe"),
        ("/metrics", (200, "{{{ nonsense"), "metrics"),
    ],
)
def test_a_route_that_fails(path: str, answer: tuple[int, str], check: str, server: Server) -> None:
    server.answers[path] = answer
    report = examine_gateway(server.url)
    assert states(report)[check] == "finding"
    assert all("\n" not in result.detail for result in report.results)


def test_slower_than_the_objective(server: Server) -> None:
    assert states(examine_gateway(server.url, ttft=0.0))["probe"] == "finding"


def test_another_server_is_measured_as_far_as_it_tells(server: Server) -> None:
    server.answers["/metrics"] = (200, "vllm:kv_cache_usage_perc 0.99\nvllm:num_requests_waiting 0\n")
    del server.answers["/ready"]
    found = states(examine_gateway(server.url))
    assert (found["KV cache"], found["engine queue"], found["ready"]) == ("finding", "ok", "not measured")
    assert found["restarts"] == "not measured"


def test_a_key_that_is_refused(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.answers["/v1/models"] = (401, "{}")
    assert main(["doctor", server.url]) == 2
    assert "wants an API key" in capsys.readouterr().err


def test_the_real_gateway() -> None:
    """Over a fake engine, whole and then with an engine that fails."""
    from fake_engine import Engine
    from harness import gateway, run

    async def scenario() -> None:
        engine = Engine()  # its process is this one, far larger than the pretended budget: a finding about memory
        async with gateway([engine]) as bench:
            healthy = await asyncio.to_thread(examine_gateway, bench.url)
            found = states(healthy)
            assert [check for check, state in found.items() if state == "finding"] == ["memory"], healthy
            assert found["probe"] == "ok"
            assert found["tiers"] == "ok"
            engine.fault = "error500"
            ailing = states(await asyncio.to_thread(examine_gateway, bench.url))
            assert ailing["probe"] == "finding"

    run(scenario)
