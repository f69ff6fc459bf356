"""``lowbit verify``: is a checkpoint whole?"""

from __future__ import annotations

import argparse

from lowbit.cli.options import SOURCE_HELP, add_trust_arguments
from lowbit.cli.output import print_findings, write_json
from lowbit.cli.progress import shown_progress

HELP = "check a checkpoint's hashes, headers, shapes, scales and codes"
EXAMPLES = """\
  lowbit verify demo-int4
  lowbit verify ./Qwen3-8B-W4A16 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("path", metavar="PATH", help=SOURCE_HELP)
    add_trust_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    """Print the findings; the exit status is 2 if one is an error."""
    from lowbit.evaluation.verify import verify_checkpoint

    with shown_progress(quiet=arguments.quiet) as progress:
        result = verify_checkpoint(
            arguments.path,
            allow_pickle=arguments.allow_pickle,
            trust_remote_code=arguments.trust_remote_code,
            progress=progress,
        )
    if arguments.json:
        write_json(result)
        return 0 if result.ok else 2
    print_findings(result.findings)
    verdict = "whole" if result.ok else "DAMAGED"
    print(
        f"{verdict}: {result.path}: {result.files} files hashed, {result.tensors} tensors and "
        f"{result.modules} quantized modules checked"
    )
    return 0 if result.ok else 2
