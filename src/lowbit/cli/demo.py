"""``lowbit demo``: the whole path on the embedded model, in a few minutes on two cores."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.cli.output import human_bytes, print_table, write_json
from lowbit.cli.progress import shown_progress
from lowbit.errors import LowbitError, ResourceError, UsageError
from lowbit.pipeline.progress import Progress

if TYPE_CHECKING:
    from lowbit.evaluation.results import Candidate, Comparison

HELP = "quantize the embedded model by RTN, GPTQ and AWQ, compare each with the original, write a report"
EXAMPLES = """\
  lowbit demo
  lowbit demo --out /tmp/report --quick"""

SOURCE = "demo"
TEXT = "demo"
LOWBIT = ("-m", "lowbit")
METHODS = ("rtn", "gptq", "awq")
BITS = (4, 3)
GROUP_SIZE = 128
PROMPTS = (
    'def count_words(text):\n    """Return a dictionary of words and how often each occurs."""\n    counts =',
    'class Stack:\n    """A last-in, first-out container."""\n\n    def __init__(self, items=None):\n        self',
    "def read_config(path):\n    with open(path) as file:\n        for line in file:\n            if",
)
HEADER = (
    "model",
    "bits/weight",
    "size",
    "perplexity",
    "KL divergence",
    "top-1 agreement",
    "seconds",
    "peak memory",
)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much text the demo calibrates and evaluates on."""

    samples: int
    seq_len: int
    max_tokens: int


FULL = Effort(samples=64, seq_len=512, max_tokens=16384)
QUICK = Effort(samples=16, seq_len=256, max_tokens=4096)


@dataclass(frozen=True, slots=True)
class Quantized:
    """One quantized model and what its process said about itself."""

    directory: Path
    method: str
    bits: int
    result: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument(
        "--out", metavar="DIR", default="demo-out", help="where models and report go (default: demo-out)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the models of an earlier demo")
    parser.add_argument("--quick", action="store_true", help="less text: under a minute, rougher figures")
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON; - is stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    """Quantize, evaluate, print the table and write the report."""
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file; name a directory")
    effort = QUICK if arguments.quick else FULL
    with shown_progress(quiet=arguments.quiet) as progress:
        models = quantize_all(out, effort, progress, overwrite=arguments.overwrite)
        comparison = compare(models, effort, progress)

    from lowbit.evaluation.report import write_report

    page = write_report(out / "report", comparison)
    if arguments.json:
        write_json(comparison, arguments.json)
    if arguments.json != "-":
        print_comparison(comparison)
        print(f"\nreport: {page}")
    return 0


def quantize_all(out: Path, effort: Effort, progress: Progress, *, overwrite: bool) -> list[Quantized]:
    """Quantize the embedded model in every way, each in a process of its own so that its peak memory is its own."""
    jobs = [(method, bits) for bits in BITS for method in METHODS]
    progress.start("Quantizing", len(jobs))
    models = []
    for method, bits in jobs:
        directory = out / f"{method}-int{bits}-g{GROUP_SIZE}"
        command = ["quantize", SOURCE, str(directory), "--method", method, "--bits", str(bits)]
        command += ["--group-size", str(GROUP_SIZE), "--sym", "--calibration", TEXT, "--certify-tokens", "0"]
        command += ["--json", "--quiet", "--samples", str(effort.samples), "--seq-len", str(effort.seq_len)]
        result = run_lowbit([*command, *(["--overwrite"] if overwrite else [])])
        models.append(Quantized(directory, method, bits, result))
        progress.advance(directory.name, seconds=f"{result['seconds']:.1f}")
    progress.close()
    return models


def run_lowbit(arguments: list[str]) -> dict[str, Any]:
    """Run a verb in a new interpreter and return its JSON; its error becomes ours."""
    done = subprocess.run([sys.executable, *LOWBIT, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        message = lines[-1].removeprefix("lowbit: error: ") if lines else ""
        if done.returncode < 0:
            raise ResourceError(f"lowbit {arguments[0]} was killed by signal {-done.returncode}: out of memory?")
        raise LowbitError(message or f"lowbit {arguments[0]} ended with status {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def compare(models: list[Quantized], effort: Effort, progress: Progress) -> Comparison:
    """Evaluate every model against the original on text that it was neither trained nor calibrated on."""
    from lowbit.checkpoint import update_quality
    from lowbit.evaluation.evaluate import evaluate_all
    from lowbit.evaluation.results import Candidate, Comparison, Sample
    from lowbit.evaluation.samples import continuations

    results = evaluate_all(
        [model.directory for model in models],
        against=SOURCE,
        text=TEXT,
        max_tokens=effort.max_tokens,
        progress=progress,
    )
    candidates = []
    for model, evaluation in zip(models, results, strict=True):
        update_quality(model.directory, evaluation.certificate())
        errors = {module["name"]: module["error"] for module in model.result["modules"] if "error" in module}
        candidates.append(
            Candidate(
                name=f"{model.method.upper()} {model.bits} bit",
                method=model.method,
                spec=model.result["scheme"],
                evaluation=evaluation,
                seconds=model.result["seconds"],
                peak_memory_bytes=model.result["peak_memory_bytes"],
                module_errors=errors,
            )
        )
    progress.message("Writing samples")
    written = {results[0].reference or SOURCE: continuations(SOURCE, PROMPTS)}
    written |= {
        candidate.name: continuations(model.directory, PROMPTS)
        for candidate, model in zip(candidates, models, strict=True)
        if model.bits == BITS[0]
    }
    return Comparison(
        title="lowbit demo: the embedded model, quantized",
        candidates=tuple(candidates),
        samples=tuple(
            Sample(prompt, {name: texts[index] for name, texts in written.items()})
            for index, prompt in enumerate(PROMPTS)
        ),
        notes=(
            f"Calibrated on {effort.samples} sequences of {effort.seq_len} tokens of the standard library's training "
            "half, evaluated on its held-out modules.",
            "Seconds and peak memory are of the quantization alone, each in a process of its own; the interpreter with "
            "torch and transformers loaded is part of the memory.",
        ),
    )


def print_comparison(comparison: Comparison) -> None:
    """The table: the original first, then each quantized model."""
    print_table(HEADER, [original_row(comparison), *(row(candidate) for candidate in comparison.candidates)])


def original_row(comparison: Comparison) -> tuple[str, ...]:
    """The line of the model that all others were made from."""
    first = comparison.candidates[0].evaluation
    return (
        f"{comparison.reference} (original)",
        f"{comparison.reference_bits_per_weight:.2f}",
        human_bytes(comparison.reference_size_bytes),
        f"{first.reference_perplexity or 0:.3f}",
        "0",
        "100 %",
        "",
        "",
    )


def row(candidate: Candidate) -> tuple[str, ...]:
    """One line of the table; the bits are of the quantized weights, scales counted."""
    figures = candidate.evaluation
    return (
        candidate.name,
        f"{figures.linear_bits_per_weight:.2f}",
        human_bytes(figures.size_bytes),
        f"{figures.perplexity:.3f}",
        f"{figures.kl_divergence or 0:.4f}",
        f"{figures.top1_agreement or 0:.1%}".replace("%", " %"),
        f"{candidate.seconds or 0:.1f}",
        human_bytes(candidate.peak_memory_bytes or 0),
    )
