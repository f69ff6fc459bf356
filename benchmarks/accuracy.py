"""Accuracy of every method on the embedded model: lowbit beside the peers, each in an environment of its own.

    make bench-accuracy                                   # all that is installed or can be
    python benchmarks/accuracy.py --only gptq-4 hqq-2     # some comparisons, by name
    python benchmarks/accuracy.py --keep                  # measure again what an earlier run made

All start from the same float32 copy of the embedded model and the same calibration tokens, and write checkpoints in
their own formats. lowbit reads each one back, decodes it exactly, and measures all on the same held-out text against
the same reference; so the evaluation is one and the same, and only the weights differ. Bits per weight are those of the
stored files. Prints the tables of docs/accuracy.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks" / "peers"
SAMPLES, SEQ_LEN, TOKENS = 64, 512, 16384


@dataclass(frozen=True)
class System:
    """One quantizer in one comparison. `environment` names the one under .venvs, None is lowbit's own.

    `settings` are keyword arguments of `lowbit.quantize`; `arguments` those of a peer's script.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    environment: str | None = None
    script: str | None = None
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One method at one width: lowbit's, and the peers' of the same name; a peer that failed is named in the table."""

    name: str
    bits: int
    lowbit: System
    peers: tuple[System, ...] = ()


@dataclass(frozen=True)
class Figure:
    """What one checkpoint measured: nats per token, the standard error, perplexity, stored bits per weight."""

    case: str
    system: str
    bits: int
    kl: float
    error: float
    perplexity: float
    bits_per_weight: float


def cases() -> Iterator[Case]:
    """All comparisons. Groups are of 128 columns and symmetric; HQQ's and bitsandbytes' are their defaults."""
    for bits in (4, 3, 2):
        scheme = f"int{bits}-g128-sym"
        width = ("--bits", str(bits))

        def own(method: str, scheme: str = scheme, **settings: Any) -> System:
            return System("lowbit", {"method": method, "scheme": scheme, "format": "compressed-tensors", **settings})

        compressor = ("--scheme", f"W{bits}A16")
        gptqmodel, gptaq, foem = (
            System(name, environment="gptqmodel", script="gptqmodel_peer.py", arguments=("--method", method, *width))
            for name, method in (("GPTQModel", "gptq"), ("GPTQModel", "gptaq"), ("GPTQModel FOEM", "foem"))
        )
        gptq = System(
            "llm-compressor", environment="llmcompressor", script="llmcompressor_peer.py",
            arguments=("--method", "gptq", *compressor),
        )  # fmt: skip
        awq = System(
            "llm-compressor", environment="llmcompressor", script="llmcompressor_peer.py",
            arguments=("--method", "awq", *compressor),
        )  # fmt: skip
        autoround = System("auto-round", environment="autoround", script="autoround_peer.py", arguments=width)
        yield Case(f"gptq-{bits}", bits, own("gptq"), (gptq, gptqmodel))
        yield Case(f"awq-{bits}", bits, own("awq"), (awq,))
        if bits == 4:
            original = System(
                "GPTQModel", environment="gptqmodel", script="gptqmodel_peer.py", arguments=("--method", "awq", *width)
            )
            yield Case("awq-asym-4", bits, own("awq", "W4A16_ASYM", format="awq"), (original,))
        yield Case(f"autoround-{bits}", bits, own("autoround"), (autoround,))
        yield Case(f"gptaq-{bits}", bits, own("gptaq"), (gptaq, foem))
        nearest = System(
            "llm-compressor", environment="llmcompressor", script="llmcompressor_peer.py",
            arguments=("--method", "rtn", *compressor),
        )  # fmt: skip
        yield Case(f"rtn-{bits}", bits, own("rtn"), (nearest,))
        for name, settings in (
            ("awq+gptq", {"method": "gptq", "transform": "awq"}),
            ("awq+gptaq", {"method": "gptaq", "transform": "awq"}),
            ("rotation+gptq", {"method": "gptq", "rotate": "hadamard"}),
            ("rotation+gptaq", {"method": "gptaq", "rotate": "hadamard"}),
            # as many stored bits as peers need for groups of 128, and as llama.cpp's types have
            ("gptaq-g64", {"method": "gptaq", "scheme": f"int{bits}-g64-sym"}),
            ("gptaq-g32", {"method": "gptaq", "scheme": f"int{bits}-g32-sym"}),
        ):
            yield Case(f"{name}-{bits}", bits, own(**settings))
        hqq = System("hqq", environment="hqq", script="hqq_peer.py", arguments=width)
        yield Case(f"hqq-{bits}", bits, own("hqq", f"int{bits}-g64-affine", format="hqq"), (hqq,))
    yield from _bitsandbytes()
    smooth = System(
        "llm-compressor", environment="llmcompressor", script="llmcompressor_peer.py",
        arguments=("--method", "smoothquant", "--scheme", "W8A8"),
    )  # fmt: skip
    own_smooth = {"method": "gptq", "scheme": "W8A8", "format": "compressed-tensors", "transform": "smoothquant"}
    yield Case("w8a8-smoothquant", 8, System("lowbit", own_smooth), (smooth,))
    for bits, mix in (
        *((4, mix) for mix in ("Q4_K_M", "Q4_0", "IQ4_XS", "IQ4_NL")),
        *((3, mix) for mix in ("Q3_K_M", "IQ3_M", "IQ3_S", "IQ3_XXS")),
        *((2, mix) for mix in ("Q2_K", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS")),
    ):
        peer = System("llama.cpp", environment="llamacpp", script="llamacpp_peer.py", arguments=("--type", mix))
        yield Case(f"{mix.lower()}", bits, System("lowbit", {"scheme": mix, "format": "gguf"}), (peer,))


def _bitsandbytes() -> Iterator[Case]:
    for name, scheme, arguments in (
        ("nf4", "NF4", ("--type", "nf4")),
        ("nf4-dq", "NF4_DQ", ("--type", "nf4", "--double-quant")),
        ("fp4", "FP4", ("--type", "fp4")),
        ("llm-int8", "LLM_INT8", ("--type", "int8")),
    ):
        peer = System("bitsandbytes", environment="bitsandbytes", script="bitsandbytes_peer.py", arguments=arguments)
        settings = {"method": "rtn", "scheme": scheme, "format": "bitsandbytes"}
        yield Case(name, 8 if name == "llm-int8" else 4, System("lowbit", settings), (peer,))


def main() -> int:
    """Make, measure, print, write."""
    options = _options()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    chosen = [case for case in cases() if not options.only or case.name in options.only]
    if not chosen:
        raise SystemExit(f"--only {' '.join(options.only)}: no such comparison")
    source = _source(work)
    made: dict[tuple[str, str], Path] = {}
    failed: dict[str, str] = {}
    for case in chosen:
        for system in (case.lowbit, *case.peers):
            started = time.perf_counter()
            found = _make(case, system, source, work, options)
            if isinstance(found, str):
                failed[f"{case.name} {system.name}"] = found
            else:
                made[case.name, system.name] = found
            told = found if isinstance(found, str) else f"{time.perf_counter() - started:.0f} s"
            print(f"{case.name:20} {system.name:16} {told}", flush=True)
    figures = _measure(made, source, {case.name: case.bits for case in chosen})
    (work / "accuracy.json").write_text(json.dumps([asdict(figure) for figure in figures], indent=1))
    print(render(chosen, figures, failed))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names of comparisons, e.g. gptq-4")
    parser.add_argument("--keep", action="store_true", help="do not make again what is there")
    parser.add_argument("--own", action="store_true", help="make lowbit's again, keep the peers'")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "accuracy", help="folder for the checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _source(work: Path) -> Path:
    """The embedded model in float32 (so that no peer computes in bfloat16), the tokens, and what llama.cpp needs."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import lowbit
    from lowbit.calibration import load_calibration, load_tokenizer
    from lowbit.checkpoint import locate

    source = work / "source"
    if not (source / "config.json").exists():
        origin = locate("demo")
        AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32).save_pretrained(source)
        AutoTokenizer.from_pretrained(origin).save_pretrained(source)
    loaded = load_calibration("demo", load_tokenizer(source), samples=SAMPLES, seq_len=SEQ_LEN, seed=42)
    np.save(work / "tokens.npy", loaded.ids.numpy())
    (work / "tokens.sha256").write_text(loaded.sha256)
    if not (work / "source.gguf").exists():
        lowbit.quantize(source, work / "source.gguf", scheme="F32", certify_tokens=0)
    if not (work / "imatrix.gguf").exists():
        command = [sys.executable, "-m", "lowbit", "imatrix", source, work / "imatrix.gguf", "--calibration", "demo"]
        command += ["--samples", SAMPLES, "--seq-len", SEQ_LEN, "--quiet"]
        subprocess.run([str(part) for part in command], check=True)
    return source


def _make(case: Case, system: System, source: Path, work: Path, options: argparse.Namespace) -> Path | str:
    """The checkpoint of one system, or why there is none."""
    suffix = ".gguf" if system.settings.get("format") == "gguf" or system.environment == "llamacpp" else ""
    out = work / f"{case.name}-{system.name}{suffix}"
    own = system.environment is None
    if out.exists() and (options.keep or (options.own and not own)):
        return out
    if out.is_dir():
        shutil.rmtree(out)
    out.unlink(missing_ok=True)
    return _own(system, source, out, work) if own else _peer(system, source, out, work, options.threads)


def _own(system: System, source: Path, out: Path, work: Path) -> Path | str:
    import lowbit
    from lowbit.checkpoint import read_manifest
    from lowbit.quant import METHODS
    from lowbit.quant.transforms import TRANSFORMS

    settings = dict(system.settings)
    for name, table in (("method", METHODS), ("transform", TRANSFORMS)):
        if settings.get(name, next(iter(table))) not in table:
            return f"this lowbit has no {name} {settings[name]}"
    if settings.get("format") == "gguf":
        del settings["format"]
        settings["imatrix"] = work / "imatrix.gguf"
    else:
        settings |= {"calibration": "demo", "samples": SAMPLES, "seq_len": SEQ_LEN, "seed": 42}
    try:
        lowbit.quantize(source, out, certify_tokens=0, overwrite=True, **settings)
    except lowbit.LowbitError as error:
        return " ".join(str(error).split())
    manifest = read_manifest(out)
    used = None if manifest is None or manifest.calibration is None else manifest.calibration.get("sha256")
    if "imatrix" not in settings and used not in (None, (work / "tokens.sha256").read_text()):
        raise SystemExit(f"{out}: calibrated on other tokens than the peers")
    return out


def _peer(system: System, source: Path, out: Path, work: Path, threads: int) -> Path | str:
    command = [sys.executable, ROOT / "tests" / "engines" / "environments.py", system.environment]
    built = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=False)
    if built.returncode:
        return f"its environment {system.environment} could not be built"
    python = Path(built.stdout.strip().splitlines()[-1])
    partial = work / f"partial-{out.name}"
    shutil.rmtree(partial, ignore_errors=True)
    call: list[Any] = [python, PEERS / str(system.script), source, partial, *system.arguments, "--threads", threads]
    if system.environment == "llamacpp":
        call[2] = work / "source.gguf"
        call += ["--imatrix", work / "imatrix.gguf"]
    elif system.environment not in ("hqq", "bitsandbytes"):
        call += ["--tokens", work / "tokens.npy"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
    log = work / f"{out.name}.log"
    with log.open("wb") as sink:
        done = subprocess.run(
            [str(part) for part in call], stdout=sink, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode or not partial.exists():
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return f"failed: {lines[-1].strip()[:160] if lines else done.returncode}"
    return _home(partial).rename(out)


def _home(partial: Path) -> Path:
    """Where the checkpoint is: some peers write into a folder of their own below the one they were given."""
    if partial.is_file() or (partial / "config.json").exists():
        return partial
    return next((found.parent for found in sorted(partial.rglob("config.json"))), partial)


def _measure(made: dict[tuple[str, str], Path], source: Path, bits: dict[str, int]) -> list[Figure]:
    """lowbit's evaluation of every checkpoint; inputs that an engine rounds are rounded here too."""
    from lowbit.evaluation.evaluate import evaluate_all

    results = evaluate_all(list(made.values()), against=source, text="demo", max_tokens=TOKENS)
    return [
        Figure(
            case,
            system,
            bits[case],
            float(result.kl_divergence or 0.0),
            float(result.kl_divergence_error or 0.0),
            result.perplexity,
            result.linear_bits_per_weight,
        )
        for (case, system), result in zip(made, results, strict=True)
    ]


def render(chosen: list[Case], figures: list[Figure], failed: dict[str, str]) -> str:
    """Two Markdown tables: each method beside its original; each peer beside lowbit's best of no more stored bits."""
    known = {(figure.case, figure.system): figure for figure in figures}
    lines = ["", "| comparison | system | bits per weight | KL divergence | perplexity | lowbit ÷ peer |"]
    lines.append("|---|---|---|---|---|---|")
    for case in chosen:
        mine = known.get((case.name, "lowbit"))
        for system in (case.lowbit, *case.peers):
            figure = known.get((case.name, system.name))
            if figure is None:
                continue
            ratio = f"{mine.kl / figure.kl:.3f}" if mine is not None and system is not case.lowbit else ""
            lines.append(
                f"| {case.name} | {system.name} | {figure.bits_per_weight:.3f} | {figure.kl:.4f} ± {figure.error:.4f} "
                f"| {figure.perplexity:.3f} | {ratio} |"
            )
    lines += ["", "| bits | peer | bits per weight | KL | lowbit's best | bits per weight | KL | lowbit ÷ peer |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for peer in sorted((f for f in figures if f.system != "lowbit" and f.bits <= 4), key=lambda f: (-f.bits, f.kl)):
        allowed = [f for f in figures if f.system == "lowbit" and f.bits_per_weight <= peer.bits_per_weight * 1.001]
        if allowed:
            best = min(allowed, key=lambda figure: figure.kl)
            lines.append(
                f"| {peer.bits} | {peer.system} ({peer.case}) | {peer.bits_per_weight:.3f} | {peer.kl:.4f} "
                f"| {best.case} | {best.bits_per_weight:.3f} | {best.kl:.4f} | {best.kl / peer.kl:.3f} |"
            )
    lines += ["", *(f"not measured: {name}: {reason}" for name, reason in failed.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
