"""``lowbit recommend``: what to choose, and why."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lowbit.cli.estimate import add_load_arguments
from lowbit.cli.options import SOURCE_HELP, size_of
from lowbit.cli.output import human_bytes, print_fields, write_json

if TYPE_CHECKING:
    from lowbit.sizing.recommend import Recommendation

HELP = "choose precision, method, cache, engine and flags for a memory budget, with the reasons"
EXAMPLES = """\
  lowbit recommend Qwen/Qwen3-8B --memory 24GiB --gpus 1 --context 8192 --concurrency 16
  lowbit recommend ./Qwen3-8B --memory 16GiB --quality high --measured ./Qwen3-8B-W4A16
  lowbit recommend ./model --gpus 0 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help=f"{SOURCE_HELP}, owner/name:Q4_K_M; or a config.json alone")
    parser.add_argument(
        "--memory", metavar="SIZE", type=size_of("--memory"), help="memory of each device (default: what is here)"
    )
    parser.add_argument(
        "--quality",
        choices=("high", "balanced", "small"),
        default="balanced",
        help="what may be lost: 2 %%, 5 %% or 25 %% of perplexity (default: balanced)",
    )
    parser.add_argument(
        "--measured", metavar="DIR", action="append", default=[], help="a quantized copy whose certificate counts"
    )
    add_load_arguments(parser, with_gpu_memory=False)
    parser.add_argument("--png", metavar="FILE", help="draw what was compared into a file too")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Recommend and print."""
    from lowbit.sizing.recommend import recommend

    result = recommend(
        arguments.model,
        memory=arguments.memory,
        context=arguments.context,
        concurrency=arguments.concurrency,
        quality=arguments.quality,
        engine=arguments.engine,
        kv_dtype=arguments.kv_dtype,
        gpus=arguments.gpus,
        tensor_parallel=arguments.tensor_parallel,
        batch_tokens=arguments.batch_tokens,
        measured=arguments.measured,
        like=arguments.like,
        revision=arguments.revision,
    )
    if arguments.png:
        from lowbit.sizing.pictures import write_figure
        from lowbit.sizing.recommend_plot import draw_recommendation

        write_figure(draw_recommendation(result), arguments.png)
    if arguments.json:
        write_json(result)
    else:
        print_recommendation(result)
        if arguments.png:
            print(f"picture: {arguments.png}")
    return 0


def print_recommendation(result: Recommendation) -> None:
    """The choice, its reasons, the runner-up and the commands."""
    entry = result.precision
    lines = {
        "precision": f"{result.scheme} as {result.format}: {result.reasons['precision']}",
        "method": f"{result.method}: {result.reasons['method']}",
        "kv cache": f"{result.kv_dtype}: {result.reasons['kv cache']}",
        "engine": f"{result.engine}: {result.reasons['engine']}",
        "devices": result.reasons["devices"],
        "memory": f"{human_bytes(entry.total)} of {human_bytes(entry.budget)} usable; "
        f"up to {entry.concurrency:,} requests of this length, or {entry.context:,} tokens for as many requests",
    }
    if result.runner_up:
        lines["runner-up"] = f"{result.runner_up}, {result.instead}"
    bits, why = result.thumb
    lines["rule of thumb"] = f"{f'{bits} bits' if bits else 'none'}: {why}"
    lines["measured"] = ", ".join(result.measured) or "nothing of this model yet: expected losses are used"
    print_fields(lines)
    for warning in result.warnings:
        print(f"warning: {warning}")
    print()
    for command in result.commands:
        print(command)
