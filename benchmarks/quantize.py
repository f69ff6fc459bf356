"""Time and memory of quantization: lowbit beside its peers, each in a process and an environment of its own.

    make bench-quantize                                       # the 1.1B Llama, all systems, whole
    python benchmarks/quantize.py --layers 2 6                # two depths: seconds per block, extrapolated
    python benchmarks/quantize.py --shape 8b --dtype bfloat16 --layers 1 2 --systems lowbit-gptq

Every system reads the same random checkpoint and the same calibration tokens, and writes a checkpoint. Wall seconds
are of the whole process; CPU seconds and peak resident memory are the kernel's account of it. With two depths, the
difference gives the seconds of one block and the rest is the fixed cost (imports, embedding, writing), so a short run
extrapolates honestly. Standard library only: a child's peak memory includes its parent's at the moment of the fork.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib import util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks" / "peers"
GROUP = 128


@dataclass(frozen=True)
class System:
    """A quantizer: `environment` under .venvs (None: the project's own), and the script run in it."""

    method: str
    environment: str | None = None
    script: str | None = None


SYSTEMS: dict[str, System] = {
    "lowbit-rtn": System("rtn"),
    "lowbit-gptq": System("gptq"),
    "lowbit-awq": System("awq"),
    "llmcompressor-gptq": System("gptq", "llmcompressor", "llmcompressor_peer.py"),
    "llmcompressor-awq": System("awq", "llmcompressor", "llmcompressor_peer.py"),
    "gptqmodel-gptq": System("gptq", "gptqmodel", "gptqmodel_peer.py"),
}

DEFAULT = ["lowbit-gptq", "llmcompressor-gptq", "lowbit-awq", "llmcompressor-awq"]


@dataclass(frozen=True)
class Run:
    """One process. Times in seconds, memory in bytes; `phases` as the system itself reports them."""

    system: str
    layers: int
    wall: float
    cpu: float
    peak_rss: int
    phases: dict[str, float]
    versions: dict[str, str]


@dataclass(frozen=True)
class Summary:
    """A system over the depths that were run, and its whole-model time (`extrapolated` when that depth was not run)."""

    system: str
    per_block: float | None
    fixed: float | None
    total: float
    extrapolated: bool
    peak_rss: int
    over_floor: float


def main() -> int:
    """Prepare, run, print, write."""
    options = _options()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    interpreters = {name: _interpreter(SYSTEMS[name]) for name in options.systems}
    machine = json.loads(_tool("machine", "--threads", str(options.threads)))
    shape = _shapes()[options.shape]
    depths = sorted(set(options.layers or [shape["num_hidden_layers"]]))
    runs: list[Run] = []
    for layers in depths:
        source = work / f"{options.shape}-{layers}-{options.dtype}"
        if not (source / "config.json").is_file():
            _tool("checkpoint", source, "--shape", options.shape, "--layers", layers, "--dtype", options.dtype)
        tokens, text = work / "ids.npy", work / "calibration.txt"
        digest = _tool(
            "tokens",
            source,
            "--text",
            text,
            "--out",
            tokens,
            "--samples",
            options.samples,
            "--seq-len",
            options.seq_len,
        )
        for name in options.systems:
            run = _run(name, interpreters[name], source, work, tokens, text, digest.strip(), options)
            print(
                f"{name:20} {layers:3} layers {run.wall:8.1f} s {run.cpu:8.1f} CPU s {run.peak_rss / 2**20:7.0f} MiB",
                flush=True,
            )
            runs.append(run)
    floors = {method: floor(shape, options, machine, method) for method in ("rtn", "gptq", "awq")}
    summaries = [summarise(name, runs, shape["num_hidden_layers"], floors) for name in options.systems]
    print(render(summaries, floors, shape["num_hidden_layers"], machine, options))
    result = {
        "machine": machine,
        "options": {key: str(value) for key, value in vars(options).items()},
        "runs": [asdict(run) for run in runs],
        "floors_seconds": floors,
        "summaries": [asdict(summary) for summary in summaries],
        "ratios": ratios(summaries),
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="1.1b", choices=["1.1b", "8b", "0.1b"])
    parser.add_argument("--layers", type=int, nargs="+", help="depths to run; default the whole model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--systems", nargs="+", default=DEFAULT, choices=list(SYSTEMS), metavar="SYSTEM")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--memory", help="lowbit's --memory")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "bench-quantize", help="scratch; kept between runs"
    )
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench-quantize.json")
    return parser.parse_args()


def _shapes() -> dict[str, dict[str, int]]:
    spec = util.spec_from_file_location("workload", PEERS / "workload.py")
    if spec is None or spec.loader is None:
        raise SystemExit("benchmarks/peers/workload.py is missing")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.SHAPES)


def _interpreter(system: System) -> Path:
    """The system's interpreter, its environment built if need be."""
    if system.environment is None:
        return Path(sys.executable)
    command = [sys.executable, str(ROOT / "tests" / "engines" / "environments.py"), system.environment]
    built = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Path(built.stdout.strip().splitlines()[-1])


def _tool(*arguments: object) -> str:
    command = [sys.executable, str(PEERS / "workload.py"), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _run(
    name: str,
    python: Path,
    source: Path,
    work: Path,
    tokens: Path,
    text: Path,
    digest: str,
    options: argparse.Namespace,
) -> Run:
    """Run one system over `source` and measure its process; a failure ends the benchmark with its last lines."""
    system = SYSTEMS[name]
    out, log = work / f"{name}-out", work / f"{name}.log"
    shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
    if system.script is None:
        command = [python, "-m", "lowbit", "quantize", source, out, "--method", system.method, "--scheme", "W4A16"]
        command += ["--format", "compressed-tensors", "--calibration", text, "--samples", options.samples]
        command += ["--seq-len", options.seq_len, "--certify-tokens", 0, "--device", "cpu", "--json"]
        command += ["--memory", options.memory] if options.memory else []
    else:
        command = [python, PEERS / system.script, source, out, "--method", system.method, "--tokens", tokens]
        command += ["--threads", options.threads]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    environment |= {"NUMBA_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("wb") as sink:
        start = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], stdout=sink, stderr=subprocess.STDOUT, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"{name} ended with status {process.returncode}; the end of {log}:\n{tail}")
    report = _report(log) if system.script is not None else _own_report(out, digest)
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    shutil.rmtree(out)
    cpu = usage.ru_utime + usage.ru_stime
    return Run(name, layers, wall, cpu, usage.ru_maxrss * 1024, report.get("phases", {}), report.get("versions", {}))


def _report(log: Path) -> dict[str, Any]:
    """The JSON line that a peer's script prints last (its libraries may print after it)."""
    for line in reversed(log.read_text(errors="replace").splitlines()):
        if line.startswith('{"phases"'):
            return dict(json.loads(line))
    raise SystemExit(f"{log}: no report in it")


def _own_report(out: Path, digest: str) -> dict[str, Any]:
    """lowbit's manifest must name the calibration tokens that the peers get."""
    manifest = json.loads((out / "lowbit.json").read_text())
    used = (manifest.get("calibration") or {"sha256": digest})["sha256"]
    if used != digest:
        raise SystemExit(f"lowbit calibrated on other tokens than the peers: {used} and not {digest}")
    return {"versions": {"lowbit": manifest["lowbit_version"]}}


def floor(shape: dict[str, int], options: argparse.Namespace, machine: dict[str, Any], method: str) -> float:
    """Seconds under which the whole model cannot be done at this machine's measured rates.

    Operations per block: one forward; the lower half of one Gram matrix per distinct input (q/k/v, o, gate/up, down);
    for GPTQ one factor of each (2/3 n^3) and the trailing updates (out * in^2 per weight). What an AWQ search computes
    is a choice, so its floor holds none of it. Bytes: each weight read once and its codes written once.
    """
    hidden, ffn, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    width = shape["num_attention_heads"] * shape["head_dim"]
    key_value = shape["num_key_value_heads"] * shape["head_dim"]
    tokens = options.samples * options.seq_len
    weights = {hidden: hidden * (width + 2 * key_value + 2 * ffn), width: hidden * width, ffn: hidden * ffn}
    if width == hidden:
        weights[hidden] = hidden * (2 * width + 2 * key_value + 2 * ffn)
    parameters = sum(weights.values())
    operations = 0.0
    if method != "rtn":
        operations += 2 * tokens * parameters + 2 * tokens * options.seq_len * width
        operations += tokens * (2 * hidden**2 + width**2 + ffn**2)
    if method == "gptq":
        operations += 2 / 3 * (2 * hidden**3 + width**3 + ffn**3)
        operations += sum(count * size for size, count in weights.items())
    size = 4 if options.dtype == "float32" else 2
    shell = 2 * shape["vocab_size"] * hidden * size * 2
    moved = layers * parameters * (size + 0.5 + 2 / GROUP) + shell
    return layers * operations / machine["gemm_flops"] + moved / machine["copy_bytes_per_second"]


def summarise(name: str, runs: list[Run], layers: int, floors: dict[str, float]) -> Summary:
    """Seconds per block and fixed from the shallowest and the deepest run, and the whole model's."""
    mine = sorted((run for run in runs if run.system == name), key=lambda run: run.layers)
    first, last = mine[0], mine[-1]
    per_block = fixed = None
    if last.layers > first.layers:
        per_block = (last.wall - first.wall) / (last.layers - first.layers)
        fixed = first.wall - per_block * first.layers
    whole = [run.wall for run in mine if run.layers == layers]
    if whole:
        total = whole[0]
    elif per_block is not None and fixed is not None:
        total = fixed + layers * per_block
    else:
        total = float("nan")
    peak = max(run.peak_rss for run in mine)
    return Summary(name, per_block, fixed, total, not whole, peak, total / floors[SYSTEMS[name].method])


def ratios(summaries: list[Summary]) -> dict[str, float]:
    """Whole-model time of lowbit over each peer's, same method; and per block, where that was measured."""
    own = {SYSTEMS[s.system].method: s for s in summaries if SYSTEMS[s.system].script is None}
    found: dict[str, float] = {}
    for peer in summaries:
        mine = own.get(SYSTEMS[peer.system].method)
        if SYSTEMS[peer.system].script is None or mine is None:
            continue
        found[f"{mine.system} / {peer.system}"] = mine.total / peer.total
        if mine.per_block is not None and peer.per_block is not None:
            found[f"{mine.system} / {peer.system}, per block"] = mine.per_block / peer.per_block
    return found


def render(
    summaries: list[Summary],
    floors: dict[str, float],
    layers: int,
    machine: dict[str, Any],
    options: argparse.Namespace,
) -> str:
    """The table for people."""
    rates = f"{machine['gemm_flops'] / 1e9:.0f} GFLOP/s, {machine['copy_bytes_per_second'] / 1e9:.1f} GB/s"
    lines = [
        "",
        f"Llama {options.shape}, {layers} layers, {options.dtype}, {options.samples} x {options.seq_len} tokens, "
        f"{options.threads} threads ({machine['cpu']}, {rates})",
        f"{'system':20} {'s/block':>8} {'fixed s':>8} {'whole s':>9} {'/ floor':>8} {'peak MiB':>9}",
    ]
    for s in summaries:
        block = "-" if s.per_block is None else f"{s.per_block:.2f}"
        fixed = "-" if s.fixed is None else f"{s.fixed:.1f}"
        mark = "~" if s.extrapolated else " "
        lines.append(
            f"{s.system:20} {block:>8} {fixed:>8} {mark}{s.total:8.1f} {s.over_floor:8.2f} {s.peak_rss / 2**20:9.0f}"
        )
    lines.append("floors: " + ", ".join(f"{method} {seconds:.1f} s" for method, seconds in floors.items()))
    lines += [f"{name}: {value:.3f}" for name, value in ratios(summaries).items()]
    lines.append("~ extrapolated from seconds per block; peak memory is that of the deepest run")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
