"""``lowbit fit``: the best checkpoint of a given size, each module with the bits that it needs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lowbit.cli.options import SOURCE_HELP, add_calibration_arguments, add_report_arguments, positive, size_of
from lowbit.cli.output import human_bytes, plain, print_fields, write_json
from lowbit.cli.progress import shown_progress
from lowbit.cli.quantize import summary

if TYPE_CHECKING:
    from lowbit.sizing.fit_memory import Serving

HELP = "quantize to a size: measure every module, give each the bits that it needs"
EXAMPLES = """\
  lowbit fit demo demo-fit --bits-per-weight 4.5
  lowbit fit ./Qwen3-8B ./Qwen3-8B-fit --memory 12GiB --context 8192 --measurements qwen3.json --report report
  lowbit fit ./Qwen3-8B ./Qwen3-8B.gguf --bits-per-weight 4.25
  lowbit fit ./Qwen3-8B ./small --size 4.6GiB --measurements qwen3.json      # another size, in seconds"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("out", metavar="OUT", help="directory, or file that ends in .gguf; it appears when complete")
    budget = parser.add_argument_group("budget (one of them)")
    budget.add_argument("--size", type=size_of("--size"), metavar="SIZE", help="of the weight files, e.g. 3.9GiB")
    budget.add_argument(
        "--bits-per-weight",
        type=float,
        metavar="N",
        help="in the linears (of a GGUF file in all matrices), fractions allowed: 4.25",
    )
    budget.add_argument(
        "--memory",
        type=size_of("--memory"),
        metavar="SIZE",
        help="of the device that serves it, all included",
    )
    budget.add_argument(
        "--context",
        metavar="N",
        help="tokens of each request, with --memory: 8192; the longest that costs little of 4096..32768; auto: of all",
    )
    budget.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="what all may lose where --context leaves the length open (default: 0.01)",
    )
    budget.add_argument("--concurrency", type=positive, default=1, metavar="N", help="requests at a time (default: 1)")
    budget.add_argument(
        "--kv-dtype",
        default="auto",
        metavar="NAME",
        help="of the cache, with --memory: auto (chosen with the bits), bfloat16, fp8, float16, q8_0, q4_0 …",
    )
    budget.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="devices of so much memory; 0 is the host (default: vLLM 1; llama.cpp what is here)",
    )
    what = parser.add_argument_group("what to choose from")
    what.add_argument("--format", default="compressed-tensors", help="compressed-tensors (default), gptq, gguf …")
    what.add_argument(
        "--methods",
        "--method",
        metavar="LIST",
        help="that solve them, chosen per module: gptq,awq+gptq (default), awq, rtn, hqq; gptaq or autoround alone",
    )
    what.add_argument(
        "--candidates",
        metavar="LIST",
        help="number formats: int4-g128-sym,int8-g128-sym or Q3_K,Q4_K (default: what the engines have kernels for)",
    )
    what.add_argument("--measurements", metavar="FILE", help="read if it is there, else written: for the next budget")
    what.add_argument("--report", metavar="DIR", help="write the pictures there")
    data = parser.add_argument_group("calibration")
    add_calibration_arguments(data)
    running = parser.add_argument_group("running")
    running.add_argument(
        "--work-memory", metavar="SIZE", type=size_of("--work-memory"), help="memory to stay within while quantizing"
    )
    running.add_argument("--resume", action="store_true", help="go on with a run that was interrupted while quantizing")
    running.add_argument("--overwrite", action="store_true", help="replace OUT")
    running.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    add_report_arguments(running)


def run(arguments: argparse.Namespace) -> int:
    """Fit and say what was chosen."""
    from lowbit.sizing.fit import fit

    candidates = None
    if arguments.candidates is not None:
        candidates = [name.strip() for name in arguments.candidates.split(",") if name.strip()]
    with shown_progress(quiet=arguments.quiet) as progress:
        found = fit(
            arguments.source,
            arguments.out,
            size=arguments.size,
            bits_per_weight=arguments.bits_per_weight,
            memory=arguments.memory,
            context=arguments.context,
            max_kl=arguments.max_kl,
            concurrency=arguments.concurrency,
            kv_dtype=arguments.kv_dtype,
            gpus=arguments.gpus,
            format=arguments.format,
            methods=None if arguments.methods is None else arguments.methods.split(","),
            candidates=candidates,
            measurements=arguments.measurements,
            report=arguments.report,
            calibration=arguments.calibration,
            samples=arguments.samples,
            seq_len=arguments.seq_len,
            seed=arguments.seed,
            work_memory=arguments.work_memory,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            trust_remote_code=arguments.trust_remote_code,
            progress=progress,
        )
    counts: dict[str, int] = {}
    for choice in found.fit.choices.values():
        counts[choice] = counts.get(choice, 0) + 1
    if arguments.json:
        result = {name: value for name, value in plain(found.result).items() if name != "held_out"}
        write_json(
            {
                "predicted_kl": found.predicted,
                "choices": dict(found.fit.choices),
                "serving": plain(found.serving),
                "result": result,
            }
        )
        return 0
    lines = summary(found.result)
    lines["how"] = ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))
    lines["predicted"] = f"KL divergence {found.predicted:.4g} nats"
    if found.serving is not None:
        lines |= serving_lines(found.serving)
    print_fields(lines | {f"picture {i + 1}": str(path) for i, path in enumerate(found.plots)})
    return 0


def serving_lines(serving: Serving) -> dict[str, str]:
    """The cache, the memory, and what fits."""
    costs = "" if serving.kv_divergence is None else f", which adds {serving.kv_divergence:.3g} nats"
    return {
        "kv cache": f"{serving.kv_dtype}{costs}: {serving.reason}",
        "context": f"{serving.context:,} tokens: {serving.context_reason}",
        "memory": f"{human_bytes(serving.total)} of {human_bytes(serving.budget)} usable for {serving.concurrency} x "
        f"{serving.context:,} tokens; up to {serving.largest_concurrency:,} requests of that length, or "
        f"{serving.largest_context:,} tokens for as many",
        "serve with": f"{serving.engine} {' '.join(serving.flags)}",
    }
