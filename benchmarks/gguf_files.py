"""GGUF files: lowbit's quantizers beside llama.cpp's own, in accuracy, time and memory.

    make bench-gguf                                            # all three parts
    python benchmarks/gguf_files.py types                      # error and time of each type, on the same rows
    python benchmarks/gguf_files.py model --shape 0.1b         # safetensors to GGUF, whole processes
    python benchmarks/gguf_files.py kl --schemes Q4_K_M IQ2_M  # KL divergence of the embedded model's files

The peer is llama.cpp as llama-cpp-python builds it for this machine: its converter, then its quantize call. All of a
part's ratios come from one run, the two systems taking turns. Standard library only: a child's peak memory includes its
parent's at the moment of the fork. (The file is not called gguf.py because scripts beside it import that package.)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks" / "peers"
SCHEMES = ["Q4_K_M", "Q8_0", "Q4_0", "F16"]
KL_SCHEMES = [
    "Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_M", "IQ2_XS", "IQ2_XXS",
    "IQ1_M", "IQ1_S",
]  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One process or several in a row: seconds, and the peak resident bytes of the largest."""

    wall: float
    cpu: float
    peak_rss: int

    def __add__(self, other: Run) -> Run:
        return Run(self.wall + other.wall, self.cpu + other.cpu, max(self.peak_rss, other.peak_rss))


def main() -> int:
    """Run the parts asked for, print tables, write JSON."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    peer = _peer()
    results: dict[str, Any] = {}
    for part in options.parts:
        results[part] = PARTS[part](options, peer)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=list(PARTS))
    parser.add_argument("--types", nargs="+", help="of the part `types`; default all")
    parser.add_argument("--rows", type=int, default=64, help="of the Gaussian matrix")
    parser.add_argument("--shape", default="1.1b", help="of the part `model`, see peers/workload.py")
    parser.add_argument("--layers", type=int, help="default the whole model")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--schemes", nargs="+", help="of the parts `model` and `kl`")
    parser.add_argument("--repeats", type=int, default=3, help="of each process of `model`; the fastest counts")
    parser.add_argument("--alone", action="store_true", help="of `model`: lowbit and the copy only")
    parser.add_argument("--kl-tokens", type=int, default=8192)
    parser.add_argument("--draws", type=int, default=8, help="of `kl`: models")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench-gguf", help="scratch; kept between runs")
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench-gguf.json")
    return parser.parse_args()


def _peer() -> Path:
    """The interpreter of the peer's environment, built if need be."""
    command = [sys.executable, str(ROOT / "tests" / "engines" / "environments.py"), "llamacpp"]
    built = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Path(built.stdout.strip().splitlines()[-1])


def _measured(command: list[object], log: Path, threads: int) -> Run:
    """Run a process; a failure ends the benchmark with its last lines."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "LOWBIT_CACHE": str(log.parent / "cache")}
    with log.open("wb") as sink:
        start = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], stdout=sink, stderr=sink, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"status {process.returncode} of {' '.join(map(str, command))}; the end of {log}:\n{tail}")
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def _lowbit(*arguments: object) -> list[object]:
    return [sys.executable, "-m", "lowbit", *arguments, "--overwrite", "--quiet"]


def types(options: argparse.Namespace, peer: Path) -> list[dict[str, Any]]:
    """Error ratios and nanoseconds per weight."""
    imatrix = options.work / "demo.imatrix.gguf"
    if not imatrix.is_file():
        _measured(_lowbit("imatrix", "demo", imatrix), options.work / "imatrix.log", options.threads)
    library = next(peer.parents[1].glob("lib/python*/site-packages/llama_cpp/lib/libggml-base.so"))
    command = [sys.executable, PEERS / "ggml_types.py", library, imatrix, "--rows", options.rows]
    command += ["--types", *options.types] if options.types else []
    print("\nsquared error, lowbit over llama.cpp (below 1 is better), and ns per weight on one thread")
    print(f"{'':8} | {'Gaussian rows':^49} | {'embedded model':^49}")
    half = f"{'plain':>6} {'ones':>5} {'weighted':>8}  {'ns: lowbit':>12} {'llama.cpp':>13}"
    print(f"{'type':8} | {half} | {half}")
    rows = []
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        row = json.loads(line)
        rows.append(row)
        print(f"{row['type']:8} | {_half(row['gaussian'])} | {_half(row['model'])}", flush=True)
    if process.wait() != 0:
        raise SystemExit("ggml_types.py failed")
    return rows


def _half(found: dict[str, Any]) -> str:
    plain, weighted = found["plain"], found["weighted"]
    times = [f"{plain[name]['ns']:.0f}/{weighted[name]['ns']:.0f}" for name in ("lowbit", "llama.cpp")]
    return (
        f"{plain['ratio']:6.3f} {found['ones']['ratio']:5.3f} {weighted['ratio']:8.3f}  {times[0]:>12} {times[1]:>13}"
    )


def model(options: argparse.Namespace, peer: Path) -> dict[str, Any]:
    """Wall time and peak memory from safetensors to GGUF, beside copies that end on the disk.

    Two floors: a copy of the source (whose bytes per second are the copy rate), and less than that: reading the source
    and writing as many bytes as the result has. The shares of both are given for whole processes, and without start-up:
    the same command for a model of one tiny block with the same vocabulary. "again" is lowbit over a source whose hash
    it knows from an earlier run.
    """
    source = _checkpoint(options, options.shape, options.layers)
    tiny = _checkpoint(options, "start-up", None)
    results: dict[str, Any] = {"runs": {}, "ratios": {}}
    print(f"\nLlama {options.shape} {options.dtype}, {options.threads} threads; fastest of {options.repeats}, in turns")
    columns = f"{'of copy':>8} {'moving':>8} {'of floor':>9} {'moving':>8}"
    print(f"{'scheme':8} {'system':10} {'wall s':>8} {'CPU s':>8} {'peak MiB':>9} {columns}")
    for scheme in options.schemes or SCHEMES:
        own, theirs = options.work / f"lowbit-{scheme}.gguf", options.work / f"llamacpp-{scheme}.gguf"
        found: dict[str, list[Run]] = {"lowbit": [], "again": [], "llama.cpp": [], "start-up": []}
        copies, floors = [], []
        for _ in range(options.repeats):
            found["start-up"].append(_made(tiny, own, scheme, options))
            shutil.rmtree(options.work / "cache", ignore_errors=True)
            found["lowbit"].append(_made(source, own, scheme, options))
            found["again"].append(_made(source, own, scheme, options))
            copies.append(_copy_seconds(source, None, options.work / "copy.bin"))
            floors.append(_copy_seconds(source, own.stat().st_size, options.work / "copy.bin"))
            if not options.alone:
                found["llama.cpp"].append(_llama_cpp(source, theirs, scheme, peer, options))
        best = {name: min(runs, key=lambda run: run.wall) for name, runs in found.items() if runs}
        start = best.pop("start-up").wall
        ratios = {}
        for name, run in best.items():
            figures = f"{run.wall:8.1f} {run.cpu:8.1f} {run.peak_rss / 2**20:9.0f}"
            for floor, seconds, width in (("copy", min(copies), 8), ("floor", min(floors), 9)):
                whole, moving = seconds / run.wall, seconds / (run.wall - start)
                figures += f" {whole:{width}.2f} {moving:8.2f}" if name != "llama.cpp" else ""
                ratios |= {f"{name}_of_{floor}": whole, f"{name}_of_{floor}_without_start": moving}
            print(f"{scheme:8} {name:10} {figures}")
        print(f"{scheme:8} copy {min(copies):.2f} s, floor {min(floors):.2f} s, start-up {start:.2f} s", flush=True)
        if "llama.cpp" in best:
            ratios["time"] = best["lowbit"].wall / best["llama.cpp"].wall
            ratios["memory"] = best["lowbit"].peak_rss / best["llama.cpp"].peak_rss
            ratios["file"] = own.stat().st_size / theirs.stat().st_size
            shown = ", ".join(f"{name} {ratios[name]:.4g}" for name in ("time", "memory", "file"))
            print(f"{scheme:8} lowbit / llama.cpp: {shown}")
            theirs.unlink()
        results["runs"][scheme] = {name: [asdict(run) for run in runs] for name, runs in found.items()}
        results["ratios"][scheme] = ratios
        own.unlink()
    return results


def _checkpoint(options: argparse.Namespace, shape: str, layers: int | None) -> Path:
    """The checkpoint of a shape, made unless it is there."""
    source: Path = options.work / f"{shape}-{layers or 'whole'}-{options.dtype}"
    if not (source / "config.json").is_file():
        command: list[object] = [sys.executable, PEERS / "workload.py", "checkpoint", source, "--tokenizer", "pieces"]
        command += ["--shape", shape, "--dtype", options.dtype, *(["--layers", layers] if layers else [])]
        _measured(command, options.work / "checkpoint.log", options.threads)
    return source


def _made(source: Path, out: Path, scheme: str, options: argparse.Namespace) -> Run:
    """lowbit's way, whole processes; F16 is a conversion."""
    if scheme == "F16":
        command = _lowbit("convert", source, out, "--dtype", "f16")
    else:
        command = _lowbit("quantize", source, out, "--scheme", scheme, "--certify-tokens", 0, "--device", "cpu")
    return _measured(command, options.work / "lowbit.log", options.threads)


def _llama_cpp(source: Path, out: Path, scheme: str, peer: Path, options: argparse.Namespace) -> Run:
    """llama.cpp's way: convert, then quantize; its converter writes Q8_0 and F16 by itself."""
    converter = peer.parents[1] / "source" / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    direct = {"Q8_0": "q8_0", "F16": "f16"}.get(scheme)
    middle = out if direct else options.work / "converted.gguf"
    dtype = direct or {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[options.dtype]
    command: list[object] = [peer, converter, source, "--outfile", middle, "--outtype", dtype]
    run = _measured(command, options.work / "convert.log", options.threads)
    if not direct:
        command = [peer, PEERS / "llamacpp_peer.py", middle, out, "--type", scheme, "--threads", options.threads]
        run += _measured(command, options.work / "quantize.log", options.threads)
        middle.unlink()
    return run


def _copy_seconds(source: Path, size: int | None, scratch: Path) -> float:
    """Seconds to read the checkpoint and to write so many bytes, or as many as it has, to the disk."""
    left = sum(file.stat().st_size for file in source.glob("*.safetensors")) if size is None else size
    start = time.perf_counter()
    with scratch.open("wb") as sink:
        for file in sorted(source.glob("*.safetensors")):
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    left -= sink.write(chunk[:left]) if left else 0
        sink.flush()
        os.fsync(sink.fileno())
    seconds = time.perf_counter() - start
    scratch.unlink()
    return seconds


def kl(options: argparse.Namespace, peer: Path) -> list[dict[str, Any]]:
    """KL divergence of both systems' files from the model they were made of, with the same importance matrix.

    One model is one draw: how its weights happen to lie on the grid decides more than a good encoder gains. So the
    embedded model is drawn ``--draws`` times, with noise and another sample of text each time; ratios are averaged.
    """
    draws = [_draw(options, number) for number in range(options.draws)]
    rows = []
    print(f"\nKL divergence from {len(draws)} draws of the embedded model, {options.kl_tokens} held-out tokens")
    print(f"{'scheme':8} {'lowbit':>10} {'llama.cpp':>10} {'ratio':>7} {'+-':>7} {'bytes':>7}")
    for scheme in options.schemes or KL_SCHEMES:
        found = [_divergences(scheme, *draw, options, peer) for draw in draws]
        ratios = [own / theirs for own, theirs, _ in found]
        error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("nan")
        own, theirs, sizes = (statistics.fmean(column) for column in zip(*found, strict=True))
        row = {"scheme": scheme, "lowbit": own, "llama.cpp": theirs, "ratio": statistics.fmean(ratios), "se": error}
        print(f"{scheme:8} {own:10.5f} {theirs:10.5f} {row['ratio']:7.3f} {error:7.3f} {sizes:7.4f}", flush=True)
        rows.append({**row, "ratios": ratios})
    return rows


def _draw(options: argparse.Namespace, number: int) -> tuple[Path, Path, Path]:
    """A copy of the embedded model with noise, its floats as GGUF, its importance matrix; made unless there."""
    model = options.work / f"draw-{number}"
    dense, imatrix = model.with_suffix(".f32.gguf"), model.with_suffix(".imatrix.gguf")
    log = options.work / "draw.log"
    if not imatrix.is_file():
        shutil.rmtree(model, ignore_errors=True)
        _measured([sys.executable, PEERS / "workload.py", "shaken", model, "--seed", number], log, options.threads)
        _measured(_lowbit("convert", model, dense, "--dtype", "f32"), log, options.threads)
        text = ["--calibration", "demo", "--samples", 64, "--seq-len", 512, "--seed", number]
        _measured(_lowbit("imatrix", model, imatrix, *text), log, options.threads)
    return model, dense, imatrix


def _divergences(
    scheme: str, model: Path, dense: Path, imatrix: Path, options: argparse.Namespace, peer: Path
) -> tuple[float, float, float]:
    """lowbit's divergence and llama.cpp's, and the ratio of the files' sizes."""
    own, theirs = options.work / f"kl-lowbit-{scheme}.gguf", options.work / f"kl-llamacpp-{scheme}.gguf"
    command = _lowbit("quantize", model, own, "--scheme", scheme, "--imatrix", imatrix, "--certify-tokens", 0)
    _measured(command, options.work / "lowbit.log", options.threads)
    command = [peer, PEERS / "llamacpp_peer.py", dense, theirs, "--type", scheme, "--imatrix", imatrix]
    _measured(command, options.work / "quantize.log", options.threads)
    report, found = options.work / "eval.json", []
    for file in (own, theirs):
        command = [sys.executable, "-m", "lowbit", "eval", file, "--against", model, "--text", "demo"]
        command += ["--max-tokens", options.kl_tokens, "--device", "cpu", "--json", report, "--quiet"]
        _measured(command, options.work / "eval.log", options.threads)
        found.append(float(json.loads(report.read_text())["kl_divergence"]))
    return found[0], found[1], own.stat().st_size / theirs.stat().st_size


PARTS = {"types": types, "model": model, "kl": kl}

if __name__ == "__main__":
    raise SystemExit(main())
