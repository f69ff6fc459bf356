"""Inspection and verification of tiny checkpoints, whole ones and ones damaged in every way that has a name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lowbit.checkpoint import Manifest, hash_file, update_quality, write_manifest
from lowbit.codecs import CODECS
from lowbit.errors import CheckpointError
from lowbit.evaluation.footprint import kind_of, measure
from lowbit.evaluation.inspect import inspect_checkpoint
from lowbit.evaluation.verify import Verification, verify_checkpoint
from lowbit.formats import IntSpec, QuantizedTensor

SPEC = IntSpec(4, 32)


def sign(path: Path, modules: dict[str, dict[str, Any]]) -> None:
    """Give a directory a manifest that vouches for its files."""
    files = {file.name: hash_file(file) for file in sorted(path.iterdir()) if file.name != "lowbit.json"}
    write_manifest(
        path, Manifest("f" * 64, "0.1.0", {"id": "tiny"}, {"method": "rtn", "bits": 4}, modules=modules, files=files)
    )


def quantize(source: Path, target: Path, codec_name: str, *, sharded: bool = False) -> Path:
    """Round every linear of a checkpoint to the nearest of 16 levels, store it in the format, and sign it."""
    shutil.copytree(source, target)
    codec, tensors, plan = CODECS[codec_name], {}, {}
    symmetric = codec_name != "awq"
    for name, weight in load_file(source / "model.safetensors").items():
        if weight.dim() != 2 or "layers." not in name:
            tensors[name] = weight
            continue
        module = name.removesuffix(".weight")
        groups = weight.float().unflatten(1, (-1, 32))
        scales = (groups.abs().amax(-1) / 7).half()
        codes = ((groups / scales[..., None].float()).round() + 8).clamp(0, 15).flatten(1).to(torch.uint8)
        zeros = None if symmetric else torch.full(scales.shape, 8, dtype=torch.uint8)
        plan[module] = IntSpec(4, 32, symmetric)
        for local, tensor in codec.encode(QuantizedTensor(plan[module], codes, scales, zeros)).items():
            tensors[f"{module}.{local}"] = tensor
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = codec.config(plan, ["lm_head"])
    (target / "config.json").write_text(json.dumps(config))
    if sharded:
        (target / "model.safetensors").unlink()
        names = sorted(tensors)
        weight_map = {}
        for index, part in enumerate((names[::2], names[1::2]), start=1):
            file = f"model-{index:05d}-of-00002.safetensors"
            save_file({name: tensors[name].contiguous() for name in part}, target / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index_text = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
        (target / "model.safetensors.index.json").write_text(index_text)
    else:
        save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    sign(target, {module: {"spec": str(spec), "method": "rtn"} for module, spec in plan.items()})
    return target


@pytest.fixture(scope="module")
def quantized(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed gptq checkpoint. Read only."""
    return quantize(tiny_llama, tmp_path_factory.mktemp("signed") / "model", "gptq")


def errors(result: Verification) -> list[str]:
    return [f"{finding.where}: {finding.message}" for finding in result.findings if finding.severity == "error"]


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a checkpoint and take away the manifest that would tell."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "lowbit.json").unlink(missing_ok=True)


@pytest.fixture
def copy(quantized: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(quantized, tmp_path / "copy"))


# ---- whole checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["gptq", "awq", "compressed-tensors"])
def test_a_whole_checkpoint_of_each_format(codec: str, tiny_llama: Path, tmp_path: Path) -> None:
    path = quantize(tiny_llama, tmp_path / "model", codec, sharded=True)
    verification = verify_checkpoint(path)
    assert verification.findings == ()
    assert verification.ok
    assert verification.modules == 14
    result = inspect_checkpoint(path)
    assert result.format == codec
    assert result.architecture == "LlamaForCausalLM"
    assert result.specs == {f"int4-g32-{'asym' if codec == 'awq' else 'sym'}": 14}
    assert result.tokenizer
    assert [problem.severity for problem in result.problems] == ["note"]
    assert 4.5 <= result.linear_bits_per_weight < 5.2
    assert result.kinds["attention"].bits_per_weight == pytest.approx(result.kinds["mlp"].bits_per_weight, abs=0.3)
    assert result.kinds["embedding"].bits_per_weight == 32
    assert sum(part.parameters for part in result.kinds.values()) == result.parameters
    assert sum(part.bytes for part in result.kinds.values()) == result.size_bytes
    assert result.parameters == sum(t.numel() for t in load_file(tiny_llama / "model.safetensors").values())
    update_quality(path, {"kl_divergence": 0.01})
    assert inspect_checkpoint(path).certificate == {"kl_divergence": 0.01}
    assert inspect_checkpoint(path).problems == ()
    assert json.dumps(inspect_checkpoint(path).to_json())
    assert json.dumps(verification.to_json())


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox", "opt", "mixtral", "qwen3_moe"])
def test_a_dense_checkpoint_of_each_family(model_type: str, checkpoint_of: Callable[[str], Path]) -> None:
    path = checkpoint_of(model_type)
    assert errors(verify_checkpoint(path)) == []
    assert "no lowbit.json" in verify_checkpoint(path).findings[0].message
    result = inspect_checkpoint(path)
    assert (result.format, result.bits_per_weight, result.linear_bits_per_weight) == ("dense", 32, 32)
    assert result.model_type == model_type
    assert "other" not in result.kinds
    assert {"embedding", "attention", "norm"} <= set(result.kinds)
    assert ("experts" in result.kinds) == (model_type in ("mixtral", "qwen3_moe")) == ("router" in result.kinds)


# ---- damage ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_found(data: st.DataObject, quantized: Path) -> None:
    files = sorted(file for file in quantized.iterdir() if file.name != "lowbit.json")
    file = data.draw(st.sampled_from(files))
    bit = data.draw(st.integers(0, 8 * file.stat().st_size - 1))
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        byte = opened.read(1)[0]
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))
    try:
        result = verify_checkpoint(quantized)
    finally:
        with file.open("r+b") as opened:
            opened.seek(bit // 8)
            opened.write(bytes([byte]))
    assert not result.ok
    assert any(finding.where == file.name and "sha256" in finding.message for finding in result.findings)


def test_missing_truncated_and_added_files(copy: Path) -> None:
    (copy / "tokenizer_config.json").unlink()
    (copy / "modeling_evil.py").write_text("print('hello')")
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    result = verify_checkpoint(copy)
    found = {(finding.where, finding.severity) for finding in result.findings}
    assert {
        ("tokenizer_config.json", "error"),
        ("model.safetensors", "error"),
        ("modeling_evil.py", "warning"),
        ("copy", "error"),
    } <= found
    assert any("truncated" in message for message in errors(result))
    inspection = inspect_checkpoint(copy)
    assert inspection.format == "gptq"
    assert inspection.architecture == "LlamaForCausalLM"
    assert any("truncated" in problem.message for problem in inspection.problems)


def test_a_missing_shard(tiny_llama: Path, tmp_path: Path) -> None:
    path = quantize(tiny_llama, tmp_path / "model", "gptq", sharded=True)
    (path / "model-00002-of-00002.safetensors").unlink()
    assert any("shard is missing" in message for message in errors(verify_checkpoint(path)))
    assert any("shard is missing" in problem.message for problem in inspect_checkpoint(path).problems)


MODULE = "model.layers.1.mlp.up_proj"


def nan_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}.scales"][1, 3] = torch.nan


def nan_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"][5] = torch.inf


def short_scales(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}.scales"] = tensors[f"{MODULE}.scales"][:-1].contiguous()


def no_codes(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{MODULE}.qweight"]


def no_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.input_layernorm.weight"]


def narrow_norm(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.input_layernorm.weight"
    tensors[name] = tensors[name][:-1].contiguous()


def short_embedding(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-1].contiguous()


def wild_group(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{MODULE}.g_idx"][0] = 99


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (nan_scale, MODULE),
        (nan_norm, "model.norm.weight"),
        (short_scales, MODULE),
        (no_codes, MODULE),
        (no_norm, "model.layers.0.input_layernorm.weight"),
        (narrow_norm, "model.layers.0.input_layernorm.weight"),
        (short_embedding, "model.embed_tokens.weight"),
        (wild_group, MODULE),
    ],
)
def test_damage_that_no_hash_tells(damage: Callable[[dict[str, torch.Tensor]], None], where: str, copy: Path) -> None:
    rewrite(copy, damage)
    found = errors(verify_checkpoint(copy))
    assert found
    assert any(where in message for message in found), found
    if damage is nan_scale:
        assert any(problem.severity == "error" for problem in inspect_checkpoint(copy).problems)


def test_values_that_are_strange_but_finite(copy: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{MODULE}.scales"][0, :2] = 0
        tensors["model.norm.weight"][0] = 1e9

    rewrite(copy, damage)
    result = verify_checkpoint(copy)
    warned = {finding.where: finding.message for finding in result.findings if finding.severity == "warning"}
    assert result.ok
    assert "2 of" in warned[MODULE]
    assert "implausible" in warned["model.norm.weight"]


def test_a_manifest_that_tells_another_story(copy: Path) -> None:
    sign(copy, {MODULE: {"spec": "int8-g32-sym"}, "model.layers.7.mlp.up_proj": {"spec": "int4-g32-sym"}})
    found = errors(verify_checkpoint(copy))
    assert any("int8-g32-sym" in message for message in found)
    assert any("model.layers.7" in message for message in found)
    (copy / "lowbit.json").write_text("{")
    assert any("lowbit.json" in message for message in errors(verify_checkpoint(copy)))
    assert any(problem.where == "lowbit.json" for problem in inspect_checkpoint(copy).problems)


def test_a_tokenizer_that_is_missing_or_too_large(tiny_llama: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    for file in path.glob("tokenizer*"):
        file.unlink()
    assert any("tokenizer missing" in finding.message for finding in verify_checkpoint(path).findings)
    assert any("tokenizer missing" in problem.message for problem in inspect_checkpoint(path).problems)
    shutil.copy(tiny_llama / "tokenizer.json", path)
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    extra = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer["added_tokens"] += [{"id": 320 + i, "content": f"<extra{i}>", **extra} for i in range(3)]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert any("323 ids" in finding.message for finding in verify_checkpoint(path).findings)


def test_what_is_no_checkpoint_at_all(tmp_path: Path) -> None:
    for check in (inspect_checkpoint, verify_checkpoint):
        with pytest.raises(CheckpointError):
            check(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        inspect_checkpoint(tmp_path)
    assert not verify_checkpoint(tmp_path).ok


# ---- footprint ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("gpt_neox.embed_in.weight", "embedding"),
        ("transformer.wte.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("embed_out.weight", "head"),
        ("model.layers.3.input_layernorm.weight", "norm"),
        ("model.layers.3.self_attn.q_norm.weight", "norm"),
        ("model.decoder.final_layer_norm.bias", "norm"),
        ("transformer.h.0.ln_1.weight", "norm"),
        ("model.layers.3.self_attn.q_proj.qweight", "attention"),
        ("gpt_neox.layers.0.attention.query_key_value.bias", "attention"),
        ("model.layers.3.mlp.gate_proj.weight", "mlp"),
        ("model.decoder.layers.0.fc1.weight", "mlp"),
        ("model.layers.3.mlp.gate.weight", "router"),
        ("model.layers.0.block_sparse_moe.gate.weight", "router"),
        ("model.layers.0.block_sparse_moe.experts.7.w1.weight", "experts"),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", "experts"),
        ("model.layers.0.mlp.experts.gate_up_proj", "experts"),
        ("vision.patch.weight", "other"),
    ],
)
def test_kinds_of_tensors(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_footprint_counts_a_quantized_weight_once() -> None:
    module = "model.layers.0.mlp.up_proj"
    weight = QuantizedTensor(SPEC, torch.zeros(64, 128, dtype=torch.uint8), torch.ones(64, 4, dtype=torch.float16))
    tensors = {f"{module}.{name}": tensor for name, tensor in CODECS["compressed-tensors"].encode(weight).items()}
    tensors[f"{module}.bias"] = torch.zeros(64)
    tensors["model.norm.weight"] = torch.zeros(128, dtype=torch.bfloat16)
    size = measure(tensors, {module: weight})  # type: ignore[arg-type]
    packed = 64 * 128 // 2 + 64 * 4 * 2
    assert packed <= size.linear.bytes <= packed + 16
    assert size.linear.parameters == 64 * 128
    assert size.total.parameters == 64 * 128 + 64 + 128
    assert size.total.bytes == size.linear.bytes + 64 * 4 + 128 * 2
    assert asdict(size.kinds["norm"]) == {"parameters": 128, "bytes": 256, "formats": {"bfloat16": 128}}
