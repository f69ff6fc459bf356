"""``lowbit eval``: perplexity, and the divergence from the original."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.cli.options import SOURCE_HELP, add_compute_arguments, add_trust_arguments, positive
from lowbit.cli.output import human_bytes, print_fields, write_json
from lowbit.cli.progress import shown_progress

if TYPE_CHECKING:
    from lowbit.evaluation.results import Evaluation

HELP = "measure a model's perplexity and its divergence from the original"
EXAMPLES = """\
  lowbit eval demo-int4 --against demo
  lowbit eval ./Qwen3-8B-W4A16 --against ./Qwen3-8B --text wiki.txt --json result.json --report report/
  lowbit eval ./Qwen3-8B --text wiki.txt --seq-len 4096 --stride 1024 --max-tokens 100000"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("model", metavar="MODEL", help=SOURCE_HELP)
    parser.add_argument("--against", metavar="REFERENCE", help="the original, for KL divergence and top-1 agreement")
    parser.add_argument(
        "--text", metavar="FILE|NAME", help="what to read (default for models made from demo: its held-out text)"
    )
    parser.add_argument(
        "--seq-len", type=positive, metavar="N", help="tokens in a window (default: the context, at most 2048)"
    )
    parser.add_argument(
        "--stride", type=positive, metavar="N", help="tokens from window to window (default: they do not overlap)"
    )
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="read no more than this")
    parser.add_argument(
        "--kv-dtype",
        metavar="NAME",
        default="auto",
        help="key-value cache to simulate: fp8, int8, q8_0, q4_0 … (default: FP8 where the model brings scales for it)",
    )
    add_compute_arguments(parser)
    add_trust_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON; - is stdout")
    parser.add_argument("--report", metavar="DIR", help="write an HTML report with plots")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, and write the figures where they are asked for."""
    from lowbit.checkpoint import manifest_path, update_quality
    from lowbit.evaluation.evaluate import evaluate

    model = Path(arguments.model)
    with shown_progress(quiet=arguments.quiet) as progress:
        result = evaluate(
            arguments.model,
            against=arguments.against,
            text=arguments.text,
            seq_len=arguments.seq_len,
            stride=arguments.stride,
            max_tokens=arguments.max_tokens,
            device=arguments.device,
            memory=arguments.memory,
            kv_dtype=arguments.kv_dtype,
            allow_pickle=arguments.allow_pickle,
            trust_remote_code=arguments.trust_remote_code,
            progress=progress,
        )
    if arguments.json:
        write_json(result, arguments.json)
    if arguments.json != "-":
        print_fields(summary(result))
        for verdict in result.verdicts:
            print(f"{verdict.level}: {verdict.message}")
    if arguments.report:
        page = report(Path(arguments.report), model, result)
        if arguments.json != "-":
            print(f"report: {page}")
    if result.reference is not None and manifest_path(model).exists():
        update_quality(model, result.certificate())
        if arguments.json != "-":
            print(f"certificate: {manifest_path(model)}")
    return 0


def summary(result: Evaluation) -> dict[str, str]:
    """The lines that a person wants to read."""
    lines = {
        "text": f"{result.text}, {result.tokens:,} tokens scored in windows of {result.seq_len:,}",
        "bits per weight": f"{result.bits_per_weight:.3f} ({human_bytes(result.size_bytes)})",
        "perplexity": f"{result.perplexity:.4f} ± {result.perplexity_error:.2g}",
    }
    if result.reference is not None and result.reference_perplexity is not None:
        lines[f"perplexity of {result.reference}"] = f"{result.reference_perplexity:.4f}"
    if result.kl_divergence is not None:
        lines["KL divergence"] = f"{result.kl_divergence:.5f} nats (99 % of tokens below {result.kl_p99:.3g})"
    if result.top1_agreement is not None:
        lines["top-1 agreement"] = f"{result.top1_agreement:.2%}"
    return lines


def report(directory: Path, model: Path, result: Evaluation) -> Path:
    """Write the report on one model; its method and module errors come from its manifest, where it has one."""
    from lowbit.checkpoint import read_manifest
    from lowbit.evaluation.report import write_report
    from lowbit.evaluation.results import Candidate, Comparison

    manifest = read_manifest(model)
    recipe = {} if manifest is None else manifest.recipe
    modules = {} if manifest is None else manifest.modules
    errors = {name: float(entry["error"]) for name, entry in modules.items() if entry.get("error") is not None}
    specs = sorted({str(entry["spec"]) for entry in modules.values()})
    candidate = Candidate(
        name=result.model,
        method=str(recipe.get("method", "")),
        spec=", ".join(specs),
        evaluation=result,
        module_errors=errors,
    )
    title = f"{result.model} against {result.reference}" if result.reference else result.model
    return write_report(directory, Comparison(title=title, candidates=(candidate,)))
