"""``lowbit convert``: another file format for the same weights."""

from __future__ import annotations

import argparse

from lowbit.cli.options import FORMATS, SOURCE_HELP, add_report_arguments, add_trust_arguments, split_size
from lowbit.cli.output import print_fields, write_json
from lowbit.cli.progress import shown_progress

HELP = "store a checkpoint in another format, exactly, or say why that cannot be"
EXAMPLES = """\
  lowbit convert ./model-gptq ./model-ct --format compressed-tensors
  lowbit convert ./model-awq ./model-dense --format dense --dtype bf16
  lowbit convert ./model-gptq model.gguf              # codes as they are, in Q4_0, Q4_1 or Q8_0
  lowbit convert ./model model.gguf --dtype q8_0
  lowbit convert model.gguf ./model-dense --format dense"""

_DTYPES = ("bf16", "f16", "f32", "fp16", "fp32", "q8_0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("out", metavar="OUT", help="directory or .gguf file to write; it appears when complete")
    parser.add_argument("--format", choices=(*FORMATS, "gguf"), help="the format to write; a .gguf file needs none")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="of all weights that are not quantized: bf16, fp16 or fp32; of a GGUF file f16, bf16, f32 or q8_0",
    )
    parser.add_argument(
        "--split-size", dest="split_bytes", metavar="SIZE", type=split_size, help="largest GGUF file, e.g. 4GB"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with a conversion that was interrupted")
    again.add_argument("--overwrite", action="store_true", help="replace OUT and forget an interrupted conversion")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    add_trust_arguments(parser)
    add_report_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Convert and say what was written."""
    from lowbit.pipeline.gguf_convert import convert

    with shown_progress(quiet=arguments.quiet) as progress:
        result = convert(
            arguments.source,
            arguments.out,
            arguments.format,
            arguments.dtype,
            split_bytes=arguments.split_bytes,
            overwrite=arguments.overwrite,
            resume=arguments.resume,
            revision=arguments.revision,
            allow_pickle=arguments.allow_pickle,
            trust_remote_code=arguments.trust_remote_code,
            progress=progress,
        )
    if arguments.json:
        write_json(result)
        return 0
    rounded = (
        "rounded, see the notes" if result.format == "gguf" else f"rounded to {arguments.dtype or 'the model dtype'}"
    )
    exactness = "every weight is the same number as before" if result.exact else rounded
    lines = {
        "wrote": str(result.out),
        "format": f"{result.format}, from {result.source_format}",
        "modules": f"{result.modules} quantized in the source, {result.regridded} in another number format now",
        "exact": exactness,
    }
    print_fields(lines | {"note" if i == 0 else f"note {i + 1}": note for i, note in enumerate(result.notes)})
    return 0
