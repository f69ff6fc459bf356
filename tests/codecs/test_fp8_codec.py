"""``quant_method: fp8`` checkpoints, read as transformers' own fine-grained FP8 dequantizes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.checkpoint import open_checkpoint
from lowbit.codecs import module_plan, read_dense
from lowbit.codecs.fp8 import Fp8Codec
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats import FloatSpec


def write(source: Path, out: Path, **config: Any) -> dict[str, torch.Tensor]:
    """``source`` with its projections in FP8, scales found in the plainest way; returns the weights meant."""
    out.mkdir()
    block = config.get("weight_block_size")
    tensors, meant = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        rows, columns = tensor.shape
        high, wide = block or (rows, columns)
        scales = torch.zeros(-(-rows // high), -(-columns // wide))
        quantized = torch.zeros_like(tensor, dtype=torch.float8_e4m3fn)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = (slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide))
                scales[i, j] = tensor[part].abs().max() / 448
                quantized[part] = (tensor[part] / scales[i, j]).to(torch.float8_e4m3fn)
        tensors[name] = quantized
        tensors[f"{module}.{'weight_scale_inv' if block else 'weight_scale'}"] = scales if block else scales.flatten()
        if config.get("activation_scheme") == "static":
            tensors[f"{module}.input_scale"] = torch.tensor([0.05])
        spread = scales.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
        meant[name] = quantized.float() * spread
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    values = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(values | {"quantization_config": {"quant_method": "fp8", **config}}))
    return meant


CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"weight_block_size": [128, 128], "activation_scheme": "dynamic"}, "fp8-block", "e4m3-g128"),
    ({"weight_block_size": [64, 64], "activation_scheme": "dynamic"}, "fp8-block", "e4m3-g64"),
    ({"activation_scheme": "dynamic"}, "fp8-tensor", "e4m3-token"),
    ({"activation_scheme": "static"}, "fp8-tensor", "e4m3-tensor-static"),
]


@pytest.mark.parametrize(("config", "weights", "inputs"), CASES)
def test_weights_are_what_they_mean(
    config: dict[str, Any], weights: str, inputs: str, tiny_llama: Path, tmp_path: Path
) -> None:
    meant = write(tiny_llama, tmp_path / "fp8", **config)
    with open_checkpoint(tmp_path / "fp8") as checkpoint:
        plan = module_plan(checkpoint)
        assert {f"{module}.weight" for module in plan} == meant.keys()
        assert {(str(e.spec), str(e.inputs)) for e in plan.values()} == {(weights, inputs)}  # type: ignore[union-attr]
        for name, expected in meant.items():
            assert torch.equal(read_dense(checkpoint, plan, name), expected), name


def test_it_is_not_written() -> None:
    assert "compressed-tensors" in Fp8Codec().supports(FloatSpec(), (8, 8))[0]
    with pytest.raises(UnsupportedError, match="read, not written"):
        Fp8Codec().config({"m": FloatSpec()}, [])


@pytest.mark.parametrize(
    ("config", "told"),
    [({"weight_block_size": [128]}, "weight_block_size"), ({"activation_scheme": "often"}, "activation_scheme")],
)
def test_nonsense_is_told(config: dict[str, Any], told: str, tiny_llama: Path, tmp_path: Path) -> None:
    write(tiny_llama, tmp_path / "fp8")
    file = tmp_path / "fp8" / "config.json"
    values = json.loads(file.read_text())
    values["quantization_config"] |= config
    file.write_text(json.dumps(values))
    with open_checkpoint(tmp_path / "fp8") as checkpoint, pytest.raises(CheckpointError, match=told):
        module_plan(checkpoint)
