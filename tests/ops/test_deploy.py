"""Deploy files: what the configuration says is in them, no key is, and what reads them accepts them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from lowbit.cli.main import main

pytest.importorskip("pydantic")

ROOT = Path(__file__).parents[2]
KINDS = ("compose", "kubernetes", "systemd")

Deploy = Callable[..., Path]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "My-Model-Q4.gguf"
    path.write_bytes(bytes(1000))
    return path


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    path = tmp_path / "serve.yaml"
    path.write_text(
        f"""\
api_keys: [env:TEAM_KEY, "sha256:{"a" * 64}"]
memory: 6GiB
threads: 3
models:
  chat:
    tiers:
      - {{name: int4, path: {model.name}, context: 4096, concurrency: 8, ready_timeout: 2m}}
      - {{name: cloud, url: "https://example.com/v1", api_key: env:CLOUD_KEY}}
"""
    )
    return path


@pytest.fixture
def deploy(tmp_path: Path, config: Path) -> Deploy:
    def make(kind: str, *more: str, text: str | None = None) -> Path:
        if text is not None:
            config.write_text(text)
        out = tmp_path / f"out-{kind}"
        assert main(["deploy", kind, str(config), "-o", str(out), "--program", sys.executable, *more]) == 0
        return out

    return make


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_compose(deploy: Deploy, model: Path) -> None:
    out = deploy("compose")
    value = read(out / "compose.yaml")
    gateway = value["services"]["gateway"]
    assert gateway["deploy"]["resources"]["limits"] == {"cpus": "3", "memory": f"{7 * 1024}M"}
    assert "reservations" not in gateway["deploy"]["resources"]
    assert gateway["healthcheck"]["start_period"] == "600s"
    assert gateway["environment"]["TEAM_KEY"].startswith("${TEAM_KEY:?")
    bound = {mount["target"]: mount for mount in gateway["volumes"]}
    assert bound[f"/models/{model.name}"]["source"] == str(model)
    for service in value["services"].values():
        for mount in service["volumes"]:
            assert mount["type"] == "volume" or mount["read_only"]
            if mount["type"] == "volume":
                assert mount["source"] in value["volumes"]
            elif mount["source"].startswith("./"):
                assert (out / mount["source"]).is_file()
        for secret in service.get("secrets", ()):
            assert secret in value["secrets"]
    served = read(out / "serve.yaml")
    assert served["models"]["chat"]["tiers"][0]["path"] == f"/models/{model.name}"
    assert (served["host"], served["port"], served["memory"]) == ("0.0.0.0", 8000, 6 * 2**30)
    scrape = read(out / "prometheus.yml")
    assert scrape["scrape_configs"][0]["job_name"] == "lowbit"
    assert scrape["scrape_configs"][0]["static_configs"] == [{"targets": ["gateway:8000"]}]


def test_kubernetes(deploy: Deploy) -> None:
    out = deploy("kubernetes", "--replicas", "2", "--max-replicas", "6")
    pod = read(out / "deployment.yaml")["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] == 600
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    keys = {each["name"]: each["valueFrom"]["secretKeyRef"] for each in container["env"] if "valueFrom" in each}
    assert keys == {name: {"name": "lowbit-keys", "key": name} for name in ("TEAM_KEY", "CLOUD_KEY")}
    scaler = read(out / "scaling.yaml")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 6)
    metric = scaler["metrics"][0]["pods"]["metric"]["name"]
    from lowbit.ops.alerts.rules import declared_metrics

    assert metric in declared_metrics()
    assert metric in (out / "prometheus-adapter.yaml").read_text()
    monitor, rule = yaml.safe_load_all((out / "monitoring.yaml").read_text())
    assert monitor["spec"]["endpoints"][0]["authorization"]["credentials"]["key"] == "TEAM_KEY"
    assert {group["name"] for group in rule["spec"]["groups"]} == {"lowbit", "lowbit-recorded"}
    ports = read(out / "service.yaml")["spec"]["ports"]
    assert ports[0]["targetPort"] == container["ports"][0]["name"]


def test_keda(deploy: Deploy) -> None:
    out = deploy("kubernetes", "--keda")
    trigger = read(out / "scaling.yaml")["spec"]["triggers"][0]
    assert "lowbit_queue_requests" in trigger["metadata"]["query"]
    assert not (out / "prometheus-adapter.yaml").exists()


def test_gpus_and_shared_memory_of_the_planner(deploy: Deploy) -> None:
    from lowbit.planning.serving import shm_advice

    text = """\
memory: 20GiB
models:
  big: {tiers: [{name: int4, path: org/big, engine: vllm, flags: {tensor_parallel: 4}}]}
"""
    gateway = read(deploy("compose", text=text) / "compose.yaml")["services"]["gateway"]
    assert gateway["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 4
    assert gateway["shm_size"] == f"{shm_advice(4) * 1024}m"
    assert gateway["image"].endswith("-cuda")
    pod = read(deploy("kubernetes") / "deployment.yaml")["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 4
    shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")["emptyDir"]
    assert shm == {"medium": "Memory", "sizeLimit": f"{shm_advice(4) * 1024}Mi"}


@pytest.mark.parametrize("kind", KINDS)
def test_no_key_is_in_any_file(kind: str, deploy: Deploy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAM_KEY", "very-secret-team")
    monkeypatch.setenv("CLOUD_KEY", "very-secret-cloud")
    for path in deploy(kind).rglob("*"):
        assert not path.is_file() or "very-secret" not in path.read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_that_is_written_loads(kind: str, deploy: Deploy, tmp_path: Path, model: Path) -> None:
    from lowbit.gateway.config import load_config

    out = deploy(kind)
    if kind == "kubernetes":
        (out / "serve.yaml").write_text(read(out / "configmap.yaml")["data"]["serve.yaml"])
    loaded = load_config(out / "serve.yaml")
    assert list(loaded.models) == ["chat"]
    assert loaded.models["chat"].tiers[0].concurrency == 8
    if kind == "systemd":
        assert loaded.models["chat"].tiers[0].path == str(model)


def test_without_keys_one_is_wanted_unless_insecure(deploy: Deploy) -> None:
    bare = "memory: 1GiB\nmodels: {m: {tiers: [{name: x, path: demo}]}}\n"
    assert read(deploy("compose", text=bare) / "serve.yaml")["api_keys"] == ["env:LOWBIT_KEY"]
    out = deploy("compose", "--overwrite", text=f"insecure: true\n{bare}")
    assert "api_keys" not in read(out / "serve.yaml")
    assert "secrets" not in read(out / "compose.yaml")


def test_memory_is_planned_where_nobody_says_it(deploy: Deploy) -> None:
    out = deploy("compose", text="models: {m: {tiers: [{name: x, path: demo, context: 512}]}}\n")
    assert 5e6 < read(out / "serve.yaml")["memory"] < 5e8


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(deploy: Deploy) -> None:
    out = deploy("systemd")
    done = subprocess.run(
        ["systemd-analyze", "verify", str(out / "lowbit.service")], capture_output=True, text=True, timeout=60
    )
    complaints = [line for line in done.stderr.splitlines() if "lowbit.service" in line]
    assert complaints == []
    unit = (out / "lowbit.service").read_text()
    assert f"MemoryMax={7 * 2**30}\n" in unit
    assert "EnvironmentFile=/etc/lowbit/environment\n" in unit


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("models: {}\n", [], "models"),
        ("models: {m: {tiers: [{name: x, path: ./gone.gguf}]}}\n", [], "no such file or directory to mount"),
        ("models: {m: {tiers: [{name: x, path: demo, env: {HF_TOKEN: hf_1}}]}}\n", [], "HF_TOKEN holds a secret"),
        ("models: {m: {tiers: [{name: x, url: 'http://h'}]}}\n", [], "--memory"),
        ("models: {m: {tiers: [{name: x, path: org/name}]}}\n", [], "--memory"),
        ("api_keys: [secret]\nmodels: {m: {tiers: [{name: x, path: demo}]}}\n", [], "never as it is"),
        (None, ["--name", "No Name"], "--name"),
        (None, ["--image", "a b"], "--image"),
        (None, ["--gpus", "-1"], "--gpus"),
        (None, ["--replicas", "5", "--max-replicas", "2"], "--replicas"),
        (None, ["--memory", "much"], "--memory"),
    ],
)
def test_bad_input(
    text: str | None, arguments: list[str], words: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        config.write_text(text)
    for kind in KINDS:
        assert main(["deploy", kind, str(config), "-o", str(tmp_path / "x"), *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_other_bad_input(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "systemd", str(config), "-o", str(tmp_path / "x"), "--program", "bin/lowbit"]) == 2
    assert main(["deploy", "compose", str(tmp_path / "none.yaml"), "-o", str(tmp_path / "x")]) == 2
    assert main(["deploy", "swarm", str(config), "-o", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()
    assert main(["deploy", "compose", str(config), "-o", str(tmp_path / "x")]) == 0
    assert main(["deploy", "compose", str(config), "-o", str(tmp_path / "x")]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_asks_and_believes_the_answer(status: int) -> None:
    from lowbit.ops.deploy.compose import PROBE

    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.handle_request)
        thread.start()
        probe = PROBE.format(port=server.server_address[1], path="/ready")
        done = subprocess.run([sys.executable, "-c", probe], capture_output=True, timeout=30)
        thread.join()
    assert asked == ["/ready"]
    assert (done.returncode == 0) is (status == 200)
    assert PROBE.format(port=8000, path="/ready") in (ROOT / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, lines joined."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text())
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_dockerfile_speaks_of_what_is_there() -> None:
    text = (ROOT / "pyproject.toml").read_text()  # Python 3.10 has no reader of TOML
    version = re.search(r'(?m)^version = "(.+)"', text)
    extras = set(re.findall(r"(?m)^([a-z-]+) = \[", text.partition("[project.optional-dependencies]")[2]))
    assert version is not None
    ignored = (ROOT / ".dockerignore").read_text()
    stages = [rest.split()[-1] for name, rest in instructions() if name == "FROM"]
    assert stages == ["base", "cpu", "cuda"]
    for name, rest in instructions():
        assert name in {
            "FROM",
            "ENV",
            "RUN",
            "WORKDIR",
            "COPY",
            "ARG",
            "USER",
            "EXPOSE",
            "HEALTHCHECK",
            "ENTRYPOINT",
            "CMD",
        }
        if name == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}\n" in ignored
        for extra in re.findall(r"'\.\[([a-z,-]+)\]'", rest):
            assert set(extra.split(",")) <= extras
        if name == "USER":
            from lowbit.ops.deploy.run import USER

            assert rest == f"{USER}:{USER}"
    assert version[1] in (ROOT / "Dockerfile").read_text()
