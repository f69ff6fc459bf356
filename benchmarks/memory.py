"""Predicted against measured memory: files, llama.cpp and vLLM's CPU build serving, and `lowbit quantize` itself.

    python benchmarks/memory.py                                     # all parts, on the small shape
    python benchmarks/memory.py --parts files llama.cpp --shape 1.1b --layers 22
    python benchmarks/memory.py --parts vllm --contexts 1024 4096 --concurrency 1 4

Serving: a server of its own for each context and number of requests gets that many prompts of three quarters of the
context at once, and what it then has resident is compared with what `lowbit.estimate` said before. Of an engine of
several processes, shared pages are counted once (the kernel's proportional set size). llama.cpp reads its file instead
of mapping it: mapped pages come and go with the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "benchmarks" / "peers"
MIB = 2**20
BOUNDS = {"files": 0.0, "llama.cpp": 0.05, "vllm": 0.05, "quantize": 0.10}
"""Largest relative error that each part may have."""
SCHEMES = ("W4A16", "W4A16_ASYM", "W8A16", "int3-g32-asym", "int8-channel-sym")
MIXES = ("Q8_0", "Q4_K_M", "Q4_0")
MARK = "@resident@ "


@dataclass(frozen=True)
class Row:
    """One comparison, in bytes."""

    part: str
    name: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1 if self.measured else 0.0

    @property
    def holds(self) -> bool:
        return abs(self.error) <= BOUNDS[self.part]


def main() -> int:
    """Compare, print, write; 1 where a bound does not hold."""
    options = _options()
    if options.child:
        CHILDREN[options.child](json.loads(options.arguments))
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="lowbit-memory-") as folder:
        work = Path(folder)
        model = work / "model"
        tool = [sys.executable, str(PEERS / "workload.py"), "checkpoint", str(model)]
        tool += ["--shape", options.shape, "--layers", str(options.layers), "--dtype", options.dtype]
        subprocess.run(tool, check=True)
        _write_tokenizer(model)
        for part in options.parts:
            for row in PARTS[part](model, work, options):
                rows.append(row)
                print(_line(row), flush=True)
    print("\n".join(_table(rows)))
    if options.json:
        values = [{**asdict(row), "error": row.error, "holds": row.holds} for row in rows]
        options.json.write_text(json.dumps(values, indent=1) + "\n")
    return 0 if all(row.holds for row in rows) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", default="0.1b", help="of the random Llama (see peers/workload.py)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--arguments", default="{}", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- parts ---------------------------------------------------------------------------------------------------------


def files(model: Path, work: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Weight files of every scheme, before and after quantizing."""
    for scheme in (*SCHEMES, *MIXES):
        predicted = _estimate(model, schemes=[scheme], engine="llama.cpp" if scheme in MIXES else "vllm")
        out = work / (f"{scheme}.gguf" if scheme in MIXES else scheme)
        _quantize(model, out, scheme)
        written = [out] if out.is_file() else list(out.glob("*.safetensors"))
        yield Row("files", scheme, predicted["file_bytes"], sum(file.stat().st_size for file in written))


def llama_cpp(model: Path, work: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Resident memory of llama.cpp over mixes, contexts and requests."""
    for mix in MIXES:
        path = work / f"{mix}.gguf"
        if not path.exists():
            _quantize(model, path, mix)
        for context in options.contexts:
            for requests in options.concurrency:
                load = {"context": context, "concurrency": requests}
                predicted = _estimate(model, schemes=[mix], engine="llama.cpp", **load)
                asked = {"path": str(path), "threads": options.threads, **load}
                measured = _resident(Path(sys.executable), "llama.cpp", asked)
                yield Row("llama.cpp", f"{mix}, {requests} x {context}", predicted["total"], measured)


def vllm(model: Path, work: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Resident memory of vLLM's CPU build on a dense model, its pool as large as predicted."""
    python = ROOT / ".venvs" / "vllm" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, str(ROOT / "tests" / "engines" / "environments.py"), "vllm"], check=True)
    for context in options.contexts:
        for requests in options.concurrency:
            load = {"context": context, "concurrency": requests}
            predicted = _estimate(model, schemes=["bf16"], engine="vllm", **load)
            asked = {"path": str(model), "threads": options.threads, "pool": predicted["parts"]["kv cache"], **load}
            measured = _resident(python, "vllm", asked)
            yield Row("vllm", f"bf16, {requests} x {context}", predicted["total"], measured)


def quantize(model: Path, work: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Peak resident memory of `lowbit quantize` by method."""
    for method, samples, length in (("rtn", 0, 0), ("gptq", 8, 512), ("awq", 8, 512)):
        asked = {"path": str(model), "method": method, "samples": samples, "seq_len": length}
        predicted = _child(Path(sys.executable), "predict", asked)
        started = time.time()
        measured = _child(Path(sys.executable), "quantize", {**asked, "out": str(work / f"by-{method}")})
        name = f"{method}, {samples} x {length} ({time.time() - started:.0f} s)"
        yield Row("quantize", name, predicted, measured)


PARTS: dict[str, Callable[[Path, Path, argparse.Namespace], Iterator[Row]]] = {
    "files": files,
    "llama.cpp": llama_cpp,
    "vllm": vllm,
    "quantize": quantize,
}


# ---- in processes of their own -------------------------------------------------------------------------------------


def _child_llama_cpp(asked: dict[str, Any]) -> None:
    import concurrent.futures

    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = asked["path"]
    parameters.n_ctx = asked["context"] * asked["concurrency"]
    parameters.n_parallel = asked["concurrency"]
    parameters.cpuparams.n_threads = asked["threads"]
    parameters.n_gpu_layers = 0
    parameters.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    server = xllamacpp.Server(parameters)
    length = max(8, 3 * asked["context"] // 4)
    body = {"n_predict": 4, "temperature": 0, "cache_prompt": False}

    def ask(number: int) -> None:
        server.handle_completions({**body, "prompt": [10 + number + place % 50 for place in range(length)]})

    with concurrent.futures.ThreadPoolExecutor(asked["concurrency"]) as pool:
        list(pool.map(ask, range(asked["concurrency"])))
    _tell(_resident_bytes())


def _child_vllm(asked: dict[str, Any]) -> None:
    os.environ.update({"OMP_NUM_THREADS": str(asked["threads"]), "VLLM_LOGGING_LEVEL": "ERROR"})
    # This folder has a kernels.py, which would stand in for a package of that name.
    sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    from vllm import LLM, SamplingParams

    engine = LLM(
        asked["path"],
        dtype="bfloat16",
        max_model_len=asked["context"],
        max_num_seqs=asked["concurrency"],
        max_num_batched_tokens=2048,
        kv_cache_memory_bytes=asked["pool"],
        enforce_eager=True,
    )
    length = max(8, 3 * asked["context"] // 4)
    prompts = [
        {"prompt_token_ids": [10 + number + place % 50 for place in range(length)]}
        for number in range(asked["concurrency"])
    ]
    engine.generate(prompts, SamplingParams(max_tokens=4, temperature=0), use_tqdm=False)
    _tell(_resident_bytes())


def _child_quantize(asked: dict[str, Any]) -> None:
    import lowbit

    result = lowbit.quantize(asked["path"], asked["out"], scheme="W4A16", certify_tokens=0, **_settings(asked))
    _tell(result.peak_memory_bytes)


def _child_predict(asked: dict[str, Any]) -> None:
    from lowbit.planning import probe
    from lowbit.sizing.headers import open_header_model
    from lowbit.sizing.making import predict_making
    from lowbit.sizing.variants import make_variant

    model = open_header_model(asked["path"])
    count, length = asked["samples"], asked["seq_len"]
    found = predict_making(
        model, make_variant(model, "W4A16"), probe(), method=asked["method"], samples=count, seq_len=length
    )
    _tell(found.peak_bytes)


def _settings(asked: dict[str, Any]) -> dict[str, Any]:
    if not asked["samples"]:
        return {"method": asked["method"]}
    text = Path(asked["out"]).with_suffix(".txt")
    text.write_text("\n".join(f"line {number} of a text about nothing, {number * 7 % 13}" for number in range(20_000)))
    keys = ("method", "samples", "seq_len")
    return {"calibration": str(text), **{key: asked[key] for key in keys}}


CHILDREN: dict[str, Callable[[dict[str, Any]], None]] = {
    "llama.cpp": _child_llama_cpp,
    "vllm": _child_vllm,
    "quantize": _child_quantize,
    "predict": _child_predict,
}


def _tell(size: int) -> None:
    import psutil

    print(f"{MARK}{size}", flush=True)
    # The engines' threads and processes outlive them, and would keep our reader waiting.
    for child in psutil.Process().children(recursive=True):
        child.kill()
    os._exit(0)


def _resident_bytes() -> int:
    """Resident memory of this process; with children, what all of them have, shared pages once."""
    import psutil

    own = psutil.Process()
    children = own.children(recursive=True)
    if not children:
        return int(own.memory_info().rss)
    return sum(process.memory_full_info().pss for process in (own, *children))


def _resident(python: Path, engine: str, asked: dict[str, Any]) -> int:
    return _child(python, engine, asked)


def _child(python: Path, name: str, asked: dict[str, Any]) -> int:
    command = [str(python), __file__, "--child", name, "--arguments", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return int(line.removeprefix(MARK))
    raise RuntimeError(f"{name} {asked}: {done.stderr[-2000:]}")


def _write_tokenizer(model: Path) -> None:
    """A byte-level tokenizer in place of the workload's, which has no counterpart in llama.cpp."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 20], trainer)
    for file in model.glob("tokenizer*"):
        file.unlink()
    tokenizer.save(str(model / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))


def _estimate(model: Path, **arguments: Any) -> dict[str, Any]:
    import lowbit

    found = lowbit.estimate(model, gpus=0, **arguments).precisions[0]
    return {"file_bytes": found.file_bytes, "total": found.total, "parts": dict(found.parts)}


def _quantize(model: Path, out: Path, scheme: str) -> None:
    import lowbit

    method = {} if scheme in MIXES else {"method": "rtn"}
    lowbit.quantize(model, out, scheme=scheme, certify_tokens=0, **method)


# ---- output --------------------------------------------------------------------------------------------------------


def _line(row: Row) -> str:
    verdict = "ok" if row.holds else "OUT OF BOUNDS"
    sizes = f"{row.predicted / MIB:10.2f} {row.measured / MIB:10.2f} MiB"
    return f"{row.part:10} {row.name:32} {sizes} {row.error:+7.2%} {verdict}"


def _table(rows: list[Row]) -> list[str]:
    lines = ["", "| part | what | predicted MiB | measured MiB | error |", "|---|---|---|---|---|"]
    for row in rows:
        sizes = f"{row.predicted / MIB:.2f} | {row.measured / MIB:.2f}"
        lines.append(f"| {row.part} | {row.name} | {sizes} | {row.error:+.2%} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
