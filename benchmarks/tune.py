"""What ``lowbit tune`` gains over the settings that ``lowbit serve`` starts with: winner and default side by side.

    python benchmarks/tune.py [--models demo 1.1b] [--work DIR] [--budget 150s 480s] [--json FILE]

The 1.1B model has random weights (its tokens cost what a trained model's cost; what it says means nothing, so prompt
lookup is left out) and is made in ``--work``, quantized to Q4_0. Each run is one ``lowbit tune``: races, then default
and winner in alternation on requests that neither has seen. Where the ratio is below 1.15, the table of the races is
the sweep that shows what else was tried.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOWBIT = [sys.executable, "-m", "lowbit"]

_ALL_BUT_LOOKUP = "threads,threads_batch,concurrency,batch,ubatch,flash_attention,prefix_caching,cache_reuse,spin"

CASES: dict[str, list[str]] = {
    "demo": ["--concurrency", "8", "--prompt-tokens", "128", "--output-tokens", "64", "--dedicated"],
    "1.1b": [
        *("--concurrency", "4", "--prompt-tokens", "16", "--output-tokens", "16", "--dedicated"),
        *("--settings", _ALL_BUT_LOOKUP),
    ],
}
"""The workload of each model."""


def make_model(work: Path) -> Path:
    """The 1.1B model as Q4_0, made once."""
    out = work / "1.1b-Q4_0.gguf"
    if out.exists():
        return out
    checkpoint = work / "1.1b"
    peer = [sys.executable, str(ROOT / "benchmarks" / "peers" / "workload.py"), "checkpoint", str(checkpoint)]
    subprocess.run([*peer, "--shape", "1.1b", "--layers", "22", "--dtype", "float32"], check=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # llama.cpp has no word-level tokenizer
        shutil.copy(ROOT / "src" / "lowbit" / "demo" / "model" / name, checkpoint / name)
    subprocess.run([*LOWBIT, "quantize", str(checkpoint), str(out), "--scheme", "Q4_0", "--quiet"], check=True)
    shutil.rmtree(checkpoint)
    return out


def tune(source: str, name: str, budget: str) -> dict[str, Any]:
    """One search; gives its document."""
    command = [*LOWBIT, "tune", source, *CASES[name], "--budget", budget, "--dry-run", "--json", "-"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def show(name: str, found: dict[str, Any]) -> None:
    """The sweep and the last comparison."""
    print(f"\n{name}: {found['workload']}")
    base = found["scores"]["default"]
    for candidate, score in sorted(found["scores"].items(), key=lambda pair: -pair[1]):
        print(f"  {candidate:48}{score:10.4g}{score / base:8.3f}")
    for key in ("default", "tuned"):
        each = found[key]
        label = "default" if key == "default" else found["winner"]
        print(f"  {label:48}{each['median']:10.4g} {each['unit']} ({each['q1']:.4g} to {each['q3']:.4g})")
    verdict = "met" if found["ratio"] >= 1.15 and found["verdict"] == "better" else "not met: see what was tried above"
    print(f"  ratio {found['ratio']:.3f} (p {found['p']:.4f}); 1.15 is {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(CASES), default=["demo", "1.1b"])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench-tune")
    parser.add_argument("--budget", nargs="+", default=["150s", "480s"], help="of each model")
    parser.add_argument("--gguf", help="take this file as the 1.1B model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    budgets = dict(zip(options.models, options.budget, strict=False))
    documents = {}
    for name in options.models:
        source = name
        if name != "demo":
            options.work.mkdir(parents=True, exist_ok=True)
            source = options.gguf or str(make_model(options.work))
        documents[name] = tune(source, name, budgets.get(name, options.budget[-1]))
        show(name, documents[name])
    if options.json:
        options.json.write_text(json.dumps(documents, indent=2) + "\n")


if __name__ == "__main__":
    main()
