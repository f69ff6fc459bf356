"""``lowbit convert``: another file format for the same weights."""

from __future__ import annotations

import argparse

from lowbit.cli.options import FORMATS, SOURCE_HELP, add_trust_arguments
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
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of all weights that are not quantized")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with a conversion that was interrupted")
    again.add_argument("--overwrite", action="store_true", help="replace OUT and forget an interrupted conversion")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    add_trust_arguments(parser)
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
            arguments.dtype,
            overwrite=arguments.overwrite,
            resume=arguments.resume,
            revision=arguments.revision,
            allow_pickle=arguments.allow_pickle,
            trust_remote_code=arguments.trust_remote_code,
            progress=progress,
        )
    finally:
        progress.close()
    if arguments.json:
        write_json(result)
        return 0
    exactness = (
        "every weight is the same number as before"
        if result.exact
        else f"rounded to {arguments.dtype or 'the model dtype'}"
    )
    lines = {
        "wrote": str(result.out),
        "format": f"{result.format}, from {result.source_format}",
        "modules": f"{result.modules} quantized in the source, {result.regridded} in another number format now",
        "exact": exactness,
    }
    print_fields(lines | {"note" if i == 0 else f"note {i + 1}": note for i, note in enumerate(result.notes)})
    return 0
