"""Quantizing tiny checkpoints of every family, in every format, by every method."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit.checkpoint import open_checkpoint, read_manifest
from lowbit.codecs import module_plan, read_dense
from lowbit.errors import CheckpointError, UnsupportedError, UsageError
from lowbit.pipeline.experts import UnfusedExperts
from lowbit.pipeline.quantize import QuantizeResult, quantize
from lowbit.pipeline.recipe import Recipe
from lowbit.pipeline.streamed import StreamedModel

OTHERS = [
    ("llama", "rtn"),
    ("llama", "gptaq"),
    ("qwen3_moe", "gptaq"),
    *((name, "awq") for name in ("gemma", "gemma3_text", "opt", "phi", "phi3")),
]


def _quantize(source: Path, out: Path, text: Path, **settings: Any) -> QuantizeResult:
    defaults: dict[str, Any] = {"calibration": text, "samples": 8, "seq_len": 64, "group_size": 64}
    return quantize(source, out, **(defaults | settings))


def _logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    with open_checkpoint(path) as checkpoint:
        model = StreamedModel(checkpoint)
        hidden = model.embed(ids)
        for index in range(len(model.block_names)):
            hidden = model.run_block(model.load_block(index), index, hidden)
        return model.logits(hidden)


def _divergence(reference: Path, candidate: Path, text: Path) -> float:
    """Mean KL divergence in nats on text that was not calibrated on (the file's end)."""
    tokenizer = AutoTokenizer.from_pretrained(reference)
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"][-512:]).view(8, 64)
    p, q = (torch.log_softmax(_logits(path, ids).double(), -1) for path in (reference, candidate))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_every_family(
    model_type: str, checkpoint_of: Callable[[str], Path], calibration_file: Path, tmp_path: Path
) -> None:
    _check_quantized(checkpoint_of(model_type), "gptq", calibration_file, tmp_path / "out")


@pytest.mark.parametrize(("family", "method"), OTHERS)
def test_other_methods(
    family: str, method: str, checkpoint_of: Callable[[str], Path], calibration_file: Path, tmp_path: Path
) -> None:
    _check_quantized(checkpoint_of(family), method, calibration_file, tmp_path / "out")


def _check_quantized(source: Path, method: str, calibration_file: Path, out: Path) -> None:
    """All linears but the routers are quantized, nothing else changed, and the model is nearly the same."""
    result = _quantize(source, out, calibration_file, method=method, bits=8)
    assert _divergence(source, out, calibration_file) < 5e-3
    with open_checkpoint(source) as dense, open_checkpoint(out) as quantized:
        plan = module_plan(quantized)
        assert set(plan) == {report.name for report in result.modules}
        linears = StreamedModel(dense).linear_shapes()
        routers = {name for name in linears if name.endswith(("gate", "shared_expert_gate"))}
        assert set(plan) == set(linears) - routers
        if method != "awq":  # nothing but the quantized weights may change
            for name in set(dense.tensors) - {f"{module}.weight" for module in plan}:
                assert torch.equal(dense.read(name), quantized.read(name)), name


@pytest.mark.parametrize(("fmt", "method"), [("gptq", "gptq"), ("awq", "awq"), ("awq", "rtn")])
def test_formats_hold_the_same_weights(
    fmt: str, method: str, tiny_llama: Path, calibration_file: Path, tmp_path: Path
) -> None:
    """The same solution in every format: the codec may not change a weight."""
    reference, out = tmp_path / "reference", tmp_path / "out"
    settings: dict[str, Any] = {"method": method, "bits": 4}
    _quantize(tiny_llama, reference, calibration_file, format="compressed-tensors", **settings)
    _quantize(tiny_llama, out, calibration_file, format=fmt, **settings)
    with open_checkpoint(reference) as a, open_checkpoint(out) as b:
        plan_a, plan_b = module_plan(a), module_plan(b)
        assert set(plan_a) == set(plan_b)
        for module in plan_a:
            name = f"{module}.weight"
            torch.testing.assert_close(read_dense(a, plan_a, name), read_dense(b, plan_b, name), rtol=0, atol=0)


def test_calibrated_methods_beat_rounding(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    divergence = {}
    for method in ("rtn", "gptq", "awq"):
        _quantize(tiny_llama, tmp_path / method, calibration_file, method=method, bits=3, samples=16)
        divergence[method] = _divergence(tiny_llama, tmp_path / method, calibration_file)
    assert divergence["gptq"] < divergence["rtn"]
    assert divergence["awq"] < divergence["rtn"]


def test_a_transform_goes_before_any_method(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    """AWQ's scaling and GPTQ's solving together, and AWQ's clipping without its scaling."""
    both = _quantize(tiny_llama, tmp_path / "both", calibration_file, method="gptq", transform="awq", bits=8)
    assert {report.method for report in both.modules} == {"gptq"}
    assert any(report.scaled for report in both.modules)
    assert _divergence(tiny_llama, tmp_path / "both", calibration_file) < 5e-3
    neither = _quantize(tiny_llama, tmp_path / "clip", calibration_file, method="awq", transform="none", bits=8)
    assert not any(report.scaled for report in neither.modules)
    norms = [name for name in load_file(tiny_llama / "model.safetensors") if "norm" in name]
    kept, changed = (load_file(tmp_path / name / "model.safetensors") for name in ("clip", "both"))
    original = load_file(tiny_llama / "model.safetensors")
    assert all(torch.equal(kept[name], original[name]) for name in norms)
    assert not all(torch.equal(changed[name], original[name]) for name in norms)


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_memory_budget_changes_nothing(method: str, tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    """With too little memory to keep states between stages, every stage runs again from the block's input."""
    _quantize(tiny_llama, tmp_path / "kept", calibration_file, memory=2**33, method=method)
    _quantize(tiny_llama, tmp_path / "again", calibration_file, memory=2**20, method=method)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("kept", "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def _reported_as_stored(source: Path, result: QuantizeResult) -> bool:
    """Whether the weight errors reported are those of the weights in the file."""
    with open_checkpoint(source) as dense, open_checkpoint(result.out) as quantized:
        plan = module_plan(quantized)
        for report in result.modules:
            weight = dense.read(f"{report.name}.weight").double()
            moved = read_dense(quantized, plan, f"{report.name}.weight").double() - weight
            if report.weight_error != pytest.approx(float(moved.norm() / weight.norm()), rel=1e-3):
                return False
    return True


def test_a_block_is_tuned_as_a_whole(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    """Learned rounding goes on from where a solver ended, scaled or not; twice the same, whatever the memory."""
    settings: dict[str, Any] = {"bits": 2, "samples": 120, "symmetric": False, "group_size": 64}
    for transform in ("none", "awq"):
        _quantize(tiny_llama, tmp_path / "gptq", calibration_file, transform=transform, overwrite=True, **settings)
        recipe = Recipe(method="autoround", options={"steps": 40, "start": "gptq"}, transform=transform)
        for name, memory in (("tuned", 2**33), ("again", 2**20)):
            given = settings | {"recipe": recipe, "memory": memory, "overwrite": True}
            result = _quantize(tiny_llama, tmp_path / name, calibration_file, **given)
        assert transform == "awq" or _reported_as_stored(tiny_llama, result)
        divergence = {n: _divergence(tiny_llama, tmp_path / n, calibration_file) for n in ("gptq", "tuned")}
        assert divergence["tuned"] < divergence["gptq"]
        a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "again"))
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("method", "scheme", "fmt", "pruner"),
    [
        ("gptq", "W4A16", "compressed-tensors", None),
        ("gptaq", "W4A16_ASYM", "compressed-tensors", "wanda"),
        ("rtn", "dense", "dense", "sparsegpt"),
        ("rtn", "dense", "dense", "magnitude"),
    ],
)
def test_pruned_weights_reach_the_file(
    method: str, scheme: str, fmt: str, pruner: str | None, tiny_llama: Path, calibration_file: Path, tmp_path: Path
) -> None:
    """Two of every four weights are zero in the file, quantized or not, and the report says so."""
    settings = {"group_size": None if scheme == "dense" else 64, "scheme": scheme, "format": fmt}
    result = _quantize(
        tiny_llama, tmp_path / "out", calibration_file, method=method, sparsity="2:4", pruner=pruner, **settings
    )
    for report in result.modules:
        assert report.zeros is not None
        assert report.zeros >= 0.5
    with open_checkpoint(tmp_path / "out") as checkpoint:
        plan = module_plan(checkpoint)
        assert bool(plan) == (scheme != "dense")
        for report in result.modules:
            weight = read_dense(checkpoint, plan, f"{report.name}.weight").float()
            assert ((weight == 0).reshape(len(weight), -1, 4).sum(2) >= 2).all()
    assert result.linear_bits_per_weight == (32 if scheme == "dense" else pytest.approx(4.25, abs=0.1))
    if scheme == "dense":
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_starved_experts_are_rounded_and_reported(
    new_checkpoint: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """Eight tokens choose two experts each: of sixteen, some are never chosen."""
    source = new_checkpoint(tmp_path / "source", "mixtral", num_local_experts=16)
    result = _quantize(source, tmp_path / "out", calibration_file, method="gptq", samples=1, seq_len=8)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert len(manifest.expert_coverage) == 32
    starved = {name.rpartition(".")[0] for name in result.starved}
    assert starved
    assert starved == {name for name, count in manifest.expert_coverage.items() if count == 0}
    methods = {report.name: report.method for report in result.modules}
    assert {methods[name] for name in result.starved} == {"rtn"}
    assert {method for name, method in methods.items() if name not in result.starved} == {"gptq"}
    assert any("too few calibration tokens" in note for note in result.notes)


def test_every_expert_may_see_every_token(
    new_checkpoint: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    """No expert starves, whatever the router chose, and what the model computes is still the router's choice."""
    source = new_checkpoint(tmp_path / "source", "mixtral", num_local_experts=16)
    result = _quantize(source, tmp_path / "out", calibration_file, samples=1, seq_len=8, all_experts=True)
    assert not result.starved
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.recipe["all_experts"] is True
    assert set(manifest.expert_coverage.values()) == {8}
    outputs = []
    with open_checkpoint(source) as checkpoint:
        model = StreamedModel(checkpoint)
        hidden = model.embed(torch.arange(3, 27)[None])
        for all_tokens in (False, True):
            block = model.load_block(0)
            for module in block.modules():
                if isinstance(module, UnfusedExperts):
                    module.all_tokens = all_tokens
                    module.stage_point = lambda kind, inputs: [inputs[name] for name in inputs].clear()
            outputs.append(model.run_block(block, 0, hidden))
    assert torch.equal(outputs[0], outputs[1])


def test_each_expert_may_have_its_own_bits(
    checkpoint_of: Callable[[str], Path], calibration_file: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rules: [{pattern: '.*experts\\.0\\..*', bits: 8}]")
    _quantize(checkpoint_of("qwen3_moe"), tmp_path / "out", calibration_file, recipe=recipe)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        plan = module_plan(checkpoint)
    bits = {name: entry.spec.bits for name, entry in plan.items()}
    assert {b for name, b in bits.items() if ".experts.0." in name} == {8}
    assert {b for name, b in bits.items() if ".experts.1." in name} == {4}
    assert not any(name.startswith(("lm_head", "model.embed_tokens")) or name.endswith("mlp.gate") for name in bits)
    recipe.write_text("rules: [{pattern: '.*mlp\\.gate$', bits: 8}]")
    with pytest.raises(UsageError, match="matches no module"):
        _quantize(checkpoint_of("qwen3_moe"), tmp_path / "refused", calibration_file, recipe=recipe)


def test_manifest_tells_what_was_done(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    result = _quantize(tiny_llama, tmp_path / "out", calibration_file, method="gptq")
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.calibration is not None
    assert manifest.calibration["samples"] == 8
    assert set(manifest.modules) == {report.name for report in result.modules}
    module = manifest.modules["model.layers.0.mlp.down_proj"]
    assert module["spec"] == "int4-g64-sym"
    assert 0 < module["error"] < 0.1
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert result.linear_bits_per_weight == pytest.approx(4 + 16 / 64)


def test_rules_reach_the_files(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "method: gptq\nbits: 4\ngroup_size: 64\nrules:\n  - pattern: '.*down_proj'\n    bits: 8\n    method: rtn\n"
        "skip: ['model\\.layers\\.0\\.self_attn.*']\n"
    )
    _quantize(tiny_llama, tmp_path / "out", calibration_file, recipe=recipe, group_size=None)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        plan = module_plan(checkpoint)
    assert plan["model.layers.0.mlp.down_proj"].spec.bits == 8
    assert plan["model.layers.1.mlp.up_proj"].spec.bits == 4
    assert not any("layers.0.self_attn" in name for name in plan)
    assert any("layers.1.self_attn" in name for name in plan)
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "lm_head" in ignored
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_static_ordering_needs_no_g_idx(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    _quantize(tiny_llama, tmp_path / "out", calibration_file, method="gptq", ordering="static", format="gptq")
    with open_checkpoint(tmp_path / "out") as checkpoint:
        index = checkpoint.read("model.layers.0.mlp.down_proj.g_idx")
    assert torch.equal(index, torch.arange(256, dtype=torch.int32) // 64)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"group_size": 48}, UnsupportedError, r"model\.layers\.0.*48 does not divide.*use"),
        ({"bits": 9}, UsageError, "bits must be 2 to 8"),
        ({"bits": 3, "format": "awq"}, UnsupportedError, "4 bits"),
        ({"method": "gtpq"}, UsageError, "gptq"),
        ({"sparsity": "4:2"}, UsageError, "sparsity"),
        ({"sparsity": "2:4", "pruner": "wander"}, UsageError, "wanda"),
        ({"pruner": "wanda"}, UsageError, "--sparsity"),
        ({"sparsity": "2:4", "method": "autoround"}, UnsupportedError, "gptq"),
        ({"sparsity": "2:4", "scheme": "int4-g64-affine", "method": "rtn"}, UnsupportedError, "zero"),
        ({"scheme": "dense", "group_size": None}, UsageError, "--sparsity"),
        ({"rotate": "givens"}, UsageError, "hadamard"),
        ({"scheme": "dense", "format": "gptq", "sparsity": "2:4", "group_size": None}, UnsupportedError, "dense"),
        ({"transform": "akq"}, UsageError, "awq"),
        ({"format": "gguff"}, UsageError, "unknown format"),
        ({"skip": ["down_proj"]}, UsageError, "matches no module"),
        ({"smaples": 3}, UsageError, "samples"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    settings: dict[str, Any],
    error: type[Exception],
    match: str,
    tiny_llama: Path,
    calibration_file: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=match):
        _quantize(tiny_llama, tmp_path / "out", calibration_file, **settings)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_refused(
    new_checkpoint: Callable[..., Path], calibration_file: Path, tmp_path: Path
) -> None:
    source = new_checkpoint(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight.*not finite"):
        _quantize(source, tmp_path / "out", calibration_file)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_quantizing_again_dequantizes_first(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    _quantize(tiny_llama, tmp_path / "eight", calibration_file, method="rtn", bits=8)
    _quantize(tmp_path / "eight", tmp_path / "four", calibration_file, method="rtn", bits=4, format="gptq")
    with open_checkpoint(tmp_path / "four") as checkpoint:
        plan = module_plan(checkpoint)
        assert {entry.spec.bits for entry in plan.values()} == {4}
        assert not any(name.endswith("weight_packed") for name in checkpoint.tensors)
