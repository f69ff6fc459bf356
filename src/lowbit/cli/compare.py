"""``lowbit compare``: which way to quantize is best for this model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.cli.demo import HEADER, original_row, row
from lowbit.cli.options import (
    SOURCE_HELP,
    add_calibration_arguments,
    add_compute_arguments,
    add_trust_arguments,
    positive,
)
from lowbit.cli.output import print_table, write_json
from lowbit.cli.progress import shown_progress
from lowbit.errors import UsageError

if TYPE_CHECKING:
    from lowbit.evaluation.results import Comparison

HELP = "quantize a model in many ways, measure each against it, and mark the ones that nothing beats"
EXAMPLES = """\
  lowbit compare demo
  lowbit compare ./Qwen3-8B --calibration chats.jsonl --methods gptq,awq,awq+gptq,hqq,nf4,q4_k_m --bits 4,3
  lowbit compare ./Qwen3-8B --calibration chats.jsonl --methods w8a8,fp8_dynamic,llm_int8,q8_0 --out candidates
  lowbit compare demo --methods rtn,gptq,iq3_xs --bits 3,2 --json comparison.json --report report"""

METHODS = "rtn,gptq,gptaq,awq,hqq,nf4,q4_k_m"
BITS = "4,3"
DEMO_SAMPLES, DEMO_SEQ_LEN = 64, 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("source", metavar="SOURCE", help=SOURCE_HELP)
    what = parser.add_argument_group("what to compare")
    what.add_argument(
        "--methods",
        metavar="LIST",
        default=METHODS,
        help="methods (gptq, awq+gptq …) at each of --bits, schemes (nf4, w8a8, fp8_dynamic …), GGUF types (q4_k_m …), "
        f"by commas (default: {METHODS})",
    )
    what.add_argument("--bits", metavar="LIST", default=BITS, help=f"widths for the methods (default: {BITS})")
    what.add_argument("--group-size", type=int, default=128, metavar="N", help="columns that share a scale; -1 a row")
    what.add_argument("--budget", metavar="TIME", help="time that method best may take to solve (default: 30m)")
    what.add_argument("--asym", action="store_true", help="a zero point for each scale")
    data = parser.add_argument_group("text")
    add_calibration_arguments(data)
    data.add_argument("--text", metavar="FILE|NAME", help="text to measure on (default: kept out of the calibration)")
    data.add_argument(
        "--max-tokens", type=positive, default=16384, metavar="N", help="tokens to measure on (default: 16384)"
    )
    running = parser.add_argument_group("running")
    running.add_argument("--out", metavar="DIR", help="keep the checkpoints there (default: they are deleted)")
    running.add_argument("--report", metavar="DIR", help="page and plots (default: OUT/report, else compare-report)")
    running.add_argument("--overwrite", action="store_true", help="replace checkpoints of an earlier comparison")
    add_compute_arguments(running)
    add_trust_arguments(running)
    running.add_argument("--json", metavar="FILE", help="write all figures as JSON; - is stdout")
    running.add_argument("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    """Quantize, measure, print the table and write the report."""
    out = None if arguments.out is None else Path(arguments.out)
    report = Path(arguments.report) if arguments.report else (out / "report" if out else Path("compare-report"))
    for flag, folder in (("--out", out), ("--report", report)):
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UsageError(f"{flag} {folder}: is a file; name a directory")
    bits = widths(arguments.bits)

    from lowbit.evaluation.compare import compare
    from lowbit.evaluation.frontier import frontier
    from lowbit.evaluation.report import write_report
    from lowbit.pipeline.candidates import contenders

    chosen = contenders(
        [name for name in arguments.methods.split(",") if name.strip()],
        bits,
        group_size=arguments.group_size,
        symmetric=not arguments.asym,
        budget=arguments.budget,
    )
    if not chosen:
        raise UsageError(f"--methods {arguments.methods!r}: names nothing to compare, e.g. gptq,nf4")
    demo = arguments.source == "demo"
    with shown_progress(quiet=arguments.quiet) as progress:
        comparison = compare(
            arguments.source,
            chosen,
            out=out,
            text=arguments.text,
            max_tokens=arguments.max_tokens,
            overwrite=arguments.overwrite,
            progress=progress,
            calibration=arguments.calibration,
            samples=min(arguments.samples, DEMO_SAMPLES) if demo else arguments.samples,
            seq_len=min(arguments.seq_len, DEMO_SEQ_LEN) if demo else arguments.seq_len,
            seed=arguments.seed,
            device=arguments.device,
            memory=arguments.memory,
            allow_pickle=arguments.allow_pickle,
            trust_remote_code=arguments.trust_remote_code,
        )
    page = write_report(report, comparison)
    best = frontier(comparison)
    if arguments.json:
        write_json(comparison.to_json() | {"frontier": sorted(best)}, arguments.json)
    if arguments.json != "-":
        print_frontier(comparison, best)
        for note in comparison.notes:
            print(note)
        print(f"\nreport: {page}")
    return 0


def widths(text: str) -> list[int]:
    """The widths of ``--bits``, e.g. ``4,3``; :class:`UsageError` for others than 2 to 8."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and 2 <= int(part) <= 8 for part in parts):
        raise UsageError(f"--bits {text!r}: widths from 2 to 8 by commas are expected, e.g. 4,3")
    return [int(part) for part in parts]


def print_frontier(comparison: Comparison, best: frozenset[str]) -> None:
    """The table from many bits to few; the models marked ``*`` have no other with fewer bits and less divergence."""
    entries = sorted(comparison.candidates, key=lambda entry: -entry.evaluation.linear_bits_per_weight)
    rows = [(("* " if entry.name in best else "  ") + row(entry)[0], *row(entry)[1:]) for entry in entries]
    first, *others = original_row(comparison)
    marked = [index + 1 for index, entry in enumerate(entries) if entry.name in best]
    print_table(HEADER, [("  " + first, *others), *rows], emphasis=marked)
    print("* nothing here has less divergence at as few bits")
