"""``lowbit alerts``: rules, dashboard and runbook for Prometheus and Grafana."""

from __future__ import annotations

import argparse
from pathlib import Path

from lowbit.cli.extras import require_serve_extra

HELP = "write Prometheus alert rules with their tests, a Grafana dashboard, and a runbook for each alert"
EXAMPLES = """\
  lowbit alerts -o monitoring
  lowbit alerts -o monitoring --set first_token_seconds=2 --set objective=0.99 --overwrite
  promtool check rules monitoring/rules.yaml && promtool test rules monitoring/tests.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="directory to write into")
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="another threshold: weight_error, kl, slower, memory_share, queue_share, queue_seconds, "
        "first_token_seconds, kv_share, restarts, objective; may be repeated",
    )
    parser.add_argument(
        "--runbooks", metavar="URL", default="runbooks.md", help="where alerts point (default: the file beside them)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")


def run(arguments: argparse.Namespace) -> int:
    """Write all files, or none."""
    require_serve_extra("alerts")
    from lowbit.ops.alerts.dashboard import dashboard
    from lowbit.ops.alerts.rules import rule_tests, rules, runbook, thresholds
    from lowbit.ops.text_files import write_files

    numbers = thresholds(arguments.settings)
    files = {
        "rules.yaml": rules(numbers, arguments.runbooks),
        "dashboard.json": dashboard() + "\n",
        "runbooks.md": runbook(),
    }
    if numbers == thresholds():  # the tests' series are made for these
        files["tests.yaml"] = rule_tests("rules.yaml", arguments.runbooks)
    for path in write_files(Path(arguments.out), files, overwrite=arguments.overwrite):
        print(path)
    return 0
