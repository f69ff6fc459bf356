"""Load checkpoints in vLLM's CPU build, run them, and hold the answers to the expectations beside them.

    python tests/engines/vllm_check.py FOLDER [--only NAME ...] [--pretend-avx2]

Run by the interpreter of the `vllm` environment. Each checkpoint has a process of its own, so that one failure leaves
the others alone. What this engine has no kernel for on this CPU is named with the engine's own words: its 4-bit
kernel is compiled for AVX-512 only (there the load alone is held), and there is none for other widths.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from expectations import Answer, Expected, cases, compare, read

BOUNDS = {"largest": 0.25, "mean": 0.05}
"""In nats: the engine's 4-bit kernel multiplies in float16 or bfloat16, its oracle in float32."""

EXACT = {"largest": 2e-3, "mean": 2e-4}
"""In nats, for a dense model in float32."""

INT8 = {"largest": 0.25, "mean": 0.02}
"""In nats, for inputs rounded to int8 in a float32 model: a value at the edge of a step may go the other way."""

TIMEOUT = 600.0
KERNEL = "cpu_gemm_wna16"
NO_KERNEL = ("Failed to find a kernel that can implement", "does not support weight_bits")
"""The engine's words where none of its kernels for this device has the number of bits."""

GPU_ONLY = ("FP8", "NVFP4", "MXFP")
"""Beginnings of the schemes that have kernels for GPUs only."""

MARK = "@lowbit@ "


@dataclass(frozen=True)
class Verdict:
    """`stage`: "ran", "loaded" (the engine cannot go on, for `reason`), "refused" (no kernel) or "failed"."""

    stage: str
    reason: str = ""


def main() -> int:
    """Check each checkpoint; 1 where one fails or there is none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=lambda text: Path(text).resolve())
    parser.add_argument("--only", nargs="*", help="names of checkpoints; default all")
    parser.add_argument("--dtype", default="float16", help="of 4-bit models; the engine has no float32 there")
    parser.add_argument("--pretend-avx2", action="store_true", help="use the engine's AVX2 build on an AVX-512 CPU")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _run(options.child, options.dtype, pretend_avx2=options.pretend_avx2)
        # The engine's threads outlive it and some abort at interpreter exit.
        os._exit(0)
    counts = {"ran": 0, "loaded": 0, "refused": 0, "failed": 0}
    for path, expected in cases(options.folder):
        if options.only and path.name not in options.only:
            continue
        if expected.scheme.startswith(GPU_ONLY):
            continue
        dtype = "float32" if expected.format == "dense" or "A8" in expected.scheme else options.dtype
        verdict = _check(path, expected, dtype, pretend_avx2=options.pretend_avx2)
        counts[verdict.stage] += 1
        print(f"{path.name:40} {dtype:9} {verdict.stage:8} {verdict.reason}", flush=True)
    print(", ".join(f"{count} {stage}" for stage, count in counts.items()))
    return 1 if counts["failed"] or not sum(counts.values()) else 0


def _check(path: Path, expected: Expected, dtype: str, *, pretend_avx2: bool) -> Verdict:
    """Run the engine in a process of its own and judge how far it came."""
    command = [sys.executable, __file__, str(path.parent), "--child", str(path), "--dtype", dtype]
    if pretend_avx2:
        command.append("--pretend-avx2")
    # Without a second process of the engine's own, its errors reach the end of stderr as they are.
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    environment["HF_HUB_OFFLINE"] = "1"
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return Verdict("failed", f"no answer in {TIMEOUT:.0f} s")
    said = dict(line.removeprefix(MARK).split(" ", 1) for line in done.stdout.splitlines() if line.startswith(MARK))
    bits = int(expected.scheme[1]) if expected.scheme.startswith("W") else 16
    if "answers" in said:
        answers = [Answer(**{k: tuple(v) for k, v in item.items()}) for item in json.loads(said["answers"])]
        exact = INT8 if "A8" in expected.scheme else EXACT
        result = compare(expected, answers, **(exact if dtype == "float32" else BOUNDS))
        figures = f"largest {result.largest:.2g} mean {result.mean:.2g} nats"
        return Verdict("failed", f"{result.problem} ({figures})") if result.problem else Verdict("ran", figures)
    error = _last_error(done.stderr) or f"exit status {done.returncode}"
    if "kernel" in said:
        return Verdict("loaded" if bits == 4 and said["kernel"] == "absent" and KERNEL in error else "failed", error)
    return Verdict("refused" if bits not in (4, 16) and any(words in error for words in NO_KERNEL) else "failed", error)


def _last_error(log: str) -> str:
    """The last exception named in a traceback, on one line."""
    found = [line.strip() for line in log.splitlines() if re.match(r"(\[rank0\]: )?[A-Za-z_.]*Error: ", line)]
    return found[-1].removeprefix("[rank0]: ")[:300] if found else ""


def _run(path: Path, dtype: str, *, pretend_avx2: bool) -> None:
    """The child: load, say whether the 4-bit kernel is there, generate, say the answers."""
    import torch

    if pretend_avx2:
        torch.cpu._is_avx512_supported = lambda: False
    from vllm import LLM

    # The context is short and the cache small, for this is about answers and not speed.
    llm = LLM(
        model=str(path), dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=4,
        kv_cache_memory_bytes=64 << 20, disable_log_stats=True,
    )  # fmt: skip
    print(f"\n{MARK}kernel {'present' if hasattr(torch.ops._C, KERNEL) else 'absent'}", flush=True)
    expected = read(path.with_name(f"{path.name}.expected.json"))
    answers = json.dumps([asdict(answer) for answer in _answers(llm, expected)])
    print(f"\n{MARK}answers {answers}", flush=True)


def _answers(llm: object, expected: Expected) -> list[Answer]:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, max_tokens=len(expected.prompts[0].greedy_ids), logprobs=0, prompt_logprobs=0,
        detokenize=False, ignore_eos=True,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": list(prompt.prompt_ids)} for prompt in expected.prompts]
    return [_answer(output) for output in llm.generate(prompts, sampling, use_tqdm=False)]  # type: ignore[attr-defined]


def _answer(output: object) -> Answer:
    completion = output.outputs[0]  # type: ignore[attr-defined]
    greedy = tuple(completion.token_ids)
    ids = output.prompt_token_ids[1:]  # type: ignore[attr-defined]
    prompt = tuple(entry[token].logprob for token, entry in zip(ids, output.prompt_logprobs[1:], strict=True))  # type: ignore[attr-defined]
    chosen = tuple(entry[token].logprob for token, entry in zip(greedy, completion.logprobs, strict=True))
    return Answer(greedy, prompt, chosen)


if __name__ == "__main__":
    raise SystemExit(main())
