"""GPTQ tensors against a per-element reading of the published layout; configs against how readers match them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from lowbit.codecs import CODECS, GptqCodec
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats import IntSpec, QuantizedTensor


def field(words: torch.Tensor, bits: int, index: int) -> int:
    """Element ``index`` of a dense little-endian bit stream of int32 words."""
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return stream >> (bits * index) & ((1 << bits) - 1)


def naive_weight(t: dict[str, torch.Tensor], bits: int, offset: int) -> torch.Tensor:
    """``scales[g, o] * (u - z)``, one element at a time."""
    columns, rows = t["g_idx"].numel(), t["scales"].shape[1]
    weight = torch.empty(rows, columns)
    for i in range(columns):
        group = int(t["g_idx"][i])
        for o in range(rows):
            code = field(t["qweight"][:, o], bits, i)
            zero = field(t["qzeros"][group], bits, o) + offset
            weight[o, i] = float(t["scales"][group, o]) * (code - zero)
    return weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("version", [1, 2])
def test_layout(make_quantized: Any, bits: int, group_size: int, version: int) -> None:
    spec = IntSpec(bits, group_size, symmetric=True)
    q = make_quantized(spec, 32, 64)
    tensors = GptqCodec(version).encode(q)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "qweight": (torch.int32, (64 * bits // 32, 32)),
        "qzeros": (torch.int32, (spec.groups(64), bits)),
        "scales": (torch.float16, (spec.groups(64), 32)),
        "g_idx": (torch.int32, (64,)),
    }
    assert torch.equal(naive_weight(tensors, bits, offset=2 - version), q.dequantize())
    assert tensors.keys() == GptqCodec(version).local_names(spec)


@pytest.mark.parametrize(
    ("bits", "v1", "v2"), [(4, 0x77777777, 0x88888888), (8, 0x7F7F7F7F, 0x80808080), (2, 0x55555555, 0xAAAAAAAA)]
)
def test_zero_points_of_symmetric_weights(make_quantized: Any, bits: int, v1: int, v2: int) -> None:
    q = make_quantized(IntSpec(bits, 32), 32, 32)
    for version, word in ((1, v1), (2, v2)):
        qzeros = GptqCodec(version).encode(q)["qzeros"]
        assert {value & 0xFFFFFFFF for value in qzeros.flatten().tolist()} == {word}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_asymmetric_reading(make_quantized: Any, bits: int, version: int) -> None:
    """Version 1 is read with zero points from 1, made here as version 2 with every stored field one lower."""
    spec = IntSpec(bits, 32, symmetric=False)
    q = make_quantized(spec, 32, 64, least_zero=1)
    lowered = q if version == 2 else replace(q, zero_points=q.zero_points - 1)
    tensors = GptqCodec(2).encode(lowered)
    assert torch.equal(naive_weight(tensors, bits, offset=2 - version), q.dequantize())
    back = GptqCodec(version).decode(tensors, spec, (32, 64))
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.zero_points, q.zero_points)
    assert torch.equal(back.dequantize(), q.dequantize())


def test_version_1_wraps_a_stored_all_ones_to_zero(make_quantized: Any) -> None:
    spec = IntSpec(4, 32, symmetric=False)
    q = make_quantized(spec, 32, 32)
    tensors = GptqCodec(2).encode(replace(q, zero_points=torch.full_like(q.zero_points, 15)))
    assert not GptqCodec(1).decode(tensors, spec, (32, 32)).zero_points.any()


def test_symmetric_reading_takes_either_version(make_quantized: Any) -> None:
    q = make_quantized(IntSpec(4, 32), 32, 64)
    for version in (1, 2):
        back = GptqCodec(1).decode(GptqCodec(version).encode(q), q.spec, q.shape)
        assert back.zero_points is None
        assert torch.equal(back.dequantize(), q.dequantize())
    tensors = GptqCodec(1).encode(q)
    tensors["qzeros"] = torch.zeros_like(tensors["qzeros"])
    with pytest.raises(CheckpointError, match="sym: true"):
        GptqCodec(1).decode(tensors, q.spec, q.shape)
    del tensors["qzeros"], tensors["g_idx"]
    assert torch.equal(GptqCodec(1).decode(tensors, q.spec, q.shape).codes, q.codes)


def test_activation_order_is_kept_and_plain_order_dropped(make_quantized: Any) -> None:
    q = make_quantized(IntSpec(4, 32), 32, 64)
    assert GptqCodec().decode(GptqCodec().encode(q), q.spec, q.shape).group_index is None
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    shuffled = replace(q, group_index=(order % 2).to(torch.int32))
    tensors = GptqCodec().encode(shuffled)
    assert torch.equal(naive_weight(tensors, 4, 1), shuffled.dequantize())
    back = GptqCodec().decode(tensors, q.spec, q.shape)
    assert torch.equal(back.dequantize(), shuffled.dequantize())
    tensors["g_idx"][3] = 2
    with pytest.raises(CheckpointError, match=r"outside 0\.\.1"):
        GptqCodec().decode(tensors, q.spec, q.shape)


@pytest.mark.parametrize(
    ("spec", "shape", "reason"),
    [
        (IntSpec(5, 32), (32, 64), "use 4 bits"),
        (IntSpec(7, 32), (32, 64), "use 8 bits"),
        (IntSpec(4, 128), (32, 320), "use group size 64"),
        (IntSpec(4, 100), (32, 128), "use group size 128"),
        (IntSpec(4, 0), (32, 64), "per channel"),
        (IntSpec(4, 32, symmetric=False), (32, 64), "compressed-tensors"),
        (IntSpec(4, 32, scale_dtype=torch.float32), (32, 64), "float16"),
        (IntSpec(4, -1), (32, 48), "48 is no multiple"),
        (IntSpec(4, 32), (40, 64), "40 is no multiple"),
    ],
)
def test_refusals_name_the_way_out(spec: IntSpec, shape: tuple[int, int], reason: str) -> None:
    (found,) = GptqCodec().supports(spec, shape)
    assert reason in found
    rows, columns = shape
    scales = torch.ones((1, 1) if spec.group_size == 0 else (rows, spec.groups(columns)), dtype=spec.scale_dtype)
    zeros = None if spec.symmetric else torch.ones_like(scales).to(torch.uint8)
    with pytest.raises(UnsupportedError, match=re.escape(reason)):
        GptqCodec().encode(QuantizedTensor(spec, torch.zeros(shape, dtype=torch.uint8), scales, zeros))


def test_damaged_tensors_are_refused(make_quantized: Any) -> None:
    q = make_quantized(IntSpec(4, 32), 32, 64)
    tensors = GptqCodec().encode(q)
    with pytest.raises(CheckpointError, match="scales is missing"):
        GptqCodec().decode({k: v for k, v in tensors.items() if k != "scales"}, q.spec, q.shape)
    with pytest.raises(CheckpointError, match=r"qweight has shape \(8, 16\)"):
        GptqCodec().decode(tensors | {"qweight": tensors["qweight"][:, :16]}, q.spec, q.shape)


def match_like_vllm(rules: dict[str, Any], name: str) -> dict[str, Any] | bool | None:
    """First rule that matches decides: False to skip, settings, or None for the base."""
    for pattern, settings in rules.items():
        if re.match(pattern[2:], name):
            return False if pattern.startswith("-:") else settings
    return None


LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate", "mlp.down_proj")


def test_mixed_plan_becomes_dynamic_rules() -> None:
    plan = {f"model.layers.{i}.{name}": IntSpec(4, 128) for i in range(12) for name in LINEARS}
    eight = [f"model.layers.{i}.mlp.down_proj" for i in (1, 11)]
    attention = [f"model.layers.3.self_attn.{name}_proj" for name in "qkv"]
    dense = [f"model.layers.{i}.mlp.gate" for i in range(12)]
    plan |= dict.fromkeys(eight, IntSpec(8, 128)) | dict.fromkeys(attention, IntSpec(4, 32))
    plan = {name: spec for name, spec in plan.items() if name not in dense}
    config = json.loads(json.dumps(CODECS["gptq"].config(plan, ["lm_head", *dense], details={"damp_percent": 0.01})))
    assert config["bits"], config["group_size"] == (4, 128)
    assert (config["sym"], config["desc_act"], config["lm_head"]) == (True, False, False)
    assert config["checkpoint_format"] == "gptq"
    assert config["meta"]["damp_percent"] == 0.01
    rules = config["dynamic"]
    assert len(rules) == 1 + 1 + 3 + 1
    for name, spec in plan.items():
        expected = None if spec == IntSpec(4, 128) else {"bits": spec.bits, "group_size": spec.group_size, "sym": True}
        assert match_like_vllm(rules, name) == expected, name
    for name in dense:
        assert match_like_vllm(rules, name) is False
    assert match_like_vllm(rules, "model.layers.3.self_attn.qkv_proj") == {"bits": 4, "group_size": 32, "sym": True}
    assert match_like_vllm(rules, "model.layers.4.self_attn.qkv_proj") is None
    assert "dynamic" not in CODECS["gptq"].config({"model.layers.0.a": IntSpec(4)}, ["lm_head"])
    assert CODECS["gptq"].config({}, ["lm_head"]) == {}


def test_rules_name_the_merged_experts() -> None:
    plan = {
        f"model.layers.{i}.mlp.experts.{e}.w{w}": IntSpec(8 if i == 1 or (i, e) == (2, 0) else 4, 128)
        for i in range(4)
        for e in range(4)
        for w in (1, 2, 3)
    }
    rules = CODECS["gptq"].config(plan, [])["dynamic"]
    eight = {"bits": 8, "group_size": 128, "sym": True}
    for name, spec in plan.items():
        assert match_like_vllm(rules, name) == (eight if spec.bits == 8 else None)
    assert [match_like_vllm(rules, f"model.layers.{i}.mlp.experts") for i in range(4)] == [None, eight, None, None]


def test_plan_survives_writing_and_reading(make_quantized: Any) -> None:
    plan = {
        "model.layers.0.mlp.experts.3.w1": IntSpec(4, 32),
        "model.layers.0.mlp.experts.4.w1": IntSpec(8, -1),
        "model.layers.1.mlp.experts.3.w1": IntSpec(4, 32),
        "model.layers.1.mlp.experts.4.w1": IntSpec(3, 64),
    }
    headers = {
        f"{name}.{local}": tensor
        for name, spec in plan.items()
        for local, tensor in CODECS["gptq"].encode(make_quantized(spec, 32, 64)).items()
    }
    config = CODECS["gptq"].config(plan, [])
    assert {n: (m.spec, m.shape) for n, m in GptqCodec().read_plan(config, headers).items()} == {
        name: (spec, (32, 64)) for name, spec in plan.items()
    }
    with pytest.raises(CheckpointError, match="config and weights disagree"):
        GptqCodec().read_plan({**config, "dynamic": {}}, headers)
    with pytest.raises(CheckpointError, match="regular expression"):
        GptqCodec().read_plan({**config, "dynamic": {"+:(": {}}}, headers)


@pytest.mark.parametrize("layout", ["gptq_p", "marlin", "bitblas"])
def test_other_layouts_are_refused(layout: str) -> None:
    with pytest.raises(UnsupportedError, match=layout):
        GptqCodec().read_plan({"bits": 4, "group_size": 128, "checkpoint_format": layout}, {})
