"""Deploy files against the schemas of those who read them: Kubernetes' own, and Compose's.

    make test-deploy

Run by the environment `deploy`, which has `kubernetes-validate` (the API's schemas) and `docker-compose` 1.29 (whose
package has the Compose specification's schema), with the interpreter that has lowbit as argument.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

LOWBIT = sys.argv[1]
CONFIGS = {
    "cpu": """\
api_keys: [env:TEAM_KEY]
models:
  chat:
    tiers:
      - {name: int8, path: demo, context: 512}
      - {name: cloud, url: "https://example.com/v1", api_key: env:CLOUD_KEY}
""",
    "gpus": """\
memory: 48GiB
models:
  big: {tiers: [{name: int4, path: org/big, engine: vllm, flags: {tensor_parallel: 4}}]}
""",
    "open": "insecure: true\nmemory: 1GiB\nmodels: {m: {tiers: [{name: x, path: demo}]}}\n",
}


def deploy(kind: str, config: Path, out: Path, *more: str) -> None:
    command = [LOWBIT, "-m", "lowbit", "deploy", kind, str(config), "-o", str(out), *more]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_kubernetes(out: Path) -> tuple[int, set[str]]:
    """How many objects hold, and the kinds that have no schema here."""
    held, unknown = 0, set()
    for path in sorted(out.glob("*.yaml")):
        for value in yaml.safe_load_all(path.read_text()):
            if "kind" not in value:
                continue
            if "." in value["apiVersion"].partition("/")[0] and not value["apiVersion"].endswith(".k8s.io/v1"):
                unknown.add(f"{value['apiVersion']} {value['kind']}")
                continue
            kubernetes_validate.validate(value, kubernetes_validate.latest_version(), strict=True)
            held += 1
    return held, unknown


def compose_schema() -> dict[str, Any]:
    found = importlib.util.find_spec("compose")
    assert found is not None
    assert found.submodule_search_locations
    path = Path(next(iter(found.submodule_search_locations)), "config", "compose_spec.json")
    value: dict[str, Any] = json.loads(path.read_text())
    # a project's name and secrets from the environment came to the specification after this release of its schema
    value["properties"].setdefault("name", {"type": "string"})
    value["definitions"]["secret"]["properties"].setdefault("environment", {"type": "string"})
    return value


def must_fail() -> None:
    """That the schemas refuse anything at all."""
    for check in (
        lambda: jsonschema.validate({"services": {"a": {"imag": "x"}}}, compose_schema()),
        lambda: kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "x"}, "spec": {"prts": []}},
            kubernetes_validate.latest_version(),
            strict=True,
        ),
    ):
        try:
            check()
        except (jsonschema.ValidationError, kubernetes_validate.ValidationError):
            continue
        raise AssertionError("a schema takes nonsense")


def main() -> int:
    must_fail()
    with tempfile.TemporaryDirectory() as folder:
        for name, text in CONFIGS.items():
            config = Path(folder, f"{name}.yaml")
            config.write_text(text)
            deploy("compose", config, Path(folder, name, "compose"))
            jsonschema.validate(
                yaml.safe_load(Path(folder, name, "compose", "compose.yaml").read_text()), compose_schema()
            )
            held, unknown = 0, set()
            for flags in ([], ["--keda"]):
                out = Path(folder, name, f"kubernetes{len(flags)}")
                deploy("kubernetes", config, out, *flags)
                count, kinds = check_kubernetes(out)
                held, unknown = held + count, unknown | kinds
            print(
                f"{name}: compose.yaml and {held} Kubernetes objects hold; no schema for {', '.join(sorted(unknown))}"
            )
    docker = shutil.which("docker")
    daemon = docker and subprocess.run([docker, "info"], capture_output=True).returncode == 0
    print("images: NOT BUILT" + ("" if daemon else ": no Docker daemon here"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
