"""What a package makes of a checkpoint where it computes otherwise than lowbit's simulation, in plain PyTorch.

Three packages round differently from what lowbit simulates, each for a reason that can be written down:

- compressed-tensors scales int8 inputs by token with the largest magnitude / 127.5, engines and lowbit with / 127. It
  leaves the group scales of NVFP4 inputs in floats unless the config names a dtype for them, where kernels and lowbit
  round them to E4M3; its NVFP4 weights are rounded to bfloat16.
- bitsandbytes rounds the inputs of LLM.int8() after a cast to float16, and scales products by 6.200124e-05, which is
  1 / 127² but for a digit.
- transformers 5 loads the embeddings and norms of a bitsandbytes checkpoint in the dtype of the file whatever dtype is
  asked for: the model computes in bfloat16, with 4-bit weights decoded to the dtype of their quantization state.

Rounded inputs spread the smallest difference: a value at the edge of a step goes the other way, and all that follows is
another prefix of noise. So the rules are held layer by layer, each on the inputs that the package had: what comes out
must be the rule's input times the weights that lowbit decoded. What is then left between the answers of the package and
lowbit's is the difference of rules alone. torch and safetensors only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

Rule = Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]
"""Inputs ``[..., in]`` and the small tensors of their module to the inputs that the package multiplies."""

STATE = "weight.quant_state.bitsandbytes__"
THRESHOLD = 6.0
TINY = 1e-30
"""In place of the largest magnitude of inputs that are all zero."""


class Layers:
    """Watches the quantized linears of a package's model and holds each output to the rule; see :attr:`largest`."""

    def __init__(self, model: torch.nn.Module, path: Path, scheme: str) -> None:
        """Watch ``model``, loaded from ``path``; the weights are those of ``<path>.dense``."""
        self.largest = 0.0
        """Largest difference of an output from the rule's, relative to the largest output of its layer."""
        self.seen: set[str] = set()
        rule = RULES.get(scheme, _as_they_are)
        dense = path.with_name(f"{path.name}.dense")
        self._hooks = [
            model.get_submodule(name).register_forward_hook(partial(self._hold, name, rule, tensors, weight))
            for name, tensors, weight in _layers(path, dense, torch.bfloat16 if scheme == "NVFP4" else torch.float32)
        ]

    def _hold(
        self,
        name: str,
        rule: Rule,
        tensors: Mapping[str, torch.Tensor],
        weight: torch.Tensor,
        module: torch.nn.Module,
        inputs: tuple[torch.Tensor, ...],
        output: torch.Tensor,
    ) -> None:
        wanted = rule(inputs[0].float(), tensors).double() @ weight.T
        apart = float((output.double() - wanted).abs().max() / wanted.abs().max())
        self.largest = max(self.largest, apart)
        self.seen.add(name)

    @property
    def unseen(self) -> int:
        """Quantized linears that have not run."""
        return len(self._hooks) - len(self.seen)


def _layers(path: Path, dense: Path, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, torch.Tensor], torch.Tensor]]:
    """Name, small tensors and decoded weight ``[out, in]`` (rounded to ``dtype``, float64) of each quantized module."""
    small = _small_tensors(path)
    for file in sorted(dense.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                name = key.removesuffix(".weight")
                if name in small:
                    yield name, small[name], opened.get_tensor(key).to(dtype).double()


def _as_they_are(x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return x


def _small_tensors(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Scales of inputs by module; modules are those with a scale, a row maximum or a quantization state."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            for name in names:
                for mark in (".weight_scale", ".SCB", f".{STATE}nf4", f".{STATE}fp4"):
                    if name.endswith(mark):
                        module = name.removesuffix(mark)
                        wanted = [f"{module}.{part}" for part in ("input_scale", "input_global_scale")]
                        found[module] = {
                            key.rpartition(".")[2]: opened.get_tensor(key).float() for key in wanted if key in names
                        }
    return found


def integers_by_token(x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """int8 with the whole range of 255 steps for the largest magnitude, both ways."""
    step = x.abs().amax(-1, keepdim=True).clamp_min(TINY) / 127.5
    return (x / step).clamp(-128, 127).round() * step


def static_integers(x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """int8 with the step of the checkpoint."""
    return (x / tensors["input_scale"]).clamp(-128, 127).round() * tensors["input_scale"]


def floats_by_token(x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """E4M3 with the largest magnitude at 448."""
    step = x.abs().amax(-1, keepdim=True).clamp_min(TINY) / 448
    return (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step


def static_floats(x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """E4M3 with the scale of the checkpoint."""
    return (x / tensors["input_scale"]).clamp(-448, 448).to(torch.float8_e4m3fn).float() * tensors["input_scale"]


def nvfp4(x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """E2M1 in groups of 16, each group's largest magnitude at 6, its scale left in floats."""
    groups = x.unflatten(-1, (-1, 16))
    step = groups.abs().amax(-1, keepdim=True).clamp_min(TINY) / 6
    return (_e2m1(groups / step) * step).flatten(-2)


def mxfp4(x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """E2M1 in groups of 32 under powers of two: the largest magnitude, rounded to two significant bits, below 8."""
    groups = x.unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1, keepdim=True).float()
    mantissa, exponent = torch.frexp(largest.clamp_min(TINY))
    # a mantissa of 7/8 and more rounds up to the next power
    step = torch.exp2((exponent - 1 + (mantissa >= 0.875) - 2).float())
    return (_e2m1(groups / step) * step).flatten(-2)


def outliers_apart(x: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """LLM.int8(): columns with an outlier as they are, the rest as int8 of the float16 input, each row its own step."""
    half = x.to(torch.float16)
    outliers = half.abs() >= THRESHOLD
    rows = half.masked_fill(outliers, 0)
    largest = rows.abs().amax(-1, keepdim=True).float().clamp_min(TINY)
    codes = (rows * (127.0 / largest)).round()
    # of the weights' 1/127 the dense model has its own share
    rounded = codes * largest * (6.200124e-05 * 127.0)
    return torch.where(outliers.any(-2, keepdim=True), x, rounded)


def _e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest of 0, ½, 1, 1½, 2, 3, 4 and 6, ties to the one with an even code."""
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    middles = (values[1:] + values[:-1]) / 2
    magnitude = x.abs().contiguous()
    low = torch.bucketize(magnitude, middles)
    high = torch.bucketize(magnitude, middles, right=True)
    return torch.sign(x) * values[torch.where(low % 2 == 0, low, high)]


RULES: Mapping[str, Rule] = {
    "W8A8": integers_by_token,
    "W8A8_STATIC": static_integers,
    "FP8": static_floats,
    "FP8_DYNAMIC": floats_by_token,
    "NVFP4": nvfp4,
    "MXFP4": mxfp4,
    "LLM_INT8": outliers_apart,
}
