"""Predicted against measured memory: files, llama.cpp and vLLM's CPU build serving, and `lowbit quantize` itself.

    python benchmarks/memory.py                                     # all parts, on the embedded model
    python benchmarks/memory.py --parts files
    python benchmarks/memory.py --parts llama.cpp vllm --shape 1.1b --contexts 512 2048 8192 --concurrency 1 4 16
    python benchmarks/memory.py --parts quantize --shape 1.1b --layers 1 3

`files`: every scheme of tiny random models of --families and of the embedded model (this in every format that holds
it), and every mix of GGUF, to the byte. Serving: the engine's own
process as `lowbit serve` starts it, one for each context and number of requests; every slot gets a prompt, then its
resident memory is compared with what `lowbit.estimate` said before. Of llama.cpp that is what /proc calls RSS, the
mapped file included (predicted: the total and what the system may take back); of vLLM's four processes the
proportional share of each (PSS), so that what they have in common counts once. `quantize`: a process's highest RSS.

--prompt bounds the tokens of the first prompt and, to a sixteenth of that, of the others, for large models on few
processors. Weights of shapes are random.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

import lowbit
from lowbit.codecs import CODECS
from lowbit.codecs.gguf.mixes import MIXES
from lowbit.engines.flags import EngineFlags, build_command
from lowbit.engines.presets import ENGINES
from lowbit.errors import LowbitError
from lowbit.planning import probe
from lowbit.sizing.gguf_sizes import USUAL_TEXT
from lowbit.sizing.headers import open_header_model
from lowbit.sizing.making import predict_making
from lowbit.sizing.variants import make_variant

ROOT = Path(__file__).resolve().parents[1]
VLLM_PYTHON = ROOT / ".venvs" / "vllm" / "bin" / "python"
MIB = 2**20
BOUNDS = {"files": 0.0, "llama.cpp": 0.05, "vllm": 0.05, "quantize": 0.10}
"""Largest relative error that each part may have."""
SCHEMES = (
    *("int2-g64-sym", "int3-g128-sym", "int4-g128-sym", "int4-g32-asym", "int4-channel-sym", "int5-g64-asym"),
    *("int6-tensor-sym", "int8-g128-sym", "int8-channel-asym", "fp8-channel", "fp8-block", "nvfp4", "mxfp4", "nf4-b64"),
    *("int4-g64-affine", "W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8", "FP8_DYNAMIC", "NVFP4A16", "MXFP4A16"),
)
"""Number formats and presets that are tried in every file format; those that it refuses are counted."""
START_SECONDS = 300.0


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
    rows = []
    with tempfile.TemporaryDirectory(prefix="lowbit-memory-") as folder:
        for part in options.parts:
            for row in PARTS[part](Path(folder), options):
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
    parser.add_argument("--families", nargs="+", choices=(*FAMILIES, EMBEDDED), default=[*FAMILIES, EMBEDDED])
    parser.add_argument("--formats", nargs="+", choices=(*CODECS, "gguf"), default=[*CODECS, "gguf"], help="of files")
    parser.add_argument("--shape", help="of a random Llama (peers/workload.py) instead of the embedded model")
    parser.add_argument("--layers", type=int, nargs="+", help="blocks of the shape; the first of them serves")
    parser.add_argument("--dtype", default="bfloat16", help="of the shape's weights")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--mixes", nargs="+", default=["Q4_K_M", "Q8_0"], help="GGUF files that are served")
    parser.add_argument("--kv-dtypes", nargs="+", default=["f16"], help="caches of llama.cpp")
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "awq"])
    parser.add_argument("--calibration", type=int, nargs=2, default=[32, 512], metavar=("SAMPLES", "LENGTH"))
    parser.add_argument("--memory", help="allowed to `lowbit quantize`, e.g. 6GiB")
    parser.add_argument("--prompt", type=int, default=1 << 20, help="most tokens of the first prompt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


# ---- files ---------------------------------------------------------------------------------------------------------


_GROUPED = {"num_key_value_heads": 2, "head_dim": 64}
_EXPERTS = {"moe_intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED, "tie_word_embeddings": True},
    "mistral": _GROUPED,
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": _GROUPED,
    "gemma": _GROUPED,
    "gemma2": {**_GROUPED, "sliding_window": 64, "query_pre_attn_scalar": 64},
    "gemma3_text": {**_GROUPED, "sliding_window": 64, "query_pre_attn_scalar": 64},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"num_key_value_heads": 2},
    "gpt_neox": {"rotary_pct": 0.25},
    "opt": {"ffn_dim": 512, "word_embed_proj_dim": 256},
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_key_value_heads": 2, **_EXPERTS, "shared_expert_intermediate_size": 256},
    "qwen3_moe": {**_GROUPED, **_EXPERTS, "norm_topk_prob": True},
}
"""Families to the config of a tiny random model: one block, wide enough for every type of GGUF."""
_TINY: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 300,
    "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
EMBEDDED = "demo"
USUAL = {
    "int4-g64-affine": "hqq",
    "int4-g32-asym": "awq",
    "int8-channel-asym": "gptq_v2",
    "int2-g64-sym": "gptq",
    "nf4-b64": "bitsandbytes",
}
"""Formats of schemes that families are tried in, beside compressed-tensors; the embedded model is tried in all."""


def files(work: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Weight files of every scheme before and after quantizing, added up by family; a refusal must be foreseen."""
    for family in options.families:
        model = EMBEDDED if family == EMBEDDED else _family(work / family, family)
        tried = [(scheme, format) for scheme in SCHEMES for format in _formats(scheme, family)]
        tried += [(mix, "gguf") for mix in MIXES]
        tried = [(scheme, format) for scheme, format in tried if format in options.formats]
        sums = Row("files", "", 0, 0)
        wrong, refused = [], []
        for scheme, format in tried:
            predicted, problem = _predicted_file(model, scheme, format)
            written, error = _written_file(model, work / f"{family}-{scheme}", scheme, format)
            if written is None:
                refused.append(f"{scheme} as {format}: {error}")
                if not problem:
                    wrong.append(f"{scheme} as {format}: refused ({error}), but {predicted:,} bytes were predicted")
                continue
            sums = Row("files", "", sums.predicted + predicted, sums.measured + written)
            if problem or predicted != written:
                wrong.append(f"{scheme} as {format}: {predicted:,} predicted ({problem}), {written:,} written")
        print("\n".join(wrong), end="\n" if wrong else "")
        name = f"{family}: {len(tried) - len(refused)} files exact, {len(refused)} refused as foreseen"
        if wrong:
            name = f"{family}: {len(wrong)} of {len(tried)} WRONG"
        yield Row("files", name, sums.predicted, sums.measured + len(wrong))


def _formats(scheme: str, family: str) -> tuple[str, ...]:
    if family == EMBEDDED:
        return tuple(CODECS)
    return ("compressed-tensors", *([USUAL[scheme]] if scheme in USUAL else []))


def _written_file(model: str | Path, out: Path, scheme: str, format: str) -> tuple[int | None, str]:
    """Bytes of the weight files, deleted again; None and why, where it is refused."""
    text: dict[str, Any] = {"samples": 2, "seq_len": 64}
    if model != EMBEDDED:
        text["calibration"] = _text(out.parent)
    try:
        if format == "gguf":
            out = out.with_name(f"{out.name}.gguf")
            try:
                lowbit.quantize(model, out, scheme=scheme, certify_tokens=0)
            except LowbitError as error:
                if "without an importance matrix" not in str(error):
                    raise
                lowbit.quantize(model, out, scheme=scheme, certify_tokens=0, imatrix="auto", **text)
            written = [out]
        else:
            lowbit.quantize(model, out, scheme=scheme, format=format, method="rtn", certify_tokens=0, **text)
            written = list(out.glob("*.safetensors"))
    except LowbitError as error:
        return None, str(error)
    size = sum(file.stat().st_size for file in written)
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink()
    return size, ""


def _text(folder: Path) -> str:
    # Its name goes into the file: that of the usual text, which takes a network.
    path = folder / USUAL_TEXT
    path.write_text("the quick brown fox jumps over the lazy dog " * 400)
    return str(path)


def _family(path: Path, family: str) -> Path:
    """A random model of a family with a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {name: value for name, value in _TINY.items() if family != "opt" or name != "intermediate_size"}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(fields | FAMILIES[family]))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    _write_tokenizer(path)
    return path


def _predicted_file(model: str | Path, scheme: str, format: str) -> tuple[int, str]:
    """Bytes, and why it cannot be."""
    engine = "llama.cpp" if format == "gguf" else "vllm"
    kind = {} if format == "gguf" else {"format": format}
    try:
        found = lowbit.estimate(model, schemes=[scheme], engine=engine, gpus=0, **kind).precisions[0]
    except LowbitError as error:
        return 0, str(error)
    return found.file_bytes, "" if found.file_bytes else found.problem


# ---- serving -------------------------------------------------------------------------------------------------------


def llama_cpp(work: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Resident memory of llama.cpp over mixes, contexts, requests and cache formats."""
    model = _models(work, options)[0]
    for mix in options.mixes:
        path = work / f"serve-{mix}.gguf"
        lowbit.quantize(model, path, scheme=mix, certify_tokens=0)
        for context, requests, kv in _loads(options, options.kv_dtypes):
            load = {"context": context, "concurrency": requests, "kv_dtype": kv}
            found = lowbit.estimate(model, schemes=[mix], engine="llama.cpp", gpus=0, **load).precisions[0]
            flags = EngineFlags(**load, threads=options.threads, gpu_layers=0)
            measured = _serve("llama.cpp", path, flags, sys.executable, options.prompt)
            name = f"{mix}, {requests} x {context}, {kv}"
            yield Row("llama.cpp", name, found.total + found.reclaimable, measured)


def vllm(work: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Resident memory of vLLM's CPU build, the pool of pages as large as predicted."""
    if not VLLM_PYTHON.exists():
        subprocess.run([sys.executable, str(ROOT / "tests" / "engines" / "environments.py"), "vllm"], check=True)
    model = _models(work, options)[0]
    for context, requests, _ in _loads(options, ["auto"]):
        load = {"context": context, "concurrency": requests}
        found = lowbit.estimate(model, schemes=["bf16"], engine="vllm", gpus=0, **load).precisions[0]
        pool = ("--kv-cache-memory-bytes", str(found.parts["kv cache"]))
        # Compiling takes minutes on few processors, and its workers' memory is gone when it has ended.
        extra = ("--dtype", "bfloat16", "--max-num-batched-tokens", "2048", "--enforce-eager", *pool)
        flags = EngineFlags(**load, threads=options.threads, extra=extra)
        source = Path(str(open_header_model(model).checkpoint.path))
        measured = _serve("vllm", source, flags, str(VLLM_PYTHON), options.prompt)
        yield Row("vllm", f"bf16, {requests} x {context}", found.total, measured)


def _loads(options: argparse.Namespace, kinds: list[str]) -> Iterator[tuple[int, int, str]]:
    for kind in kinds:
        for context in options.contexts:
            for requests in options.concurrency:
                yield context, requests, kind


def _serve(engine: str, model: Path, flags: EngineFlags, python: str, longest: int) -> int:
    """Start the engine, send a prompt to every slot, return what it then has resident, and end it."""
    length = max(8, min(longest, 3 * int(flags.context or 0) // 4))
    others = max(8, min(length, longest // 16))
    lengths = [length, *[others] * ((flags.concurrency or 1) - 1)]
    with served(engine, model, flags, python) as (pid, port):
        with concurrent.futures.ThreadPoolExecutor(flags.concurrency) as pool:
            list(pool.map(lambda slot: _ask(port, slot, lengths[slot]), range(len(lengths))))
        return _resident_bytes(pid)


@contextlib.contextmanager
def served(engine: str, model: Path, flags: EngineFlags, python: str) -> Iterator[tuple[int, int]]:
    """An engine as `lowbit serve` starts it, until the context ends: its process id and port."""
    command, environment = build_command(ENGINES[engine], str(model), "model", flags, python)
    port = _free_port()
    places = {"{host}": "127.0.0.1", "{port}": str(port)}
    quiet = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    # A folder of its own: some engines see packages where they are started, and here lie a kernels.py and others.
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [places.get(part, part) for part in command],
            env={**os.environ, **environment, **quiet, "OMP_NUM_THREADS": str(flags.threads or 1)},
            cwd=folder, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            _wait_for(process, port, log.name)
            yield process.pid, port
        finally:
            _end(process)


def _wait_for(process: subprocess.Popen[bytes], port: int, log: str) -> None:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        time.sleep(0.2)
    raise RuntimeError(f"the engine did not start: {Path(log).read_text(errors='replace')[-2000:]}")


def _ask(port: int, slot: int, length: int) -> None:
    prompt = [10 + slot + place % 50 for place in range(length)]
    body = {"model": "model", "prompt": prompt, "max_tokens": 4, "temperature": 0, "cache_prompt": False}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=1200) as answer:
        answer.read()


def _resident_bytes(pid: int) -> int:
    """RSS of a process; of one with children, the proportional share of each, added up."""
    own = psutil.Process(pid)
    children = own.children(recursive=True)
    if not children:
        return int(own.memory_info().rss)
    return sum(int(process.memory_full_info().pss) for process in (own, *children))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the engine with all it started: it has a process group of its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
    process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# ---- quantizing ----------------------------------------------------------------------------------------------------

_QUANTIZE = """
import json, os, sys
import lowbit
found = lowbit.quantize(sys.argv[1], sys.argv[2], certify_tokens=0, scheme="W4A16", **json.loads(sys.argv[3]))
print(found.peak_memory_bytes, flush=True)
os._exit(0)
"""


def quantize(work: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Highest resident memory of `lowbit quantize` by method, in processes of their own."""
    samples, length = options.calibration
    text = work / "calibration.txt"
    text.write_text("\n".join(" ".join(f"w{3 + (i * 7919 + j) % 30000}" for j in range(64)) for i in range(2000)))
    for model in _models(work, options, words=True):
        for method in options.methods:
            asked: dict[str, Any] = {"method": method}
            if options.memory:
                asked["memory"] = options.memory
            if method != "rtn":
                asked |= {"samples": samples, "seq_len": length}
                if options.shape:
                    asked["calibration"] = str(text)
            opened = open_header_model(model)
            count = 0 if method == "rtn" else samples
            predicted = predict_making(
                opened, make_variant(opened, "W4A16"), probe(), method=method, samples=count, seq_len=length
            )
            out = work / f"{Path(str(model)).name}-{method}"
            started = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-c", _QUANTIZE, str(model), str(out), json.dumps(asked)],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            name = f"{Path(str(model)).name}, {method}, {count} x {length}, {time.monotonic() - started:.0f} s"
            yield Row("quantize", name, predicted.peak_bytes, int(done.stdout.split()[-1]))


PARTS: dict[str, Callable[[Path, argparse.Namespace], Iterator[Row]]] = {
    "files": files,
    "llama.cpp": llama_cpp,
    "vllm": vllm,
    "quantize": quantize,
}


# ---- models and output ---------------------------------------------------------------------------------------------


def _models(work: Path, options: argparse.Namespace, *, words: bool = False) -> list[str | Path]:
    """The embedded model, or random ones of the shape; ``words`` keeps the tokenizer that calibration needs."""
    if not options.shape:
        return ["demo"]
    found: list[str | Path] = []
    for layers in options.layers or [0]:
        path = work / f"{options.shape}-{layers or 'all'}{'-words' if words else ''}"
        if not path.exists():
            tool = [sys.executable, str(ROOT / "benchmarks" / "peers" / "workload.py"), "checkpoint", str(path)]
            tool += ["--shape", options.shape, "--dtype", options.dtype]
            subprocess.run([*tool, *(["--layers", str(layers)] if layers else [])], check=True)
            config = json.loads((path / "config.json").read_text())
            (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
            if not words:
                _write_tokenizer(path)
        found.append(path)
    return found


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


def _line(row: Row) -> str:
    verdict = "ok" if row.holds else "OUT OF BOUNDS"
    sizes = f"{row.predicted / MIB:10.2f} {row.measured / MIB:10.2f} MiB"
    return f"{row.part:10} {row.name:36} {sizes} {row.error:+7.2%} {verdict}"


def _table(rows: list[Row]) -> list[str]:
    lines = ["", "| part | what | predicted MiB | measured MiB | error |", "|---|---|---|---|---|"]
    for row in rows:
        sizes = f"{row.predicted / MIB:.2f} | {row.measured / MIB:.2f}"
        lines.append(f"| {row.part} | {row.name} | {sizes} | {row.error:+.2%} |")
    for part in dict.fromkeys(row.part for row in rows):
        own = [abs(row.error) for row in rows if row.part == part]
        lines.append(f"{part}: {len(own)} comparisons, largest error {max(own):.2%}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
