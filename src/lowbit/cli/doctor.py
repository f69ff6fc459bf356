"""``lowbit doctor``: what is wrong with a model or a gateway, and what mends it."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from lowbit.cli.extras import require_serve_extra
from lowbit.cli.options import SOURCE_HELP, add_report_arguments, number, positive
from lowbit.cli.output import write_json
from lowbit.cli.progress import shown_progress
from lowbit.errors import UsageError

if TYPE_CHECKING:
    from lowbit.ops.doctor.run import Report

HELP = "find what is wrong with a checkpoint or a running gateway, with the command that mends it"
EXAMPLES = """\
  lowbit doctor ./Qwen3-8B-W4A16 --context 8192 --concurrency 4
  lowbit doctor http://127.0.0.1:8000 --api-key env:LOWBIT_KEY --ttft 2
  lowbit doctor demo --json"""

_MARKS = {"ok": "ok", "finding": "FINDING", "not measured": "-"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("target", metavar="MODEL|URL", help=f"{SOURCE_HELP}; or the http(s) address of a server")
    parser.add_argument("--quick", action="store_true", help="of a model, read headers only")
    parser.add_argument("--context", type=positive, metavar="N", help="of a model: tokens that a request may have")
    parser.add_argument("--concurrency", type=positive, metavar="N", default=1, help="of a model: requests at a time")
    parser.add_argument("--api-key", metavar="env:NAME", help="of a server: the variable that holds its key")
    parser.add_argument(
        "--ttft", type=number, metavar="SECONDS", help="of a server: longest wait for a token (default: 5)"
    )
    add_report_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the results; the exit status is 0 where all is well and 1 with findings."""
    require_serve_extra("doctor")
    report = _examine(arguments)
    if arguments.json:
        write_json({"target": report.target, "healthy": report.healthy, "results": report.results})
    else:
        _show(report)
    return 0 if report.healthy else 1


def _examine(arguments: argparse.Namespace) -> Report:
    if "://" in arguments.target:
        from lowbit.ops.doctor.gateway import examine_gateway

        return examine_gateway(arguments.target, key=_key(arguments.api_key), ttft=arguments.ttft)
    from lowbit.ops.doctor.model import examine_model

    with shown_progress(quiet=arguments.quiet) as progress:
        return examine_model(
            arguments.target,
            quick=arguments.quick,
            context=arguments.context,
            concurrency=arguments.concurrency,
            progress=progress,
        )


def _key(text: str | None) -> str | None:
    if text is None:
        return None
    name = text.removeprefix("env:")
    if name == text:
        raise UsageError("--api-key takes env:NAME, never the key itself: other users of the machine see command lines")
    value = os.environ.get(name)
    if not value:
        raise UsageError(f"--api-key env:{name}: that environment variable is not set")
    return value


def _show(report: Report) -> None:
    rows = [[result.check, _MARKS[result.state], result.where, result.detail] for result in report.results]
    width = max(len(row[0]) for row in rows)
    places = max(len(row[2]) for row in rows)
    for check, mark, where, detail in rows:
        print(f"{check:<{width}}  {mark:<7}  {where:<{places}}  {detail}".rstrip())
    mends = dict.fromkeys((result.check, result.mend) for result in report.results if result.mend)
    for check, mend in mends:
        print(f"mend {check}: {mend}")
    count = sum(result.state == "finding" for result in report.results)
    print(f"{report.target}: {'healthy' if not count else f'{count} findings'}")
