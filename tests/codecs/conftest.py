"""Random quantized tensors and ways to look at packed words without lowbit's own unpacking."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.codecs import Codec
from lowbit.formats import IntSpec, QuantizedTensor

MakeQuantized = Callable[..., QuantizedTensor]


def build(spec: IntSpec, rows: int, columns: int, *, seed: int = 0, least_zero: int = 0) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 1) if spec.group_size == 0 else (rows, spec.groups(columns))
    codes = torch.randint(0, spec.levels, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(shape, generator=generator) * 0.1 + 0.01).to(spec.scale_dtype)
    zeros = None
    if not spec.symmetric:
        zeros = torch.randint(least_zero, spec.levels, shape, dtype=torch.uint8, generator=generator)
    return QuantizedTensor(spec, codes, scales, zeros)


@pytest.fixture(scope="session")
def make_quantized() -> MakeQuantized:
    """``make_quantized(spec, rows, columns, seed=0, least_zero=0)``: random codes, scales and zero points."""
    return build


def rounded(weight: torch.Tensor, spec: IntSpec) -> QuantizedTensor:
    """``weight`` rounded to ``spec`` in the plainest way; zero points at least 1, so that GPTQ v1 holds them."""
    rows, columns = weight.shape
    size = spec.group_size if spec.group_size > 0 else columns
    grouped = weight.float().view(rows, -1, size)
    zeros: torch.Tensor | None = None
    if spec.symmetric:
        scales = (grouped.abs().amax(2) / (spec.midpoint - 0.5)).to(spec.scale_dtype)
        offset = torch.full(scales.shape, float(spec.midpoint))
    else:
        low, high = grouped.amin(2), grouped.amax(2)
        scales = ((high - low) / (spec.levels - 1)).to(spec.scale_dtype)
        offset = (-low / scales.float()).round().clamp(1, spec.levels - 1)
        zeros = offset.to(torch.uint8)
    codes = (grouped / scales.float()[..., None] + offset[..., None]).round().clamp(0, spec.levels - 1)
    return QuantizedTensor(spec, codes.view(rows, columns).to(torch.uint8), scales, zeros)


def write(
    source: Path, out: Path, codec: Codec, specs: Mapping[str, IntSpec], **details: Any
) -> dict[str, torch.Tensor]:
    """Write ``source`` to ``out``, modules that match a regex of ``specs`` quantized; returns the dense weights."""
    out.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    dense: dict[str, torch.Tensor] = {}
    plan: dict[str, IntSpec] = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            module = name.removesuffix(".weight")
            spec = next((s for pattern, s in specs.items() if re.fullmatch(pattern, module)), None)
            if spec is None or module == name or tensor.dim() != 2:
                tensors[name] = dense[name] = tensor
                continue
            q = rounded(tensor, spec)
            plan[module] = spec
            dense[name] = q.dequantize()
            tensors |= {f"{module}.{local}": value for local, value in codec.encode(q).items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = codec.config(plan, ["lm_head"], details=details)
    (out / "config.json").write_text(json.dumps(config))
    for path in source.glob("tokenizer*"):
        shutil.copy(path, out)
    return dense


@pytest.fixture(scope="session")
def write_quantized() -> Callable[..., dict[str, torch.Tensor]]:
    """``write_quantized(source, out, codec, {regex: spec})``: a checkpoint rounded plainly, and its dense weights."""
    return write
