"""``lowbit inspect``: what a checkpoint is."""

from __future__ import annotations

import argparse

from lowbit.cli.options import SOURCE_HELP
from lowbit.cli.output import write_json

HELP = "show a checkpoint's format, architecture, bits per weight, sizes, certificate and problems"
EXAMPLES = """\
  lowbit inspect demo-int4
  lowbit inspect ./Qwen3-8B-W4A16 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("path", metavar="PATH", help=SOURCE_HELP)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found."""
    from lowbit.evaluation.inspect import inspect_checkpoint

    result = inspect_checkpoint(arguments.path)
    if arguments.json:
        write_json(result)
    return 0
