"""``lowbit imatrix``: how strongly each input column of a model is driven, for quantizing to GGUF."""

from __future__ import annotations

import argparse

from lowbit.cli.options import (
    SOURCE_HELP,
    add_calibration_arguments,
    add_compute_arguments,
    add_report_arguments,
    add_trust_arguments,
)
from lowbit.cli.output import human_seconds, print_fields, write_json
from lowbit.cli.progress import shown_progress

HELP = "collect the importance matrix that GGUF quantization is weighted by"
EXAMPLES = """\
  lowbit imatrix ./Qwen3-8B Qwen3-8B.imatrix.gguf --calibration chats.jsonl
  lowbit imatrix ./Qwen3-8B imatrix.dat --calibration general --samples 256 --seq-len 512"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("out", metavar="OUT", help="file to write, e.g. model.imatrix.gguf")
    parser.add_argument(
        "--format", choices=("gguf", "dat"), help="gguf, or the legacy dat (default: by the name of OUT)"
    )
    add_calibration_arguments(parser)
    add_compute_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    add_trust_arguments(parser)
    add_report_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Collect and say what was written."""
    from lowbit.pipeline.imatrix import imatrix

    with shown_progress(quiet=arguments.quiet) as progress:
        result = imatrix(
            arguments.source,
            arguments.out,
            calibration=arguments.calibration,
            samples=arguments.samples,
            seq_len=arguments.seq_len,
            seed=arguments.seed,
            form=arguments.format,
            device=arguments.device,
            memory=arguments.memory,
            overwrite=arguments.overwrite,
            revision=arguments.revision,
            allow_pickle=arguments.allow_pickle,
            trust_remote_code=arguments.trust_remote_code,
            progress=progress,
        )
    if arguments.json:
        write_json(result)
        return 0
    lines = {
        "wrote": f"{result.out}, {result.tensors} tensors",
        "calibrated on": f"{result.calibration['name']}, {result.tokens:,} tokens",
        "time": human_seconds(result.seconds),
    }
    if result.unseen:
        lines["unseen"] = f"{len(result.unseen)} expert matrices that no token chose (first: {result.unseen[0]})"
    print_fields(lines | {"note" if i == 0 else f"note {i + 1}": note for i, note in enumerate(result.notes)})
    print(f"next: lowbit quantize {arguments.source} OUT.gguf --scheme Q4_K_M --imatrix {result.out}")
    return 0
