"""``lowbit estimate``: will it run, at which precision, with how many requests."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lowbit.cli.options import FORMATS, SOURCE_HELP, positive, size_of
from lowbit.cli.output import human_bytes, print_fields, print_table, write_json

if TYPE_CHECKING:
    from lowbit.sizing.estimate_results import Estimate, PrecisionEstimate

HELP = "say what a model needs at each precision and whether it fits, from headers alone"
EXAMPLES = """\
  lowbit estimate Qwen/Qwen3-8B --context 8192 --concurrency 16 --gpus 1 --gpu-memory 24GiB
  lowbit estimate ./Qwen3-8B --scheme W4A16 --scheme bf16 --kv-dtype fp8 --json
  lowbit estimate ./model.gguf --engine llama.cpp --gpus 0 --context 4096
  lowbit estimate demo --png memory.png"""

ENGINES = ("vllm", "llama.cpp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help=f"{SOURCE_HELP}, owner/name:Q4_K_M; or a config.json alone")
    add_load_arguments(parser)
    what = parser.add_argument_group("precisions")
    what.add_argument(
        "--scheme",
        action="append",
        default=[],
        help="stored, fp32, bf16, int8, int4, a number format such as int4-g128-asym, or a GGUF mix such as Q4_K_M; "
        "may be repeated (default: the usual ones of the engine)",
    )
    what.add_argument(
        "--format",
        choices=FORMATS,
        default="compressed-tensors",
        help="how number formats are stored (default: %(default)s)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--png", metavar="FILE", help="draw the picture into a file too")
    output.add_argument("--json", action="store_true", help="print everything as JSON")


def add_load_arguments(parser: argparse.ArgumentParser, *, with_gpu_memory: bool = True) -> None:
    """Arguments that say what is served on what, shared with ``recommend``."""
    load = parser.add_argument_group("what is served")
    load.add_argument("--context", type=positive, metavar="N", help="tokens of a request (default: 8192)")
    load.add_argument("--concurrency", type=positive, default=1, metavar="N", help="requests at a time (default: 1)")
    load.add_argument("--kv-dtype", default="auto", metavar="TYPE", help="of the cache: auto (16 bit), fp8, q8_0 …")
    load.add_argument("--engine", choices=ENGINES, default=None, help="vllm (default) or llama.cpp")
    load.add_argument(
        "--batch-tokens", type=positive, metavar="N", help="tokens computed at a time (vllm 2048, llama.cpp 512)"
    )
    load.add_argument(
        "--like", metavar="TYPE", help="model_type whose cache an unknown architecture shares, e.g. llama"
    )
    load.add_argument("--revision", help="branch, tag or commit of a hub id")
    devices = parser.add_argument_group("on what")
    devices.add_argument("--gpus", type=int, metavar="N", help="number of GPUs; 0 is the CPU (default: what is here)")
    if with_gpu_memory:
        devices.add_argument(
            "--gpu-memory",
            metavar="SIZE",
            type=size_of("--gpu-memory"),
            help="memory of each, e.g. 24GiB (default: measured)",
        )
    devices.add_argument("--tensor-parallel", type=positive, metavar="N", help="devices that share it (default: all)")


def run(arguments: argparse.Namespace) -> int:
    """Estimate and print; the exit status is 0 whether it fits or not."""
    from lowbit.sizing.estimate import estimate

    result = estimate(
        arguments.model,
        schemes=arguments.scheme,
        format=arguments.format,
        context=arguments.context,
        concurrency=arguments.concurrency,
        kv_dtype=arguments.kv_dtype,
        engine=arguments.engine or ENGINES[0],
        gpus=arguments.gpus,
        gpu_memory=arguments.gpu_memory,
        tensor_parallel=arguments.tensor_parallel,
        batch_tokens=arguments.batch_tokens,
        like=arguments.like,
        revision=arguments.revision,
    )
    if arguments.png:
        from lowbit.sizing.memory_plot import write_picture

        write_picture(result, arguments.png)
    if arguments.json:
        write_json(result)
    else:
        print_estimate(result)
        if arguments.png:
            print(f"picture: {arguments.png}")
    return 0


def print_estimate(result: Estimate) -> None:
    """Facts, table, picture, and what to do."""
    from lowbit.cli.bars import print_bars

    print_fields(facts(result))
    print()
    shown = [entry for entry in result.precisions if entry.parts]
    header = (
        "precision",
        "bits/weight",
        "files",
        "by thumb",
        "weights",
        "kv cache",
        "working",
        "engine",
        "total",
        "fits",
        "requests",
        "context",
    )
    print_table(header, [row(entry) for entry in shown], emphasis=[i for i, entry in enumerate(shown) if entry.fits])
    for entry in result.precisions:
        if entry.problem:
            print(f"{entry.scheme}: {entry.problem}")
    print()
    print_bars(result)
    print()
    print_fields(closing(result, shown))
    for note in result.notes:
        print(f"note: {note}")


def facts(result: Estimate) -> dict[str, str]:
    """The lines at the top."""
    cache = result.cache
    device = result.devices
    parameters = f"{result.parameters:,}"
    if result.active_parameters != result.parameters:
        parameters += f", {result.active_parameters:,} of them for each token"
    on = (
        f"{device.count} × {device.name}, {human_bytes(device.memory)} each"
        if device.gpu
        else f"{device.name}, {human_bytes(device.memory)}"
    )
    grows = f"{human_bytes(cache.token)} per token" if cache.token else "nothing per token"
    lines = {
        "model": f"{result.model} ({result.architecture})",
        "parameters": parameters,
        "served": f"{result.requests} × {result.context:,} tokens by {result.engine} on {on}",
        "kv cache": f"{cache.dtype}, {grows} while windows fill; 1k / 16k / 128k tokens: "
        + " / ".join(f"{size / 2**30:.3f}" for size in (cache.per_1k, cache.per_16k, cache.per_128k))
        + " GiB",
    }
    if cache.constant:
        lines["kv cache"] += f"; {human_bytes(cache.constant)} of states per request"
    if result.tensor_parallel > 1:
        lines["tensor parallel"] = f"{result.tensor_parallel}; all sizes are of one device"
    return lines


def row(entry: PrecisionEstimate) -> tuple[str, ...]:
    """One line of the table."""
    parts = entry.parts
    return (
        entry.scheme,
        f"{entry.bits_per_weight:.2f}",
        ("" if entry.exact else "≥ ") + human_bytes(entry.file_bytes),
        human_bytes(entry.thumb),
        human_bytes(parts["weights"]),
        human_bytes(parts["kv cache"]),
        human_bytes(parts["activations"]),
        human_bytes(parts.get("graphs", 0) + parts["engine"]),
        human_bytes(entry.total),
        f"yes, {human_bytes(entry.free)} left" if entry.fits else verdict(entry),
        f"{entry.concurrency:,}",
        f"{entry.context:,}",
    )


def verdict(entry: PrecisionEstimate) -> str:
    """Why it is no yes."""
    return f"no, {human_bytes(-entry.free)} short" if entry.free < 0 else "no, see below"


def closing(result: Estimate, shown: list[PrecisionEstimate]) -> dict[str, str]:
    """Advice for the most precise one that fits, or for the smallest where none does."""
    if not shown:
        return {}
    chosen = max(result.fitting, key=lambda entry: entry.bits_per_weight, default=min(shown, key=lambda e: e.total))
    lines = {f"{chosen.scheme}": f"{chosen.tokens_left:,} more tokens of cache fit" if chosen.fits else verdict(chosen)}
    advice = chosen.advice
    if advice is not None:
        lines["flags"] = " ".join(advice.flags)
        if advice.offload:
            lines["to make it fit"] = "; ".join(advice.offload)
        if result.devices.gpu and result.engine == "vllm":
            lines["container"] = f"--shm-size {advice.shm_size}g ({human_bytes(advice.shm_bytes)} can be needed)"
    degrees = ", ".join(map(str, chosen.tensor_parallel))
    blocked = next(iter(chosen.obstacles.items()), None)
    lines["tensor parallel works"] = degrees + (f"; not {blocked[0]}: {blocked[1]}" if blocked else "")
    if chosen.making:
        lines["to quantize it"] = (
            f"{human_bytes(chosen.making['peak_memory'])} of memory at most, "
            f"{human_bytes(chosen.making['scratch'])} of scratch (GPTQ, 128 × 2048 tokens)"
        )
    if chosen.reclaimable:
        lines["page cache"] = f"{human_bytes(chosen.reclaimable)} more stay mapped until the memory is needed"
    if chosen.host and result.devices.gpu:
        lines["host memory"] = human_bytes(chosen.host)
    return lines
