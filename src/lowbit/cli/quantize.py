"""``lowbit quantize``: a checkpoint in, a quantized checkpoint out."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lowbit.cli.options import (
    FORMATS,
    METHODS,
    PRUNERS,
    SOURCE_HELP,
    TRANSFORMS,
    add_calibration_arguments,
    add_compute_arguments,
    add_report_arguments,
    add_trust_arguments,
    split_size,
)
from lowbit.cli.output import human_bytes, human_seconds, plain, print_fields, write_json
from lowbit.cli.progress import shown_progress

if TYPE_CHECKING:
    from lowbit.pipeline.executor import Executor
    from lowbit.pipeline.quantize import QuantizeResult

HELP = "quantize a checkpoint, block by block, in bounded memory; to a GGUF file if OUT ends in .gguf"
EXAMPLES = """\
  lowbit quantize demo demo-int4 --method gptq
  lowbit quantize ./Qwen3-8B ./Qwen3-8B-W4A16 --calibration chats.jsonl --memory 6GiB
  lowbit quantize ./Qwen3-8B ./Qwen3-8B-awq --method awq --format awq --asym
  lowbit quantize ./Qwen3-8B ./out --method gptq --transform awq --bits 3
  lowbit quantize ./Qwen3-8B ./out --method best --budget 2h --bits 3
  lowbit quantize ./Qwen3-8B ./Qwen3-8B-W8A8 --scheme W8A8 --kv-cache fp8
  lowbit quantize ./Qwen3-8B ./out --sparsity 2:4 --pruner wanda --method gptq
  lowbit quantize ./Qwen3-8B ./out --bits 8 --group-size -1 --skip '.*down_proj' --target vllm==0.32
  lowbit quantize ./Qwen3-8B Qwen3-8B-Q4_K_M.gguf --scheme Q4_K_M --imatrix auto --calibration chats.jsonl
  lowbit quantize ./Qwen3-8B Qwen3-8B.gguf --scheme IQ3_XS --imatrix model.imatrix.gguf --type ffn_down=Q4_K
  lowbit quantize ./Qwen3-8B ./out --ray HEAD:6379   # on the workers of a Ray cluster, to the same bytes
  lowbit quantize ./Qwen3-8B ./out --resume          # go on after a crash or a kill"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument("out", metavar="OUT", help="directory or .gguf file to write; it appears when complete")
    _add_formats(parser.add_argument_group("what to write"))
    _add_gguf(parser.add_argument_group("GGUF files"))
    _add_calibration(parser.add_argument_group("calibration"))
    _add_running(parser.add_argument_group("running"))


def _add_formats(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--scheme",
        help="W4A16 (default), W8A8, FP8_DYNAMIC, NVFP4 … or a number format such as int4-g128-sym; for a GGUF file "
        "Q4_K_M (default), Q6_K, IQ3_XS …",
    )
    group.add_argument(
        "--method",
        choices=METHODS,
        help="how weights are rounded (default: gptq); best tries several on each module and keeps the best one",
    )
    group.add_argument(
        "--budget", metavar="TIME", help="time that --method best may take to solve, e.g. 90s, 2h (default: 30m)"
    )
    group.add_argument(
        "--transform",
        choices=TRANSFORMS,
        help="rewrite the weights before, without changing what the model computes (default: what the method brings)",
    )
    group.add_argument(
        "--rotate", choices=("hadamard",), help="rotate the residual stream and the values, which changes no output"
    )
    group.add_argument(
        "--sparsity", metavar="N:M|SHARE", help="make weights zero: 2:4, 4:8 or e.g. 50%%; alone with --scheme dense"
    )
    group.add_argument("--pruner", choices=PRUNERS, help="which weights become zero (default: sparsegpt)")
    group.add_argument("--format", choices=(*FORMATS[:-1], "gguf"), help="file format (default: compressed-tensors)")
    group.add_argument("--bits", type=int, metavar="N", help="2 to 8, overrides the scheme")
    group.add_argument(
        "--group-size", type=int, metavar="N", help="columns that share a scale: 32, 64, 128 …; -1 a row, 0 the matrix"
    )
    symmetry = group.add_mutually_exclusive_group()
    symmetry.add_argument("--sym", dest="symmetric", action="store_true", default=None, help="no zero points")
    symmetry.add_argument("--asym", dest="symmetric", action="store_false", help="a zero point for each scale")
    group.add_argument(
        "--ordering", choices=("none", "static"), help="order in which GPTQ solves columns; static stores no g_idx"
    )
    group.add_argument(
        "--kv-cache",
        choices=("fp8", "fp8-head"),
        help="calibrate FP8 scales of the key-value cache, one for each layer or each head, and store them",
    )
    group.add_argument("--recipe", metavar="FILE", help="YAML recipe with rules per module; flags override it")
    group.add_argument(
        "--skip", metavar="REGEX", action="append", default=[], help="leave modules that match dense; may be repeated"
    )
    group.add_argument("--target", metavar="ENGINE", help="engine that must load the result, e.g. vllm==0.32")


def _add_gguf(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--imatrix",
        metavar="FILE|auto",
        help="importance of each input column: a file of lowbit imatrix or llama.cpp, or collected first (auto)",
    )
    group.add_argument(
        "--type",
        dest="types",
        metavar="REGEX=TYPE",
        action="append",
        default=[],
        help="type of the tensors whose GGUF name matches, e.g. 'ffn_down=Q6_K'; may be repeated, the first counts",
    )
    group.add_argument("--pure", action="store_true", help="one type for all matrices, no mix")
    group.add_argument(
        "--split-size",
        dest="split_bytes",
        metavar="SIZE",
        type=split_size,
        help="largest file, e.g. 4GB; more if needed",
    )


def _add_calibration(group: argparse._ArgumentGroup) -> None:
    add_calibration_arguments(group)
    group.add_argument(
        "--all-experts",
        action="store_true",
        default=None,
        help="let every expert see every token, for its statistics only; outputs stay those of the router's choice",
    )
    group.add_argument(
        "--certify-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="held-out tokens to measure the result on, against the source (default: 4096; 0: no certificate)",
    )


def _add_running(group: argparse._ArgumentGroup) -> None:
    add_compute_arguments(group)
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="calibrate and solve on the workers of a Ray cluster: auto, HOST:6379, or local to begin one",
    )
    again = group.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    again.add_argument("--overwrite", action="store_true", help="replace OUT and forget an interrupted run")
    group.add_argument("--revision", help="branch, tag or commit of a hub id")
    add_trust_arguments(group)
    add_report_arguments(group)


def run(arguments: argparse.Namespace) -> int:
    """Quantize and say what was written."""
    from lowbit.evaluation.certify import quantize

    with on_cluster(arguments) as executor, shown_progress(quiet=arguments.quiet) as progress:
        result = quantize(
            arguments.source,
            arguments.out,
            scheme=arguments.scheme,
            method=arguments.method,
            format=arguments.format,
            bits=arguments.bits,
            group_size=arguments.group_size,
            symmetric=arguments.symmetric,
            ordering=arguments.ordering,
            transform=arguments.transform,
            kv_cache=arguments.kv_cache,
            budget=arguments.budget,
            rotate=arguments.rotate,
            sparsity=arguments.sparsity,
            pruner=arguments.pruner,
            all_experts=arguments.all_experts,
            calibration=arguments.calibration,
            samples=arguments.samples,
            seq_len=arguments.seq_len,
            seed=arguments.seed,
            certify_tokens=arguments.certify_tokens,
            imatrix=arguments.imatrix,
            types=arguments.types,
            pure=arguments.pure,
            split_bytes=arguments.split_bytes,
            recipe=arguments.recipe,
            skip=arguments.skip,
            device=arguments.device,
            memory=arguments.memory,
            target=arguments.target,
            revision=arguments.revision,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            allow_pickle=arguments.allow_pickle,
            trust_remote_code=arguments.trust_remote_code,
            progress=progress,
            executor=executor,
        )
    if arguments.json:
        write_json({name: value for name, value in plain(result).items() if name != "held_out"})
    else:
        print_fields(summary(result))
        print(f"next: lowbit eval {result.out} --against {arguments.source}")
    return 0


@contextmanager
def on_cluster(arguments: argparse.Namespace) -> Iterator[Executor | None]:
    """The workers of ``--ray``; None without it."""
    if arguments.ray is None:
        yield None
        return
    from lowbit.ops.ray_cluster import require_ray
    from lowbit.ops.ray_quantize import RayExecutor

    require_ray()
    with RayExecutor(arguments.ray) as executor:
        if not arguments.quiet:
            print(f"workers: {executor.workers}, {executor.threads} threads each", file=sys.stderr)
        yield executor


def summary(result: QuantizeResult) -> dict[str, str]:
    """The lines that a person wants after a run."""
    share = result.size_bytes / result.source_bytes if result.source_bytes else 1.0
    chosen = Counter(module.method for module in result.modules if module.candidates)
    lines = {
        "wrote": str(result.out),
        "how": f"{result.method} {result.scheme}, stored as {result.format}",
        "modules": f"{len(result.modules)} quantized, {result.linear_bits_per_weight:.3f} bits per weight in them",
        "size": f"{human_bytes(result.size_bytes)}, {share:.0%} of the source's {human_bytes(result.source_bytes)}",
        "time": f"{human_seconds(result.seconds)}, peak memory {human_bytes(result.peak_memory_bytes)}",
    }
    if chosen:
        lines["chosen"] = ", ".join(f"{name} × {count}" for name, count in chosen.most_common())
    if result.quality is not None:
        quality = result.quality
        lines["proved"] = (
            f"perplexity {quality['perplexity']:.4g} against {quality['reference_perplexity']:.4g}, "
            f"KL divergence {quality['kl_divergence']:.4g} nats, top-1 agreement {quality['top1_agreement']:.1%} "
            f"on {quality['tokens']:,} tokens ({quality['text']})"
        )
    if result.calibration is not None:
        lines["calibrated on"] = f"{result.calibration['name']}, {result.calibration['tokens']:,} tokens"
    return lines
