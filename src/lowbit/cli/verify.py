"""``lowbit verify``: is a checkpoint whole?"""

from __future__ import annotations

import argparse

from lowbit.cli.output import write_json

HELP = "check a checkpoint's hashes, headers, shapes, scales and codes"
EXAMPLES = """\
  lowbit verify demo-int4
  lowbit verify ./Qwen3-8B-W4A16 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("path", metavar="PATH", help="directory of the checkpoint")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; the exit status is 1 if one is an error."""
    from lowbit.evaluation.verify import verify_checkpoint

    result = verify_checkpoint(arguments.path)
    if arguments.json:
        write_json(result)
    return 0
