"""``lowbit deploy``: files that run a serve configuration under Compose, Kubernetes or systemd."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.cli.extras import require_serve_extra
from lowbit.cli.options import positive, size_of
from lowbit.errors import UsageError

if TYPE_CHECKING:
    from lowbit.gateway.config import ServeConfig
    from lowbit.ops.deploy.run import Deployment

HELP = "write the files that run a serve configuration under Docker Compose, Kubernetes or systemd"
EXAMPLES = """\
  lowbit deploy compose serve.yaml -o deploy
  lowbit deploy kubernetes serve.yaml -o k8s --image registry.example/lowbit:1 --max-replicas 8
  lowbit deploy systemd serve.yaml -o unit"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("kind", choices=("compose", "kubernetes", "systemd"), help="what runs it")
    parser.add_argument("config", metavar="CONFIG.yaml", help="the configuration of lowbit serve")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="directory to write into")
    parser.add_argument("--name", default="lowbit", help="of services, objects and unit (default: lowbit)")
    parser.add_argument(
        "--image", metavar="IMAGE", help="built from the repository's Dockerfile (default: lowbit:VERSION-…)"
    )
    parser.add_argument(
        "--memory", metavar="SIZE", type=size_of("--memory"), help="of all engines (default: as planned)"
    )
    parser.add_argument("--cpus", metavar="N", type=positive, help="processors (default: threads of the configuration)")
    parser.add_argument("--gpus", metavar="N", type=int, help="GPUs of each replica (default: as the tiers ask)")
    parser.add_argument("--replicas", metavar="N", type=positive, default=1, help="Kubernetes: at least (default: 1)")
    parser.add_argument("--max-replicas", metavar="N", type=positive, help="Kubernetes: at most (default: 4)")
    parser.add_argument("--keda", action="store_true", help="Kubernetes: scale by KEDA, not by prometheus-adapter")
    parser.add_argument("--program", metavar="PATH", help="systemd: the installed lowbit (default: this one)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")


def run(arguments: argparse.Namespace) -> int:
    """Write all files, or none."""
    require_serve_extra("deploy")
    from lowbit.gateway.config import load_config
    from lowbit.ops.deploy.run import plan_deployment
    from lowbit.ops.text_files import write_files

    if arguments.gpus is not None and arguments.gpus < 0:
        raise UsageError(f"--gpus {arguments.gpus}: is below zero")
    config = load_config(arguments.config)
    deployment = plan_deployment(
        config,
        name=arguments.name,
        image=arguments.image,
        memory=arguments.memory,
        cpus=arguments.cpus,
        gpus=arguments.gpus,
        replicas=arguments.replicas,
        max_replicas=arguments.max_replicas or max(4, arguments.replicas),
    )
    files = _files(arguments, config, deployment)
    for path in write_files(Path(arguments.out), files, overwrite=arguments.overwrite):
        print(path)
    return 0


def _files(arguments: argparse.Namespace, config: ServeConfig, deployment: Deployment) -> dict[str, str]:
    if arguments.kind == "compose":
        from lowbit.ops.deploy.compose import compose_files

        return compose_files(deployment)
    if arguments.kind == "kubernetes":
        from lowbit.ops.deploy.kubernetes import kubernetes_files

        return kubernetes_files(deployment, keda=arguments.keda)
    from lowbit.ops.deploy.systemd import systemd_files

    program = arguments.program or shutil.which("lowbit") or str(Path(sys.executable).with_name("lowbit"))
    return systemd_files(deployment, config, Path(program))
