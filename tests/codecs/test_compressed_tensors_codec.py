"""compressed-tensors codec against the installed package: its compressor, its config classes, its matching."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import match_targets

from lowbit.codecs import CODECS, CompressedTensorsCodec
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats import IntSpec, QuantizedTensor
from lowbit.formats.bits import pack_sparse

CODEC = CompressedTensorsCodec()
SPECS = [
    IntSpec(bits, group_size, symmetric)
    for bits in range(2, 9)
    for group_size in (32, -1)
    for symmetric in (True, False)
] + [IntSpec(4, 0), IntSpec(8, 0, scale_dtype=torch.bfloat16), IntSpec(4, 32, scale_dtype=torch.float32)]


def scheme_of(spec: IntSpec) -> QuantizationScheme:
    (group,) = CODEC.config({"a": spec}, [])["config_groups"].values()
    return QuantizationScheme.model_validate(group)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_package_decompresses_to_the_same_weights(make_quantized: Any, spec: IntSpec) -> None:
    q: QuantizedTensor = make_quantized(spec, 24, 96)
    tensors = CODEC.encode(q)
    assert tensors.keys() == CODEC.local_names(spec)
    assert set(PackedQuantizationCompressor.compression_param_names(scheme_of(spec))) == tensors.keys()
    theirs = PackedQuantizationCompressor.decompress(tensors, scheme_of(spec))["weight"]
    assert torch.equal(theirs, q.dequantize(spec.scale_dtype))
    back = CODEC.decode(tensors, spec, q.shape)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scales, q.scales)
    assert spec.symmetric or torch.equal(back.zero_points, q.zero_points)


@pytest.mark.parametrize(
    "spec", [spec for spec in SPECS if spec.scale_dtype == torch.float32 or spec.bits in (3, 4, 8)], ids=str
)
def test_what_the_package_compresses_is_read(make_quantized: Any, spec: IntSpec) -> None:
    spec = spec.with_scale_dtype(torch.float32)
    q: QuantizedTensor = make_quantized(spec, 24, 96)
    state = {"weight": q.dequantize(), "weight_scale": q.scales if spec.group_size else q.scales.flatten()}
    if q.zero_points is not None:
        state["weight_zero_point"] = (q.zero_points.to(torch.int16) - spec.midpoint).to(torch.int8)
    compressed = PackedQuantizationCompressor.compress(state, scheme_of(spec))
    headers = {f"model.layers.0.up.{name}": tensor for name, tensor in compressed.items()}
    plan = CODEC.read_plan(CODEC.config({"model.layers.0.up": spec}, []), headers)
    assert (plan["model.layers.0.up"].spec, plan["model.layers.0.up"].shape) == (spec, (24, 96))
    back = plan["model.layers.0.up"].codec.decode(compressed, spec, (24, 96))
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.dequantize(), q.dequantize())


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packing_of_old_versions_is_recognised(make_quantized: Any, bits: int, symmetric: bool) -> None:
    q: QuantizedTensor = make_quantized(IntSpec(bits, 64, symmetric), 256, 256)
    tensors = CODEC.encode(q)
    tensors["weight_packed"] = pack_sparse(q.codes, bits)
    if q.zero_points is not None:
        tensors["weight_zero_point"] = pack_sparse(q.zero_points, bits, 0)
    headers = {f"m.{name}": tensor for name, tensor in tensors.items()}
    entry = CODEC.read_plan(CODEC.config({"m": q.spec}, []), headers)["m"]
    back = entry.codec.decode(tensors, entry.spec, entry.shape)
    assert torch.equal(back.dequantize(), q.dequantize())


@pytest.mark.parametrize(("bits", "group_size"), [(8, -1), (8, 0), (4, 32)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_weights_are_read(make_quantized: Any, bits: int, group_size: int, symmetric: bool) -> None:
    spec = IntSpec(bits, group_size, symmetric)
    q: QuantizedTensor = make_quantized(spec, 16, 64)
    signed = q.codes.to(torch.int16) - spec.midpoint
    tensors = {"weight": signed.to(torch.int8), "weight_scale": q.scales.flatten() if group_size == 0 else q.scales}
    if q.zero_points is not None:
        tensors["weight_zero_point"] = (q.zero_points.to(torch.int16) - spec.midpoint).to(torch.int8)
    config = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": symmetric,
                    "strategy": {-1: "channel", 0: "tensor"}.get(group_size, "group"),
                    "group_size": group_size or None,
                },
                "input_activations": {"num_bits": 8, "dynamic": True, "strategy": "token"},
            }
        },
    }
    headers = {f"m.{name}": tensor for name, tensor in tensors.items()}
    entry = CODEC.read_plan(config, headers)["m"]
    assert (entry.spec, entry.shape) == (spec, (16, 64))
    back = entry.codec.decode(tensors, spec, (16, 64))
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.dequantize(), q.dequantize())
    if (group_size, symmetric) == (0, False):
        return  # read, not written: no engine has a zero point per tensor
    again = entry.codec.encode(q)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


PLAN = {
    f"model.layers.{i}.{name}": IntSpec(8 if name == "mlp.down_proj" and i in (0, 11) else 4, 32)
    for i in range(12)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.experts.0.w1", "mlp.experts.1.w1")
}


def test_config_of_one_spec() -> None:
    config = json.loads(json.dumps(CODEC.config({"model.layers.0.up": IntSpec(4, 128)}, ["lm_head"])))
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["ignore"] == ["lm_head"]
    theirs = QuantizationConfig.model_validate(config)
    weights = theirs.config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (4, 128, True)
    assert config["config_groups"]["group_0"]["weights"].keys() <= {
        *("num_bits", "type", "symmetric", "group_size", "strategy", "dynamic", "actorder"),
        *("observer", "observer_kwargs", "block_structure"),
    }
    assert CODEC.config({"a.0.b": IntSpec(4)}, [])["ignore"] == ["lm_head"]
    assert CODEC.config({"a.0.b": IntSpec(4)}, ["embed_out"])["ignore"] == ["embed_out"]
    assert CODEC.config({"a.0.b": IntSpec(4), "lm_head": IntSpec(4)}, [])["ignore"] == []
    assert CODEC.config({}, ["lm_head"]) == {}


def test_mixed_specs_are_groups_of_names() -> None:
    config = json.loads(json.dumps(CODEC.config(PLAN, ["lm_head", "model.layers.0.mlp.gate"])))
    assert config["ignore"] == ["lm_head", "model.layers.0.mlp.gate"]
    groups = QuantizationConfig.model_validate(config).config_groups
    assert len(groups) == 2
    linear = torch.nn.Linear(1, 1)
    for name, spec in PLAN.items():
        bits = [g.weights.num_bits for g in groups.values() if match_targets(name, linear, g.targets)]
        assert bits == [spec.bits], name
    for group in groups.values():
        assert not match_targets("model.layers.0.mlp.gate", linear, group.targets)
        assert not match_targets("lm_head", linear, group.targets)
        assert len(group.targets) <= 5


def test_mixed_plan_is_read_back(make_quantized: Any) -> None:
    headers = {
        f"{name}.{local}": tensor
        for name, spec in PLAN.items()
        for local, tensor in CODEC.encode(make_quantized(spec, 8, 64)).items()
    }
    found = CODEC.read_plan(CODEC.config(PLAN, []), headers)
    assert {name: entry.spec for name, entry in found.items()} == PLAN
    two = {"model.layers.0.a": IntSpec(4, 32), "model.layers.10.a": IntSpec(8, -1)}
    (first, second) = CODEC.config(two, [])["config_groups"].values()
    assert (first["targets"], second["targets"]) == (["model.layers.0.a"], ["model.layers.10.a"])


def test_presets_by_name(make_quantized: Any) -> None:
    q = make_quantized(IntSpec(4, 128, symmetric=False), 8, 256)
    headers = {f"m.{name}": tensor for name, tensor in CODEC.encode(q).items()}
    config = {"format": "pack-quantized", "config_groups": {"W4A16_ASYM": ["Linear"]}}
    assert CODEC.read_plan(config, headers)["m"].spec == q.spec
    with pytest.raises(UnsupportedError, match="no way to store nvfp4"):
        CODEC.read_plan({"format": "nvfp4-pack-quantized", "config_groups": {"NVFP4": ["Linear"]}}, headers)
    with pytest.raises(UnsupportedError, match="MXFP6"):
        CODEC.read_plan({"format": "mxfp6-pack-quantized", "config_groups": {"MXFP6A16": ["Linear"]}}, headers)


def test_unreadable_variants_are_refused(make_quantized: Any) -> None:
    q = make_quantized(IntSpec(4, 32), 8, 64)
    headers = {f"m.{name}": tensor for name, tensor in CODEC.encode(q).items()}
    config = CODEC.config({"m": q.spec}, [])
    with pytest.raises(UnsupportedError, match="rotated"):
        CODEC.read_plan({**config, "transform_config": {"config_groups": {"R1": {}}}}, headers)
    with pytest.raises(UnsupportedError, match="sparse"):
        CODEC.read_plan({**config, "sparsity_config": {"format": "sparse-24-bitmask"}}, headers)
    group = config["config_groups"]["group_0"]
    floats = {**group, "weights": {**group["weights"], "type": "float"}}
    with pytest.raises(UnsupportedError, match="4-bit float weights"):
        CODEC.read_plan({**config, "config_groups": {"g": floats}}, headers)
    with pytest.raises(CheckpointError, match="no group"):
        CODEC.read_plan({**config, "config_groups": {"g": {**group, "targets": ["re:^other$"]}}}, headers)
    with pytest.raises(CheckpointError, match="config_groups"):
        CODEC.read_plan({**config, "config_groups": {}}, headers)
    eight = {**group, "weights": {**group["weights"], "num_bits": 8}}
    with pytest.raises(CheckpointError, match="disagree"):
        CODEC.read_plan({**config, "config_groups": {"g": eight}}, headers)


def test_activation_order_is_read_and_not_written(make_quantized: Any) -> None:
    q = make_quantized(IntSpec(4, 32), 8, 64)
    tensors = CODEC.encode(q) | {"weight_g_idx": (torch.arange(64) % 2).to(torch.int32)}
    back = CODEC.decode(tensors, q.spec, q.shape)
    expected = (q.codes.float() - 8) * q.scales.float()[:, torch.arange(64) % 2]
    assert torch.equal(back.dequantize(), expected)
    with pytest.raises(UnsupportedError, match="g_idx"):
        CODEC.encode(back)


def test_refusals_name_the_way_out() -> None:
    (reason,) = CODEC.supports(IntSpec(4, 0, symmetric=False), (8, 64))
    assert "--sym" in reason
    (reason,) = CODEC.supports(IntSpec(4, 128), (8, 96))
    assert "use group size 32" in reason
    (reason,) = CODEC.supports(IntSpec(4, 128), (8, 100))
    assert "per channel" in reason
    assert CODECS["compressed-tensors"].supports(IntSpec(5, -1), (7, 33)) == []
