"""Reading weights of any stored format, and what is said of checkpoints that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.checkpoint import open_checkpoint
from lowbit.codecs import CODECS, dense_names, module_plan, read_dense, read_weight, stored_format
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats import IntSpec, QuantizedTensor

BLOCKS = r"model\.layers\.\d+\..*_proj"
CASES: dict[str, tuple[str, dict[str, IntSpec]]] = {
    "gptq": ("gptq", {BLOCKS: IntSpec(4, 32)}),
    "gptq-mixed": ("gptq", {r".*\.1\.mlp\.down_proj": IntSpec(8, -1), BLOCKS: IntSpec(4, 64)}),
    "gptq_v2": ("gptq_v2", {BLOCKS: IntSpec(3, 32, symmetric=False)}),
    "awq": ("awq", {BLOCKS: IntSpec(4, 32, symmetric=False)}),
    "ct": ("compressed-tensors", {BLOCKS: IntSpec(4, 128)}),
    "ct-mixed": ("compressed-tensors", {r".*down_proj": IntSpec(5, 32, symmetric=False), BLOCKS: IntSpec(8, -1)}),
}


@pytest.mark.parametrize("case", CASES)
def test_any_format_reads_as_dense(
    case: str, tiny_llama: Path, tmp_path: Path, write_quantized: Callable[..., dict[str, torch.Tensor]]
) -> None:
    format_name, specs = CASES[case]
    dense = write_quantized(tiny_llama, tmp_path / "q", CODECS[format_name], specs)
    with open_checkpoint(tmp_path / "q") as checkpoint:
        plan = module_plan(checkpoint)
        assert stored_format(plan) == format_name
        assert len(plan) == 14
        names = list(dense_names(checkpoint, plan))
        assert sorted(names) == sorted(dense)
        for name in names:
            assert torch.equal(read_dense(checkpoint, plan, name), dense[name]), name
        module = next(iter(plan))
        assert isinstance(read_weight(checkpoint, plan, module), QuantizedTensor)
        assert isinstance(read_weight(checkpoint, plan, "model.norm"), torch.Tensor)


def test_dense_checkpoints_have_no_plan(tiny_llama: Path) -> None:
    with open_checkpoint(tiny_llama) as checkpoint:
        plan = module_plan(checkpoint)
        assert plan == {}
        assert stored_format(plan) == "dense"
        assert list(dense_names(checkpoint, plan)) == list(checkpoint.tensors)


def test_width_of_channelwise_rows_comes_from_weight_shape(tmp_path: Path, make_quantized: Any) -> None:
    codec = CODECS["compressed-tensors"]
    q = make_quantized(IntSpec(3, -1), 8, 37)
    save_file({f"a.0.b.{k}": v for k, v in codec.encode(q).items()}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": codec.config({"a.0.b": q.spec}, [])}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open_checkpoint(tmp_path) as checkpoint:
        plan = module_plan(checkpoint)
        assert plan["a.0.b"].shape == (8, 37)
        assert torch.equal(read_dense(checkpoint, plan, "a.0.b.weight"), q.dequantize())


def edit(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))


def test_legacy_side_file(tiny_llama: Path, tmp_path: Path, write_quantized: Any) -> None:
    out = tmp_path / "q"
    dense = write_quantized(tiny_llama, out, CODECS["awq"], {BLOCKS: IntSpec(4, 32, symmetric=False)})
    edit(out, lambda config: config.pop("quantization_config"))
    with open_checkpoint(out) as checkpoint, pytest.raises(CheckpointError, match="no quantization_config says how"):
        module_plan(checkpoint)
    legacy = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (out / "quant_config.json").write_text(json.dumps(legacy))
    with open_checkpoint(out) as checkpoint:
        plan = module_plan(checkpoint)
        name = "model.layers.1.mlp.up_proj.weight"
        assert torch.equal(read_dense(checkpoint, plan, name), dense[name])


def test_what_cannot_be_read_is_said_in_one_line(tiny_llama: Path, tmp_path: Path, write_quantized: Any) -> None:
    out = tmp_path / "q"
    write_quantized(tiny_llama, out, CODECS["gptq"], {BLOCKS: IntSpec(4, 32)})

    def method(name: str) -> None:
        edit(out, lambda config: config["quantization_config"].update(quant_method=name))

    method("aqlm")
    with open_checkpoint(out) as checkpoint, pytest.raises(UnsupportedError, match="'aqlm' cannot be read"):
        module_plan(checkpoint)
    method("gptq")
    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.scales"]
    save_file(tensors, out / "model.safetensors")
    with (
        open_checkpoint(out) as checkpoint,
        pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.scales is missing"),
    ):
        module_plan(checkpoint)
    save_file({"model.norm.weight": torch.ones(4)}, out / "model.safetensors")
    with open_checkpoint(out) as checkpoint, pytest.raises(CheckpointError, match="no tensor is quantized"):
        module_plan(checkpoint)
