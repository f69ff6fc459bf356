"""Load checkpoints in transformers, run them, and hold the answers to the expectations beside them.

    python tests/engines/transformers_check.py FOLDER --formats gptq awq

GPTQ and AWQ checkpoints need the `gptqmodel` environment, bitsandbytes and HQQ ones theirs, compressed-tensors ones
that of llm-compressor. Both of GPTQModel's ways to compute on a CPU are checked: `torch` rounds dequantized weights to
the scales' float16 and multiplies in float32, and must agree closely; the kernel that it picks by itself multiplies in
bfloat16. Where a package rounds by another rule than lowbit's simulation, or in bfloat16, each of its linears is held
to its own rule (`package_rules.py`). Its answers and lowbit's are then two draws of one rounding noise, and are held to
the size of that noise, which is how far lowbit's answers are from those with the inputs left in floats.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from expectations import Answer, Expected, Prompt, cases, compare
from package_rules import RULES, Layers
from transformers import AutoModelForCausalLM, AwqConfig, CompressedTensorsConfig, GPTQConfig

LIBRARIES = ("transformers", "gptqmodel", "compressed-tensors", "bitsandbytes", "hqq", "torch")
EXACT = {"largest": 2e-3, "mean": 2e-4}
HALF = {"largest": 0.05, "mean": 0.01}
ROUNDED = {"largest": 0.25, "mean": 0.05}
"""Bounds in nats on the differences of log-probabilities: weights and products in float32; weights dequantized to
float16; products in bfloat16."""

LARGEST_DRAWS, MEAN_DRAWS = 2.0, 1.5
"""Two draws of noise apart, in sizes of the noise: the largest by the triangle inequality, the mean (2 ** 0.5 for
independent draws of one size) with little room."""

FLOAT32_LAYER = 1e-5
BFLOAT16_LAYER = 2**-7
"""Bounds on the difference of a linear's output from its rule's, relative to the largest of its outputs."""


@dataclass(frozen=True)
class Way:
    """One way to run a checkpoint, and what is asked of it.

    `loading`  keyword arguments of `from_pretrained`
    `float32`  whether what the package leaves in bfloat16 is set to float32 after loading
    `bounds`   on the difference from lowbit's answers; None where only the size of the noise bounds it
    `layer`    bound on the difference of each linear from its rule; None where it is not asked for
    """

    name: str
    bounds: dict[str, float] | None
    loading: dict[str, Any] = field(default_factory=dict)
    float32: bool = False
    layer: float | None = None


def main() -> int:
    """Check every checkpoint of the formats asked for; 1 where one fails or there is none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=lambda text: Path(text).resolve())
    parser.add_argument("--formats", nargs="+", required=True)
    parser.add_argument("--only", nargs="*", help="names of checkpoints; default all of the formats")
    options = parser.parse_args()
    print(" ".join(f"{name} {_version(name)}" for name in LIBRARIES))
    failed = checked = 0
    for path, expected in cases(options.folder):
        if expected.format not in options.formats or (options.only and path.name not in options.only):
            continue
        for way in _ways(expected):
            model = _loaded(path, way)
            layers = None if way.layer is None else Layers(model, path, expected.scheme)
            bounds = _noise(path, expected) if way.bounds is None else way.bounds
            result = compare(expected, [_answer(model, prompt) for prompt in expected.prompts], **bounds)
            problem, said = result.problem, f"largest {result.largest:.2g} mean {result.mean:.2g} nats"
            if way.bounds is None:
                said += f" (of {bounds['largest']:.2g} and {bounds['mean']:.2g})"
            if layers is not None and way.layer is not None:
                said += f", layers {layers.largest:.1g}"
                if layers.unseen or not layers.seen or layers.largest > way.layer:
                    problem = f"a linear differs from its rule by {layers.largest:.2g}, {layers.unseen} have not run"
            checked += 1
            failed += problem is not None
            verdict = f"FAILED: {problem}" if problem else "ran, same tokens"
            print(f"{path.name:40} {way.name:12} {said}  {verdict}", flush=True)
    print(f"{checked} checked, {failed} failed")
    return 1 if failed or not checked else 0


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _ways(expected: Expected) -> Iterator[Way]:
    bits = int(expected.scheme[1]) if expected.scheme.startswith("W") else 16
    if expected.format == "gptq":
        yield Way("torch", HALF, {"quantization_config": GPTQConfig(bits=bits, backend="torch")})
        yield Way("automatic", ROUNDED)
    elif expected.format == "awq":
        yield Way("torch", HALF, {"quantization_config": AwqConfig(bits=bits, backend="torch_awq")})
        yield Way("automatic", ROUNDED)
    elif expected.format == "bitsandbytes" and expected.scheme == "LLM_INT8":
        yield Way("float32", None, float32=True, layer=FLOAT32_LAYER)
        yield Way("as loaded", ROUNDED, layer=BFLOAT16_LAYER)
    elif expected.format == "bitsandbytes":
        yield Way("float32", EXACT, float32=True, layer=FLOAT32_LAYER)
        yield Way("as loaded", ROUNDED, layer=BFLOAT16_LAYER)
    elif expected.scheme.startswith(("NVFP4", "MXFP4")):
        # it decodes these to bfloat16 whatever the model's dtype is
        loading = {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
        layer = FLOAT32_LAYER if expected.scheme in RULES else None
        bounds = {"NVFP4": None, "NVFP4A16": ROUNDED}.get(expected.scheme, EXACT)
        yield Way("decompressed", bounds, loading, float32=True, layer=layer)
    else:
        bounds = None if expected.scheme == "W8A8" else EXACT
        yield Way("torch", bounds, layer=FLOAT32_LAYER if expected.scheme in RULES else None)


def _loaded(path: Path, way: Way) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu", **way.loading).eval()
    if way.float32:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
        for module in model.modules():
            if hasattr(module, "compute_dtype"):
                module.compute_dtype = torch.float32
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if state is not None:
                state.dtype = torch.float32
    return model


@torch.no_grad()
def _noise(path: Path, expected: Expected) -> dict[str, float]:
    """Bounds on the difference between two roundings of the inputs, from how far lowbit's is from none."""
    model = AutoModelForCausalLM.from_pretrained(path.with_name(f"{path.name}.dense"), dtype=torch.float32).eval()
    gaps = []
    for prompt in expected.prompts:
        tokens = torch.tensor([[*prompt.prompt_ids, *prompt.greedy_ids]])
        logprobs = torch.log_softmax(model(tokens).logits[0].double(), dim=-1)
        chosen = logprobs[:-1].gather(1, tokens[0, 1:, None]).flatten()
        gaps.append((chosen - torch.tensor([*prompt.prompt_logprobs, *prompt.greedy_logprobs]).double()).abs())
    noise = torch.cat(gaps)
    return {"largest": LARGEST_DRAWS * float(noise.max()), "mean": MEAN_DRAWS * float(noise.mean())}


@torch.no_grad()
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
