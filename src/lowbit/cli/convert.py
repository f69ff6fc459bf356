"""``lowbit convert``: another file format for the same weights."""

from __future__ import annotations

import argparse

from lowbit.cli.options import FORMATS, SOURCE_HELP
from lowbit.cli.output import print_fields, write_json
from lowbit.cli.progress import create_progress

HELP = "store a checkpoint in another format, exactly, or say why that cannot be"
EXAMPLES = """\
  lowbit convert ./model-gptq ./model-ct --format compressed-tensors
  lowbit convert ./model-awq ./model-dense --format dense --dtype bf16"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("out", metavar="OUT", help="directory to write; it appears when it is complete")
    parser.add_argument("--format", choices=FORMATS, required=True, help="the format to write")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of the weights of --format dense")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    """Convert and say what was written."""
    from lowbit.codecs.conversion import convert_checkpoint

    progress = create_progress(quiet=arguments.quiet)
    try:
        result = convert_checkpoint(
            arguments.source,
            arguments.out,
            arguments.format,
            dtype=arguments.dtype,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    finally:
        progress.close()
    if arguments.json:
        write_json(result)
    else:
        print_fields({"wrote": str(arguments.out), "format": arguments.format})
    return 0
