"""Kubernetes: a deployment with probes, a service, autoscaling on the queue, and what Prometheus' operator watches."""

from __future__ import annotations

from typing import Any

import yaml

from lowbit.ops.alerts.rules import rules
from lowbit.ops.deploy.run import CACHE, CONFIG, MODELS, PORT, USER, Deployment
from lowbit.ops.text_files import as_yaml

__all__ = ["kubernetes_files"]

QUEUE_METRIC = "lowbit_queue_requests"


def kubernetes_files(deployment: Deployment, *, keda: bool = False) -> dict[str, str]:
    """Path to text. The claim ``NAME-models`` holds the models by their names; the secret ``NAME-keys`` is made by
    hand, and no file has a key. With ``keda`` a ScaledObject scales instead of an HPA with prometheus-adapter.
    """
    name = deployment.name
    notes = "# Made by lowbit deploy.\n"
    keys = dict.fromkeys((*deployment.secrets, *([deployment.scrape_key] if deployment.scrape_key else [])))
    if keys:
        literals = " ".join(f"--from-literal={key}=…" for key in keys)
        notes += f"# First: kubectl create secret generic {name}-keys {literals}\n"
    if deployment.models:
        wanted = ", ".join(inside.removeprefix(f"{MODELS}/") for inside in deployment.models)
        notes += f"# The claim {name}-models must hold: {wanted} (lowbit restore DEST OUT fills it from a backup).\n"
    files = {
        "configmap.yaml": as_yaml(
            _object("v1", "ConfigMap", f"{name}-config", name, data={"serve.yaml": deployment.config})
        ),
        "volumes.yaml": _claim(deployment, f"{name}-models", "ReadOnlyMany", _models_size(deployment)),
        "deployment.yaml": notes + as_yaml(_deployment(deployment)),
        "service.yaml": as_yaml(_service(deployment)),
        "disruption.yaml": as_yaml(
            _object(
                "policy/v1", "PodDisruptionBudget", name, name, spec={"maxUnavailable": 1, "selector": _selector(name)}
            )
        ),
        "monitoring.yaml": _documents(_service_monitor(deployment), _prometheus_rule(deployment)),
    }
    if keda:
        files["scaling.yaml"] = as_yaml(_scaled_object(deployment))
    else:
        files["scaling.yaml"] = as_yaml(_autoscaler(deployment))
        files["prometheus-adapter.yaml"] = "# Values of the chart prometheus-adapter.\n" + as_yaml(_adapter())
    return files


def _object(api: str, kind: str, title: str, name: str, **fields: Any) -> dict[str, Any]:
    metadata = {"name": title, "labels": {"app.kubernetes.io/name": name}}
    return {"apiVersion": api, "kind": kind, "metadata": metadata, **fields}


def _selector(name: str) -> dict[str, Any]:
    return {"matchLabels": {"app.kubernetes.io/name": name}}


def _deployment(deployment: Deployment) -> dict[str, Any]:
    name = deployment.name
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": f"{name}-config"}},
        {"name": "cache", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _mib(deployment.shm)}},
    ]
    if deployment.models:
        claim = {"claimName": f"{name}-models", "readOnly": True}
        volumes.append({"name": "models", "persistentVolumeClaim": claim})
    pod = {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationGracePeriodSeconds": 40,
        "containers": [_container(deployment)],
        "volumes": volumes,
    }
    labels = {"app.kubernetes.io/name": name}
    # a replica that has a GPU cannot be started before another lets go of it
    strategy = (
        {"type": "Recreate"} if deployment.gpus else {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0}}
    )
    return _object(
        "apps/v1",
        "Deployment",
        name,
        name,
        spec={
            "replicas": deployment.replicas,
            "selector": _selector(name),
            "strategy": strategy,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    )


def _container(deployment: Deployment) -> dict[str, Any]:
    mounts = [
        {"name": "config", "mountPath": CONFIG.rpartition("/")[0], "readOnly": True},
        {"name": "cache", "mountPath": CACHE},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    if deployment.models:
        mounts.append({"name": "models", "mountPath": MODELS, "readOnly": True})
    # pages of /dev/shm count as the container's memory
    memory = _mib(deployment.memory + deployment.shm)
    limits: dict[str, Any] = {"memory": memory}
    if deployment.gpus:
        limits["nvidia.com/gpu"] = deployment.gpus
    secret = f"{deployment.name}-keys"
    return {
        "name": "gateway",
        "image": deployment.image,
        "args": ["serve", CONFIG, "--log"],
        "ports": [{"name": "http", "containerPort": PORT}],
        "env": [
            {"name": "LOWBIT_CACHE", "value": CACHE},
            *({"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}} for key in deployment.secrets),
        ],
        "resources": {"requests": {"cpu": f"{deployment.cpus:g}", "memory": memory}, "limits": limits},
        "startupProbe": {**_probe("/ready"), "periodSeconds": 5, "failureThreshold": max(1, -(-deployment.ready // 5))},
        "readinessProbe": {**_probe("/ready"), "periodSeconds": 5, "failureThreshold": 2},
        "livenessProbe": {**_probe("/health"), "periodSeconds": 10, "failureThreshold": 6},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }


def _probe(path: str) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": "http"}, "timeoutSeconds": 4}


def _service(deployment: Deployment) -> dict[str, Any]:
    ports = [{"name": "http", "port": PORT, "targetPort": "http"}]
    selector = _selector(deployment.name)["matchLabels"]
    return _object("v1", "Service", deployment.name, deployment.name, spec={"selector": selector, "ports": ports})


def _claim(deployment: Deployment, title: str, mode: str, size: int) -> str:
    spec = {"accessModes": [mode], "resources": {"requests": {"storage": _mib(size)}}}
    return as_yaml(_object("v1", "PersistentVolumeClaim", title, deployment.name, spec=spec))


def _models_size(deployment: Deployment) -> int:
    files = [file for path in deployment.models.values() for file in ([path] if path.is_file() else path.rglob("*"))]
    return max(1 << 30, sum(file.stat().st_size for file in files if file.is_file()) * 5 // 4)


def _autoscaler(deployment: Deployment) -> dict[str, Any]:
    target = {"type": "AverageValue", "averageValue": str(deployment.queue_target)}
    return _object(
        "autoscaling/v2",
        "HorizontalPodAutoscaler",
        deployment.name,
        deployment.name,
        spec={
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment.name},
            "minReplicas": deployment.replicas,
            "maxReplicas": deployment.max_replicas,
            "metrics": [{"type": "Pods", "pods": {"metric": {"name": QUEUE_METRIC}, "target": target}}],
            # a new replica has to load its model first: up at once, down slowly
            "behavior": {
                "scaleUp": {"stabilizationWindowSeconds": 0},
                "scaleDown": {"stabilizationWindowSeconds": max(300, min(3600, deployment.ready))},
            },
        },
    )


def _scaled_object(deployment: Deployment) -> dict[str, Any]:
    trigger = {
        "type": "prometheus",
        "metadata": {
            "serverAddress": "http://prometheus-operated.monitoring.svc:9090",
            "query": f'sum({QUEUE_METRIC}{{job="lowbit"}})',
            "threshold": str(deployment.queue_target),
        },
    }
    return _object(
        "keda.sh/v1alpha1",
        "ScaledObject",
        deployment.name,
        deployment.name,
        spec={
            "scaleTargetRef": {"name": deployment.name},
            "minReplicaCount": deployment.replicas,
            "maxReplicaCount": deployment.max_replicas,
            "triggers": [trigger],
        },
    )


def _adapter() -> dict[str, Any]:
    rule = {
        "seriesQuery": f'{QUEUE_METRIC}{{namespace!="",pod!=""}}',
        "resources": {"overrides": {"namespace": {"resource": "namespace"}, "pod": {"resource": "pod"}}},
        "name": {"matches": QUEUE_METRIC},
        "metricsQuery": "sum(<<.Series>>{<<.LabelMatchers>>}) by (<<.GroupBy>>)",
    }
    return {"rules": {"custom": [rule]}}


def _service_monitor(deployment: Deployment) -> dict[str, Any]:
    endpoint: dict[str, Any] = {
        "port": "http",
        "path": "/metrics",
        "interval": "15s",
        "relabelings": [{"targetLabel": "job", "replacement": "lowbit"}],
    }
    if deployment.scrape_key is not None:
        credentials = {"name": f"{deployment.name}-keys", "key": deployment.scrape_key}
        endpoint["authorization"] = {"type": "Bearer", "credentials": credentials}
    spec = {"selector": _selector(deployment.name), "endpoints": [endpoint]}
    return _object("monitoring.coreos.com/v1", "ServiceMonitor", deployment.name, deployment.name, spec=spec)


def _prometheus_rule(deployment: Deployment) -> dict[str, Any]:
    spec = yaml.safe_load(rules())
    return _object("monitoring.coreos.com/v1", "PrometheusRule", deployment.name, deployment.name, spec=spec)


def _mib(size: int) -> str:
    return f"{-(-size // 2**20)}Mi"


def _documents(*values: Any) -> str:
    return "---\n".join(map(as_yaml, values))
