"""Load checkpoints in transformers, run them, and hold the answers to the expectations beside them.

    python tests/engines/transformers_check.py FOLDER --formats gptq awq

GPTQ and AWQ checkpoints need the `gptqmodel` environment, bitsandbytes and HQQ ones theirs, compressed-tensors ones the
project's own. bitsandbytes computes 4-bit weights in the bfloat16 of the config unless told otherwise, and rounds the
inputs of LLM.int8() after a cast to float16. Both of
GPTQModel's ways to compute on a CPU are checked: `torch` rounds dequantized weights to the scales'
float16 and multiplies in float32, and must agree closely; the kernel that it picks by itself multiplies in bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from expectations import Answer, Expected, Prompt, cases, compare
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

LIBRARIES = ("transformers", "gptqmodel", "compressed-tensors", "bitsandbytes", "hqq", "torch")
EXACT = {"largest": 2e-3, "mean": 2e-4}
HALF = {"largest": 0.05, "mean": 0.01}
ROUNDED = {"largest": 0.25, "mean": 0.05}
"""Bounds in nats on the differences of log-probabilities: weights and products in float32; weights dequantized to
float16; products in bfloat16."""


def main() -> int:
    """Check every checkpoint of the formats asked for; 1 where one fails or there is none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=lambda text: Path(text).resolve())
    parser.add_argument("--formats", nargs="+", required=True)
    options = parser.parse_args()
    print(" ".join(f"{name} {_version(name)}" for name in LIBRARIES))
    failed = checked = 0
    for path, expected in cases(options.folder):
        if expected.format not in options.formats:
            continue
        for kernel, loading, bounds in _ways(path, expected):
            result = compare(expected, _answers(path, expected, loading), **bounds)
            checked += 1
            failed += result.problem is not None
            verdict = f"FAILED: {result.problem}" if result.problem else "ran, same tokens"
            print(
                f"{path.name:40} {kernel:12} largest {result.largest:.2g} mean {result.mean:.2g} nats  {verdict}",
                flush=True,
            )
    print(f"{checked} checked, {failed} failed")
    return 1 if failed or not checked else 0


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _ways(path: Path, expected: Expected) -> Iterator[tuple[str, dict[str, Any], dict[str, float]]]:
    bits = int(expected.scheme[1]) if expected.scheme.startswith("W") else 16
    if expected.format == "gptq":
        yield "torch", {"quantization_config": GPTQConfig(bits=bits, backend="torch")}, HALF
        yield "automatic", {}, ROUNDED
    elif expected.format == "awq":
        yield "torch", {"quantization_config": AwqConfig(bits=bits, backend="torch_awq")}, HALF
        yield "automatic", {}, ROUNDED
    elif expected.format == "bitsandbytes" and expected.scheme == "LLM_INT8":
        yield "int8", {}, HALF
    elif expected.format == "bitsandbytes":
        yield "float32", {"compute_dtype": torch.float32}, EXACT
        yield "as written", {}, ROUNDED
    else:
        yield "torch", {}, EXACT


@torch.no_grad()
def _answers(path: Path, expected: Expected, loading: dict[str, Any]) -> list[Answer]:
    compute_dtype = loading.get("compute_dtype")
    given = {name: value for name, value in loading.items() if name != "compute_dtype"}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu", **given).eval()
    if compute_dtype is not None:
        for module in model.modules():
            if hasattr(module, "compute_dtype"):
                module.compute_dtype = compute_dtype
    return [_answer(model, prompt) for prompt in expected.prompts]


def _answer(model: Any, prompt: Prompt) -> Answer:
    tokens = torch.tensor([prompt.prompt_ids])
    for _ in prompt.greedy_ids:
        best = model(tokens).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, best], dim=1)
    logprobs = torch.log_softmax(model(tokens).logits[0].double(), dim=-1)
    chosen = logprobs[:-1].gather(1, tokens[0, 1:, None]).flatten().tolist()
    length = len(prompt.prompt_ids)
    return Answer(tuple(tokens[0, length:].tolist()), tuple(chosen[: length - 1]), tuple(chosen[length - 1 :]))


if __name__ == "__main__":
    raise SystemExit(main())
