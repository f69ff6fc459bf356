"""Quantized inputs: simulated as transformers runs them, calibrated, shared by what engines merge; SmoothQuant."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowbit.checkpoint import open_checkpoint
from lowbit.codecs import StoredGrid, module_plan
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.evaluation.verify import verify_checkpoint
from lowbit.formats import FloatSpec, FloatTensor, WeightSpec
from lowbit.pipeline.inputs import InputScales, RoundingLinear, prepare_linears
from lowbit.pipeline.quantize import QuantizeResult, quantize
from lowbit.pipeline.recipe import Recipe
from lowbit.pipeline.streamed import StreamedModel
from lowbit.quant import methods, transforms
from lowbit.quant.methods import METHODS
from lowbit.quant.rtn import RtnOptions
from lowbit.quant.smoothquant import SmoothQuantOptions, search_scales
from lowbit.quant.solution import Solution
from lowbit.quant.statistics import InputStatistics

IDS = torch.randint(3, 320, (2, 48), generator=torch.Generator().manual_seed(1))


def _quantize(source: Path, out: Path, text: Path, **settings: Any) -> QuantizeResult:
    defaults: dict[str, Any] = {"calibration": text, "samples": 8, "seq_len": 64}
    return quantize(source, out, **(defaults | settings))


@torch.no_grad()
def _logits(path: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    with open_checkpoint(path) as checkpoint:
        model = StreamedModel(checkpoint)
        hidden = model.embed(ids)
        for index in range(len(model.block_names)):
            hidden = model.run_block(model.load_block(index), index, hidden)
        return model.logits(hidden)


@pytest.mark.parametrize("scheme", ["W8A8_STATIC", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP8", "MXFP4", "NVFP4"])
def test_transformers_runs_what_lowbit_simulates(
    scheme: str, new_checkpoint: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """Loaded through the compressed-tensors package, which rounds the inputs of each linear by itself."""
    source, out = new_checkpoint(tmp_path / "source", dtype=torch.bfloat16), tmp_path / "out"
    _quantize(source, out, calibration_file, scheme=scheme, method="rtn")
    # The package decompresses FP4 and microscaled weights to bfloat16, which holds all of them but NVFP4's.
    loaded = torch.bfloat16 if scheme.startswith(("MX", "NV")) else torch.float32
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=loaded).eval()
    with torch.no_grad():
        theirs(IDS)  # the first call decompresses
        for parameter in theirs.parameters():
            parameter.data = parameter.data.float()
        expected, ours, dense = theirs(IDS).logits, _logits(out), _logits(source)
    spread = float((dense - dense.mean()).norm())
    # NVFP4: group scales of inputs are not rounded by the package unless told so by a key that older readers refuse.
    share = {"NVFP4": 0.3}.get(scheme, 1e-5)
    assert float((ours - expected).norm()) < share * spread
    assert float((ours - dense).norm()) > 1e-4 * spread, "nothing was rounded"
    assert verify_checkpoint(out).ok


def test_int8_by_token_is_simulated_row_by_row(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = _quantize(tiny_llama, out, calibration_file, scheme="W8A8", method="rtn")
    assert result.calibration is None, "dynamic scales need no calibration"
    with open_checkpoint(out) as checkpoint:
        model = StreamedModel(checkpoint)
        linear = model.load_block(0).get_submodule("mlp.down_proj")
        assert isinstance(linear, RoundingLinear)
        x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(0))
        steps = x.abs().amax(1, keepdim=True) / 127
        expected = (x / steps).round() @ linear.weight.T * steps
        assert torch.allclose(linear(x), expected, rtol=1e-4, atol=1e-5)
        config = checkpoint.quantization_config
        assert config is not None
        assert config["format"] == "int-quantized"
        assert checkpoint.tensors["model.layers.0.mlp.down_proj.weight"].dtype == torch.int8


@pytest.mark.parametrize("scheme", ["FP8", "NVFP4"])
def test_merged_matrices_share_their_scales(
    scheme: str, tiny_llama: Path, calibration_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _quantize(tiny_llama, out, calibration_file, scheme=scheme, method="rtn")
    tensors = load_file(out / "model.safetensors")
    weight = "weight_scale" if scheme == "FP8" else "weight_global_scale"
    inputs = "input_scale" if scheme == "FP8" else "input_global_scale"
    for parent, shards in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
        for local in (weight, inputs):
            found = {float(tensors[f"model.layers.1.{parent}.{shard}_proj.{local}"]) for shard in shards}
            assert len(found) == 1, (parent, local)
    assert tensors[f"model.layers.1.mlp.down_proj.{weight}"] != tensors[f"model.layers.1.mlp.up_proj.{weight}"]


def test_experts_that_no_token_reached_take_the_scale_of_the_others() -> None:
    scales = InputScales()
    inputs = Recipe(scheme="FP8").quantization.inputs
    scales.note("mlp.experts.0.down_proj", 4.48)
    scales.note("mlp.experts.2.down_proj", 44.8)
    scales.note("self_attn.o_proj", 1.0)
    found = {name: scales.of(name, inputs) for name in ("mlp.experts.1.down_proj", "mlp.experts.0.down_proj")}
    assert all(scale is not None and abs(float(scale) - 0.1) < 1e-3 for scale in found.values())
    assert float(scales.of("mlp.experts.1.up_proj", inputs)) == 1.0  # type: ignore[arg-type]
    assert scales.of("mlp.experts.0.down_proj", None) is None


def test_static_scales_of_experts(checkpoint_of: Callable[[str], Path], calibration_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _quantize(checkpoint_of("mixtral"), out, calibration_file, scheme="FP8", method="rtn")
    tensors = load_file(out / "model.safetensors")
    for kind in ("w1", "w2", "w3"):
        prefix = "model.layers.0.block_sparse_moe.experts"
        assert len({float(tensors[f"{prefix}.{i}.{kind}.input_scale"]) for i in range(4)}) == 1
    assert bool(torch.isfinite(_logits(out)).all())


def test_damaged_input_scales_are_told(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _quantize(tiny_llama, out, calibration_file, scheme="FP8", method="rtn")
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.input_scale"
    for damaged, told in ((None, "no input scale"), (torch.tensor([float("nan")]), "one positive number")):
        rest = {key: value for key, value in tensors.items() if key != name}
        save_file(rest if damaged is None else rest | {name: damaged}, out / "model.safetensors", {"format": "pt"})
        with open_checkpoint(out) as checkpoint, pytest.raises(CheckpointError, match=told):
            StreamedModel(checkpoint).load_block(0)


def test_formats_without_a_place_for_inputs_refuse(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    for scheme, fmt, told in (("W8A8", "gptq", "compressed-tensors"), ("NVFP4", "awq", "compressed-tensors")):
        with pytest.raises(UnsupportedError, match=told):
            _quantize(tiny_llama, tmp_path / "out", calibration_file, scheme=scheme, method="rtn", format=fmt)
    assert not (tmp_path / "out").exists()


def test_linears_are_prepared_once_and_keep_their_parameters() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2, bias=False))
    before = dict(block.named_parameters())
    prepare_linears(block)
    prepare_linears(block)
    assert all(isinstance(module, RoundingLinear) for module in block)
    assert all(value is before[name] for name, value in block.named_parameters())


# ---- SmoothQuant -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Exact(FloatTensor):
    """A weight that rounding leaves alone: what is left is what scaling and folding do."""

    weight: torch.Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        assert self.weight is not None
        return (self.weight * self.scales).to(dtype)


def _exact(weight: torch.Tensor, statistics: Any, spec: WeightSpec, *rest: Any) -> Solution:
    assert isinstance(spec, FloatSpec)
    ones = torch.ones(weight.shape[0], 1)
    return Solution(Exact(spec, torch.zeros_like(weight, dtype=torch.uint8), ones, None, weight.clone()))


def test_the_float_model_stays_the_same(
    model_type: str,
    checkpoint_of: Callable[[str], Path],
    calibration_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scales of a half, folded through the whole pipeline, with weights that are not rounded."""
    source = checkpoint_of(model_type)
    real = transforms.TRANSFORMS["smoothquant"]

    def half(weights: Any, statistics: Any, spec: Any, inputs: Any, options: Any) -> torch.Tensor:
        scales = real.search(weights, statistics, spec, inputs, SmoothQuantOptions(strength=0.5))
        assert scales is not None
        assert float(scales.max() / scales.min()) > 1.2
        return scales

    patched = {**transforms.TRANSFORMS, "smoothquant": replace(real, search=half)}
    monkeypatch.setattr("lowbit.pipeline.solving.TRANSFORMS", patched)
    solvers = {**METHODS, "rtn": methods.Method("rtn", RtnOptions, False, _exact, lambda spec: [])}
    monkeypatch.setattr("lowbit.pipeline.solving.METHODS", solvers)
    monkeypatch.setattr("lowbit.pipeline.checks._round_trips", lambda *_: [])  # floats don't say their grid
    out = tmp_path / "out"
    result = _quantize(
        source, out, calibration_file, scheme="fp8-channel", method="rtn", transform="smoothquant", format="dense"
    )
    assert any(module.scaled for module in result.modules)
    expected, found = _logits(source), _logits(out)
    assert float((found - expected).norm() / expected.norm()) < 1e-4
    assert any(
        not torch.equal(a, b)
        for (_, a), (_, b) in zip(sorted(_all(source).items()), sorted(_all(out).items()), strict=True)
    )


def _all(path: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name).float() for name in checkpoint.tensors}


def test_outliers_move_into_the_weights() -> None:
    """One input channel a thousand times the others ruins int8 by token; a searched strength mends it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 64, generator=generator)
    x[:, 5] *= 1000
    weight = torch.randn(96, 64, generator=generator) * 0.05
    weight[:, 5] /= 1000
    statistics = InputStatistics(64)
    statistics.add(x)
    scheme = Recipe(scheme="W8A8").quantization
    found = search_scales([weight], statistics, scheme.weights, scheme.inputs, SmoothQuantOptions())
    assert found.after < 0.02 * found.before
    assert 0 < found.strength <= 1
    assert float(found.scales.argmax()) == 5
    fixed = search_scales([weight], statistics, scheme.weights, scheme.inputs, SmoothQuantOptions(strength=0.5))
    assert found.after <= fixed.after * 1.0001
    # Dead channels and channels without weights keep the scale 1.
    x[:, 7] = 0
    weight[:, 9] = 0
    statistics = InputStatistics(64)
    statistics.add(x)
    found = search_scales([weight], statistics, scheme.weights, scheme.inputs, SmoothQuantOptions())
    assert found.scales[[7, 9]].tolist() == [1.0, 1.0]
    assert bool(torch.isfinite(found.scales).all())


def test_smoothquant_pays_on_a_model_with_outliers(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    """Norm gains of some channels x 50, their columns / 50: the same function, and what real models look like."""
    source = tmp_path / "source"
    source.mkdir()
    for file in tiny_llama.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    for layer in range(2):
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            tensors[f"model.layers.{layer}.{norm}.weight"][3:6] *= 50
            for reader in readers:
                tensors[f"model.layers.{layer}.{reader}.weight"][:, 3:6] /= 50
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert torch.allclose(_logits(source), _logits(tiny_llama), atol=1e-3)
    errors = {}
    for transform in ("none", "smoothquant", None):
        out = tmp_path / f"out-{transform}"
        _quantize(source, out, calibration_file, scheme="W8A8", method="gptq", transform=transform)
        errors[transform] = float((_logits(out) - _logits(source)).norm())
    assert errors["smoothquant"] < 0.3 * errors["none"]
    assert errors[None] == errors["smoothquant"], "the default of W8A8 by a method that calibrates"


def test_plans_say_how_inputs_are_stored(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    """A rule may give some modules another scheme; the file says which is which."""
    out = tmp_path / "out"
    recipe = Recipe.from_dict(
        {"scheme": "FP8_DYNAMIC", "method": "rtn", "rules": [{"pattern": ".*down_proj", "scheme": "int4-g64-sym"}]}
    )
    _quantize(tiny_llama, out, calibration_file, recipe=recipe)
    with open_checkpoint(out) as checkpoint:
        plan = module_plan(checkpoint)
    for name, entry in plan.items():
        assert isinstance(entry, StoredGrid)
        assert (entry.inputs is None) == name.endswith("down_proj")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
