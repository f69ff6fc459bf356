"""Conversions: same weights, right config, or a refusal before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.checkpoint import open_checkpoint, read_manifest
from lowbit.codecs import CODECS, dense_names, module_plan, read_dense
from lowbit.codecs.conversion import convert_checkpoint
from lowbit.errors import LowbitError, UnsupportedError, UsageError
from lowbit.formats import IntSpec

BLOCKS = r"model\.layers\.\d+\..*_proj"
SYM, ASYM = IntSpec(4, 32), IntSpec(4, 32, symmetric=False)
Write = Callable[..., dict[str, torch.Tensor]]


def check_same(path: Path, dense: dict[str, torch.Tensor]) -> None:
    with open_checkpoint(path) as checkpoint:
        plan = module_plan(checkpoint)
        assert sorted(dense_names(checkpoint, plan)) == sorted(dense)
        for name, weight in dense.items():
            assert torch.equal(read_dense(checkpoint, plan, name), weight), name


@pytest.mark.parametrize(
    ("source", "target", "spec", "regridded"),
    [
        ("gptq", "compressed-tensors", SYM, 0),
        ("gptq", "compressed-tensors", IntSpec(3, -1), 0),
        ("gptq", "awq", SYM, 0),
        ("gptq", "awq", IntSpec(3, 32), 14),
        ("gptq", "gptq_v2", IntSpec(8, 64), 0),
        ("gptq_v2", "awq", ASYM, 0),
        ("gptq_v2", "compressed-tensors", IntSpec(2, 64, symmetric=False), 0),
        ("awq", "compressed-tensors", ASYM, 0),
        ("awq", "gptq", SYM, 14),
        ("awq", "gptq_v2", ASYM, 0),
        ("compressed-tensors", "gptq", IntSpec(4, -1), 0),
        ("compressed-tensors", "gptq", IntSpec(5, 32), 14),
        ("compressed-tensors", "awq", ASYM, 0),
        ("awq", "dense", ASYM, 0),
        ("gptq", "dense", SYM, 0),
    ],
)
def test_weights_are_the_same_numbers(
    source: str,
    target: str,
    spec: IntSpec,
    regridded: int,
    tiny_llama: Path,
    tmp_path: Path,
    write_quantized: Write,
) -> None:
    dense = write_quantized(tiny_llama, tmp_path / "a", CODECS[source], {BLOCKS: spec})
    result = convert_checkpoint(tmp_path / "a", tmp_path / "b", target)
    assert (result.source_format, result.format, result.modules) == (source, target, 14)
    assert (result.exact, result.regridded) == (True, regridded)
    check_same(tmp_path / "b", dense)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert ("quantization_config" in config) == (target != "dense")
    assert (tmp_path / "b" / "tokenizer.json").exists()
    manifest = read_manifest(tmp_path / "b")
    assert manifest is not None
    assert manifest.recipe["convert"]["from"] == source
    assert len(manifest.modules) == (0 if target == "dense" else 14)


def test_symmetric_gptq_to_compressed_tensors_is_a_transpose(
    tiny_llama: Path, tmp_path: Path, write_quantized: Write
) -> None:
    write_quantized(tiny_llama, tmp_path / "a", CODECS["gptq"], {BLOCKS: IntSpec(3, 64)})
    convert_checkpoint(tmp_path / "a", tmp_path / "b", "compressed-tensors")
    before = load_file(tmp_path / "a" / "model.safetensors")
    after = load_file(tmp_path / "b" / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj"
    assert torch.equal(after[f"{name}.weight_packed"], before[f"{name}.qweight"].t())
    assert torch.equal(after[f"{name}.weight_scale"], before[f"{name}.scales"].t())


def test_there_and_back_is_the_same_file(tiny_llama: Path, tmp_path: Path, write_quantized: Write) -> None:
    write_quantized(tiny_llama, tmp_path / "a", CODECS["gptq"], {r".*down_proj": IntSpec(8, 64), BLOCKS: SYM})
    convert_checkpoint(tmp_path / "a", tmp_path / "b", "compressed-tensors")
    convert_checkpoint(tmp_path / "b", tmp_path / "c", "gptq")
    first, last = (load_file(tmp_path / d / "model.safetensors") for d in "ac")
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in first)
    config = json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]
    assert list(config["dynamic"].values()) == [{"bits": 8, "group_size": 64, "sym": True}]


def test_activation_order_goes_to_gptq_and_dense_only(tiny_llama: Path, tmp_path: Path, write_quantized: Write) -> None:
    source = tmp_path / "a"
    write_quantized(tiny_llama, source, CODECS["gptq"], {BLOCKS: SYM}, desc_act=True)
    tensors = load_file(source / "model.safetensors")
    module = "model.layers.0.mlp.up_proj"
    tensors[f"{module}.g_idx"] = tensors[f"{module}.g_idx"].flip(0).contiguous()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for target in ("compressed-tensors", "awq"):
        with pytest.raises(UnsupportedError, match=rf"{module} has its columns in activation order"):
            convert_checkpoint(source, tmp_path / "no", target)
    assert not list(tmp_path.glob("no*"))
    convert_checkpoint(source, tmp_path / "v2", "gptq_v2")
    assert json.loads((tmp_path / "v2" / "config.json").read_text())["quantization_config"]["desc_act"] is True
    convert_checkpoint(source, tmp_path / "dense", "dense", "fp32")
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    check_same(source, dense)
    check_same(tmp_path / "v2", dense)


@pytest.mark.parametrize(
    ("target", "spec", "reason"),
    [("awq", IntSpec(8, 32), "use 4 bits"), ("gptq", ASYM, "--sym"), ("awq", IntSpec(5, -1), "use 4 bits")],
)
def test_grids_that_do_not_fit_are_refused(
    target: str, spec: IntSpec, reason: str, tiny_llama: Path, tmp_path: Path, write_quantized: Write
) -> None:
    write_quantized(tiny_llama, tmp_path / "a", CODECS["compressed-tensors"], {BLOCKS: spec})
    with pytest.raises(UnsupportedError, match=reason) as raised:
        convert_checkpoint(tmp_path / "a", tmp_path / "b", target)
    assert "model.layers.0." in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("b*"))


def test_a_mixture_that_awq_cannot_say_is_refused(tiny_llama: Path, tmp_path: Path, write_quantized: Write) -> None:
    specs = {r".*down_proj": IntSpec(4, 64), BLOCKS: SYM}
    write_quantized(tiny_llama, tmp_path / "a", CODECS["compressed-tensors"], specs)
    with pytest.raises(UnsupportedError, match="one group size"):
        convert_checkpoint(tmp_path / "a", tmp_path / "b", "awq")


def test_dtype_of_dense_output(tiny_llama: Path, tmp_path: Path, write_quantized: Write) -> None:
    dense = write_quantized(tiny_llama, tmp_path / "a", CODECS["awq"], {BLOCKS: ASYM})
    result = convert_checkpoint(tmp_path / "a", tmp_path / "b", "dense", "bf16")
    assert not result.exact
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert all(torch.equal(written[name], dense[name].bfloat16()) for name in dense)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"


def test_dense_to_dense_casts(tiny_llama: Path, tmp_path: Path) -> None:
    result = convert_checkpoint(tiny_llama, tmp_path / "b", "dense", torch.float16)
    assert (result.modules, result.exact) == (0, False)
    before, after = load_file(tiny_llama / "model.safetensors"), load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(after[name], before[name].half()) for name in before)


def test_bad_requests(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="lowbit quantize"):
        convert_checkpoint(tiny_llama, tmp_path / "b", "gptq")
    with pytest.raises(UsageError, match="gptq, gptq_v2, awq"):
        convert_checkpoint(tiny_llama, tmp_path / "b", "ggml")
    with pytest.raises(UsageError, match="bf16"):
        convert_checkpoint(tiny_llama, tmp_path / "b", "dense", "int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UsageError, match="--overwrite"):
        convert_checkpoint(tiny_llama, tmp_path / "full", "dense")
    assert not list(tmp_path.glob("b*"))


def test_an_interrupted_conversion_goes_on(
    tiny_llama: Path, tmp_path: Path, write_quantized: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_quantized(tiny_llama, tmp_path / "a", CODECS["awq"], {BLOCKS: ASYM})
    monkeypatch.setattr("lowbit.codecs.conversion._PART_BYTES", 20_000)
    convert_checkpoint(tmp_path / "a", tmp_path / "whole", "compressed-tensors")

    class Stop:
        steps = 0

        def start(self, title: str, total: int) -> None: ...

        def advance(self, module: str, **fields: float | str) -> None:
            self.steps += 1
            if self.steps == 9:
                raise KeyboardInterrupt

        def close(self) -> None: ...

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(tmp_path / "a", tmp_path / "b", "compressed-tensors", progress=Stop())
    with pytest.raises(UsageError, match="--resume"):
        convert_checkpoint(tmp_path / "a", tmp_path / "b", "compressed-tensors")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", "compressed-tensors", resume=True)
    for name in ("model.safetensors", "config.json", "lowbit.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_damaged_codes_are_refused(tiny_llama: Path, tmp_path: Path, write_quantized: Write) -> None:
    write_quantized(tiny_llama, tmp_path / "a", CODECS["gptq"], {BLOCKS: SYM})
    tensors: dict[str, Any] = load_file(tmp_path / "a" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.scales"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    with pytest.raises(LowbitError, match=r"model\.layers\.1\.mlp\.up_proj: a scale is not finite"):
        convert_checkpoint(tmp_path / "a", tmp_path / "b", "compressed-tensors")
    assert not (tmp_path / "b").exists()
