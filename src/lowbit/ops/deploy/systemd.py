"""systemd: a unit for one machine without containers."""

from __future__ import annotations

from pathlib import Path

import yaml

from lowbit.errors import UsageError
from lowbit.gateway.config import ServeConfig
from lowbit.ops.deploy.run import CACHE, Deployment
from lowbit.ops.text_files import as_yaml

__all__ = ["systemd_files"]


def systemd_files(deployment: Deployment, config: ServeConfig, program: Path) -> dict[str, str]:
    """Path to text: the unit, and ``config`` with absolute paths of this machine.

    Keys come from ``/etc/NAME/environment``, which the administrator writes, readable by root alone. Raises
    :class:`UsageError` where ``program`` is no absolute path or one that a unit cannot name.
    """
    if not program.is_absolute() or any(character in str(program) for character in " \"'\\%$"):
        raise UsageError(f"--program {program}: must be an absolute path without spaces, quotes, % and $")
    name = deployment.name
    keys = ", ".join(f"{key}=…" for key in deployment.secrets)
    lines = [
        "# Made by lowbit deploy. To install:",
        f"#   install -D -m 644 serve.yaml /etc/{name}/serve.yaml",
    ]
    if keys:
        lines.append(f"#   write {keys} to /etc/{name}/environment, chmod 600")
    lines += [
        f"#   install -m 644 {name}.service /etc/systemd/system/ && systemctl enable --now {name}",
        "[Unit]",
        "Description=lowbit: models behind an OpenAI-compatible address",
        "After=network-online.target",
        "Wants=network-online.target",
        "StartLimitIntervalSec=600",
        "StartLimitBurst=5",
        "",
        "[Service]",
        "Type=exec",
        f"ExecStart={program} serve /etc/{name}/serve.yaml --log",
        f"EnvironmentFile={'' if keys else '-'}/etc/{name}/environment",
        f"Environment=LOWBIT_CACHE={CACHE}",
        "Restart=on-failure",
        "RestartSec=5",
        f"TimeoutStartSec={deployment.ready}",
        "TimeoutStopSec=40",
        "KillMode=mixed",
        f"MemoryMax={deployment.memory}",
        f"CPUQuota={round(100 * deployment.cpus)}%",
        "TasksMax=4096",
        "LimitNOFILE=65536",
        "",
        "DynamicUser=yes",
        f"CacheDirectory={CACHE.removeprefix('/var/cache/')}",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "ProtectHome=read-only",
        "PrivateTmp=yes",
        f"PrivateDevices={'no' if deployment.gpus else 'yes'}",
        "ProtectKernelTunables=yes",
        "ProtectKernelModules=yes",
        "ProtectControlGroups=yes",
        "ProtectKernelLogs=yes",
        "ProtectClock=yes",
        "ProtectHostname=yes",
        "RestrictSUIDSGID=yes",
        "RestrictNamespaces=yes",
        "RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX",
        "LockPersonality=yes",
        "SystemCallArchitectures=native",
        "UMask=0077",
        "CapabilityBoundingSet=",
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return {f"{name}.service": "\n".join(lines) + "\n", "serve.yaml": _with_absolute_paths(config, deployment)}


def _with_absolute_paths(config: ServeConfig, deployment: Deployment) -> str:
    content = config.model_dump(mode="json", exclude_defaults=True)
    content["memory"] = yaml.safe_load(deployment.config)["memory"]
    for name, model in config.models.items():
        for tier, written in zip(model.tiers, content["models"][name]["tiers"], strict=True):
            if tier.path is not None and tier.path != "demo" and Path(tier.path).expanduser().exists():
                written["path"] = str(Path(tier.path).expanduser().resolve())
    return as_yaml(content)
