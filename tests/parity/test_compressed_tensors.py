"""Checkpoints written by the codec, loaded by transformers through the compressed-tensors package."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from lowbit.checkpoint import open_checkpoint
from lowbit.codecs import CODECS, module_plan, read_dense
from lowbit.formats import IntSpec, QuantizedTensor
from lowbit.pipeline.quantize import quantize

CODEC = CODECS["compressed-tensors"]
HALF = torch.bfloat16

SPECS: dict[str, dict[str, IntSpec]] = {
    "int4-g32-sym": {r".*_proj": IntSpec(4, 32, scale_dtype=HALF)},
    "int4-g128-asym": {r".*_proj": IntSpec(4, 128, symmetric=False, scale_dtype=HALF)},
    "int8-channel-sym": {r".*_proj": IntSpec(8, -1, scale_dtype=HALF)},
    "int3-g64-sym": {r".*_proj": IntSpec(3, 64, scale_dtype=HALF)},
    "int5-channel-asym": {r".*_proj": IntSpec(5, -1, symmetric=False, scale_dtype=HALF)},
    "mixed": {
        r"model\.layers\.0\.mlp\.down_proj": IntSpec(8, -1, scale_dtype=HALF),
        r".*self_attn.*": IntSpec(4, 32, scale_dtype=HALF),
        r".*\.1\.mlp.*": IntSpec(4, 64, scale_dtype=HALF),
    },
}


def random_grid(weight: torch.Tensor, spec: IntSpec, generator: torch.Generator) -> QuantizedTensor:
    """Random codes at the weight's own magnitude: what is stored must come back, however well it was rounded."""
    rows, columns = weight.shape
    shape = (rows, spec.groups(columns))
    codes = torch.randint(0, spec.levels, (rows, columns), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(shape, generator=generator) + 0.5) * 4 * weight.std() / spec.levels
    zeros = None
    if not spec.symmetric:
        zeros = torch.randint(0, spec.levels, shape, dtype=torch.uint8, generator=generator)
    return QuantizedTensor(spec, codes, scales.to(spec.scale_dtype), zeros)


def write_pair(source: Path, out: Path, specs: dict[str, IntSpec]) -> tuple[Path, Path]:
    """The same random quantized model twice: packed by the codec, and with dense bfloat16 weights."""
    generator = torch.Generator().manual_seed(0)
    packed: dict[str, torch.Tensor] = {}
    dense: dict[str, torch.Tensor] = {}
    plan: dict[str, IntSpec] = {}
    left: list[str] = []
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        spec = next((spec for pattern, spec in specs.items() if re.fullmatch(pattern, module)), None)
        if spec is None:
            packed[name] = dense[name] = tensor.to(HALF)
            left += [module] if module.endswith(("_proj", "lm_head", "mlp.gate")) else []
            continue
        q = random_grid(tensor, spec, generator)
        plan[module] = spec
        dense[name] = q.dequantize(HALF)
        packed |= {f"{module}.{local}": value for local, value in CODEC.encode(q).items()}
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    for directory, tensors in ((out / "packed", packed), (out / "dense", dense)):
        directory.mkdir(parents=True)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config))
        config = config | {"quantization_config": CODEC.config(plan, left)}
    # The first one written got the plain config, the second the other's: swap them.
    (out / "packed" / "config.json").write_text(json.dumps(config))
    del config["quantization_config"]
    (out / "dense" / "config.json").write_text(json.dumps(config))
    return out / "packed", out / "dense"


IDS = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("case", [case for case in SPECS if case != "mixed"])
def test_transformers_decompresses_to_the_same_model(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    """A mixture is left out: transformers decompresses all dense layers by the first group (5.23)."""
    packed, dense = write_pair(tiny_llama, tmp_path, SPECS[case])
    reference = AutoModelForCausalLM.from_pretrained(dense, dtype=HALF)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        config = CompressedTensorsConfig(run_compressed=False)
        loaded = AutoModelForCausalLM.from_pretrained(packed, dtype=HALF, quantization_config=config)
    expected = dict(reference.named_parameters())
    found = {name: value for name, value in loaded.named_parameters() if name in expected}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, reference(IDS).logits)


@pytest.mark.parametrize("case", ["int4-g32-sym", "int8-channel-sym", "int3-g64-sym", "mixed"])
def test_transformers_runs_it_compressed(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Zero points are left out: on the meta device compressed-tensors 0.20 expects them unpacked, its own files too."""
    packed, dense = write_pair(tiny_llama, tmp_path, SPECS[case])
    reference = AutoModelForCausalLM.from_pretrained(dense, dtype=HALF)
    loaded = AutoModelForCausalLM.from_pretrained(packed, dtype=HALF)
    assert any("weight_packed" in name for name, _ in loaded.named_parameters())
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, reference(IDS).logits)


@pytest.mark.parametrize("attention", [4, 8])
def test_transformers_loads_experts(attention: int, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """One group for all, and one for the experts beside one for attention."""
    specs = {
        r".*experts\.\d+\.w\d": IntSpec(4, 32, scale_dtype=HALF),
        r".*_proj": IntSpec(attention, 32, scale_dtype=HALF),
    }
    packed, dense = write_pair(checkpoint_of("mixtral"), tmp_path, specs)
    names = load_file(packed / "model.safetensors").keys()
    assert sum(name.endswith("weight_packed") for name in names) == 2 * (4 * 3 + 4)
    reference = AutoModelForCausalLM.from_pretrained(dense, dtype=HALF)
    loaded = AutoModelForCausalLM.from_pretrained(packed, dtype=HALF)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, reference(IDS).logits)


@pytest.mark.parametrize("case", SPECS)
def test_the_config_is_the_package_s_own(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    packed, _ = write_pair(tiny_llama, tmp_path, SPECS[case])
    written = json.loads((packed / "config.json").read_text())["quantization_config"]
    theirs = QuantizationConfig.model_validate(written)
    assert theirs.format == "pack-quantized"
    assert len(theirs.config_groups) == len(SPECS[case])


@pytest.mark.parametrize(("scheme", "fmt"), [("int4-g64-sym", "pack-quantized"), ("FP8_DYNAMIC", "float-quantized")])
def test_zeros_of_a_pruned_checkpoint_come_back(
    scheme: str, fmt: str, tiny_llama: Path, calibration_file: Path, tmp_path: Path
) -> None:
    """Pruned 2:4 and solved under the mask; the package unpacks lowbit's own values, and two of four are zero."""
    out = tmp_path / "out"
    settings = {"samples": 8, "seq_len": 64, "calibration": calibration_file, "format": "compressed-tensors"}
    quantize(tiny_llama, out, scheme=scheme, method="gptq", sparsity="2:4", pruner="wanda", **settings)
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    assert written["format"] == fmt
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        config = CompressedTensorsConfig(run_compressed=False)
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, quantization_config=config)
    found = dict(loaded.named_parameters())
    with open_checkpoint(out) as checkpoint:
        plan = module_plan(checkpoint)
        for module in plan:
            weight = found[f"{module}.weight"]
            runs = (weight == 0).reshape(weight.shape[0], -1, 4).sum(2)
            assert bool((runs >= 2).all()), module
            own = read_dense(checkpoint, plan, f"{module}.weight").float()
            # the package computes in the dtype of the scales
            torch.testing.assert_close(weight.float(), own, rtol=2**-7, atol=0)
