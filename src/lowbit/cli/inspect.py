"""``lowbit inspect``: what a checkpoint is."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING

from lowbit.cli.options import SOURCE_HELP, add_trust_arguments
from lowbit.cli.output import human_bytes, print_fields, print_findings, print_table, write_json

if TYPE_CHECKING:
    from lowbit.evaluation.inspect import Inspection

HELP = "show a checkpoint's format, architecture, bits per weight, sizes, certificate and problems"
EXAMPLES = """\
  lowbit inspect demo-int4
  lowbit inspect ./Qwen3-8B-W4A16 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("path", metavar="PATH", help=SOURCE_HELP)
    add_trust_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; the exit status is 2 if a problem is an error."""
    from lowbit.evaluation.inspect import inspect_checkpoint

    result = inspect_checkpoint(
        arguments.path, allow_pickle=arguments.allow_pickle, trust_remote_code=arguments.trust_remote_code
    )
    if arguments.json:
        write_json(result)
    else:
        print_inspection(result)
    return 2 if any(problem.severity == "error" for problem in result.problems) else 0


def print_inspection(result: Inspection) -> None:
    """The facts, the sizes by kind of module, and the problems."""
    print_fields(facts(result))
    if result.kinds:
        print()
        rows = [
            (
                kind,
                f"{part.parameters:,}",
                f"{part.bits_per_weight:.3f}",
                human_bytes(part.bytes),
                ", ".join(part.formats),
            )
            for kind, part in result.kinds.items()
        ]
        print_table(("kind", "parameters", "bits/weight", "size", "stored as"), rows)
    if result.problems:
        print()
        print_findings(result.problems)


def facts(result: Inspection) -> dict[str, str]:
    """The lines at the top."""
    lines = {"path": result.path, "format": result.format}
    if result.architecture or result.model_type:
        lines["architecture"] = " ".join(filter(None, (result.architecture, f"({result.model_type})")))
    if (shape := result.description) is not None:
        lines["shape"] = f"{shape.layers} blocks, hidden {shape.hidden}, vocabulary {shape.vocab:,}"
    if result.parameters:
        lines["parameters"] = f"{result.parameters:,}"
        lines["size"] = f"{human_bytes(result.size_bytes)} in {len(result.files)} weight file(s)"
        lines["bits per weight"] = (
            f"{result.linear_bits_per_weight:.3f} in linears, {result.bits_per_weight:.3f} overall"
        )
    if result.specs:
        lines["number formats"] = ", ".join(f"{spec} × {count}" for spec, count in result.specs.items())
    if result.made:
        recipe = result.made["recipe"]
        how = recipe.get("method") or "convert"
        lines["made by"] = (
            f"lowbit {result.made['lowbit_version']}, {how}, from {result.made['source'].get('name', '?')}"
        )
        if chosen := Counter(result.made["choices"].values()):
            lines["chosen"] = ", ".join(f"{name} × {count}" for name, count in chosen.most_common())
    lines["certificate"] = certificate(result)
    return lines


def certificate(result: Inspection) -> str:
    """The measured quality in a line."""
    figures = result.certificate
    if not figures:
        return "none: measure with lowbit eval PATH --against ORIGINAL"
    line = f"perplexity {figures['perplexity']:.4g}"
    if figures.get("reference_perplexity") is not None:
        line += f" (original {figures['reference_perplexity']:.4g})"
    if figures.get("kl_divergence") is not None:
        line += f", KL {figures['kl_divergence']:.4g} nats, top-1 agreement {figures['top1_agreement']:.2%}"
    return f"{line} over {figures['tokens']:,} tokens of {figures['text']}"
