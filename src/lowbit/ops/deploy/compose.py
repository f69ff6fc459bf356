"""Docker Compose: gateway, Prometheus and Grafana."""

from __future__ import annotations

from typing import Any

from lowbit.ops.alerts.dashboard import dashboard
from lowbit.ops.alerts.rules import rules, runbook
from lowbit.ops.deploy.run import CACHE, CONFIG, PORT, USER, Deployment
from lowbit.ops.text_files import as_yaml

__all__ = ["PROBE", "compose_files", "prometheus_config"]

PROMETHEUS = "prom/prometheus:v3.5.0"
GRAFANA = "grafana/grafana:12.1.0"
PROBE = "import urllib.request as u; u.urlopen('http://127.0.0.1:{port}{path}', timeout=4)"
"""The images have Python, and no curl."""


def compose_files(deployment: Deployment) -> dict[str, str]:
    """Path to text: compose.yaml and what it mounts. Secrets are variables that ``docker compose`` refuses to lack."""
    value = {
        "name": deployment.name,
        "services": {
            "gateway": _gateway(deployment),
            "prometheus": _prometheus(deployment),
            "grafana": _grafana(),
        },
        "volumes": {"cache": {}, "metrics": {}, "dashboards": {}},
    }
    if deployment.scrape_key is not None:
        value["secrets"] = {"scrape-key": {"environment": deployment.scrape_key}}
    return {
        "compose.yaml": "# Made by lowbit deploy. Keys come from the environment or from .env, which stays out of "
        f"version control: {', '.join(_variables(deployment))}.\n" + as_yaml(value),
        "serve.yaml": deployment.config,
        "prometheus.yml": prometheus_config(deployment, "gateway"),
        "rules.yaml": rules(),
        "runbooks.md": runbook(),
        "grafana/datasource.yaml": as_yaml(
            {
                "apiVersion": 1,
                "datasources": [
                    {"name": "Prometheus", "type": "prometheus", "url": "http://prometheus:9090", "isDefault": True}
                ],
            }
        ),
        "grafana/dashboards.yaml": as_yaml(
            {
                "apiVersion": 1,
                "providers": [{"name": "lowbit", "options": {"path": "/var/lib/grafana/dashboards"}}],
            }
        ),
        "grafana/lowbit.json": dashboard() + "\n",
    }


def _variables(deployment: Deployment) -> list[str]:
    """All that must be set where ``docker compose up`` is called."""
    named = (*deployment.secrets, deployment.scrape_key, "GRAFANA_PASSWORD")
    return list(dict.fromkeys(name for name in named if name is not None))


def prometheus_config(deployment: Deployment, host: str) -> str:
    """Prometheus' own configuration: it scrapes the gateway, with its key where it has one."""
    job: dict[str, Any] = {"job_name": "lowbit", "static_configs": [{"targets": [f"{host}:{PORT}"]}]}
    if deployment.scrape_key is not None:
        job["authorization"] = {"credentials_file": "/run/secrets/scrape-key"}
    return as_yaml(
        {
            "global": {"scrape_interval": "15s", "evaluation_interval": "15s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [job],
        }
    )


def _gateway(deployment: Deployment) -> dict[str, Any]:
    mounts = [{"type": "bind", "source": "./serve.yaml", "target": CONFIG, "read_only": True}]
    for inside, path in deployment.models.items():
        mounts.append({"type": "bind", "source": str(path).replace("$", "$$"), "target": inside, "read_only": True})
    limits: dict[str, Any] = {"cpus": f"{deployment.cpus:g}", "memory": f"{deployment.memory // 2**20}M"}
    resources: dict[str, Any] = {"limits": limits}
    if deployment.gpus:
        device = {"driver": "nvidia", "count": deployment.gpus, "capabilities": ["gpu"]}
        resources["reservations"] = {"devices": [device]}
    return {
        "image": deployment.image,
        "command": ["serve", CONFIG, "--log"],
        "user": f"{USER}:{USER}",
        "environment": {
            "LOWBIT_CACHE": CACHE,
            **{name: f"${{{name}:?set it in the environment or in .env}}" for name in deployment.secrets},
        },
        "ports": [f"127.0.0.1:{PORT}:{PORT}"],
        "volumes": [*mounts, {"type": "volume", "source": "cache", "target": CACHE}],
        "shm_size": f"{deployment.shm // 2**20}m",
        "deploy": {"resources": resources},
        "healthcheck": {
            "test": ["CMD", "python", "-c", PROBE.format(port=PORT, path="/ready")],
            "interval": "10s",
            "timeout": "5s",
            "retries": 6,
            "start_period": f"{deployment.ready}s",
        },
        "restart": "unless-stopped",
        "stop_grace_period": "40s",
        "read_only": True,
        "tmpfs": ["/tmp"],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
    }


def _prometheus(deployment: Deployment) -> dict[str, Any]:
    service: dict[str, Any] = {
        "image": PROMETHEUS,
        "volumes": [
            {
                "type": "bind",
                "source": "./prometheus.yml",
                "target": "/etc/prometheus/prometheus.yml",
                "read_only": True,
            },
            {"type": "bind", "source": "./rules.yaml", "target": "/etc/prometheus/rules.yaml", "read_only": True},
            {"type": "volume", "source": "metrics", "target": "/prometheus"},
        ],
        "ports": ["127.0.0.1:9090:9090"],
        "restart": "unless-stopped",
    }
    if deployment.scrape_key is not None:
        service["secrets"] = ["scrape-key"]
    return service


def _grafana() -> dict[str, Any]:
    files = {
        "datasource.yaml": "/etc/grafana/provisioning/datasources/lowbit.yaml",
        "dashboards.yaml": "/etc/grafana/provisioning/dashboards/lowbit.yaml",
        "lowbit.json": "/var/lib/grafana/dashboards/lowbit.json",
    }
    return {
        "image": GRAFANA,
        "environment": {"GF_SECURITY_ADMIN_PASSWORD": "${GRAFANA_PASSWORD:?set it in the environment or in .env}"},
        "volumes": [
            {"type": "volume", "source": "dashboards", "target": "/var/lib/grafana"},
            *(
                {"type": "bind", "source": f"./grafana/{name}", "target": target, "read_only": True}
                for name, target in files.items()
            ),
        ],
        "ports": ["127.0.0.1:3000:3000"],
        "depends_on": ["prometheus"],
        "restart": "unless-stopped",
    }
