"""AWQ tensors against a per-nibble reading of the GEMM layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowbit.codecs import AwqCodec
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats import IntSpec

CODEC = AwqCodec()


def naive_weight(t: dict[str, torch.Tensor], group_size: int) -> torch.Tensor:
    """Nibble i of word c holds output channel 8c + order[i]."""
    columns, eighth = t["qweight"].shape
    weight = torch.empty(eighth * 8, columns)
    for i in range(columns):
        group = i // group_size if group_size > 0 else 0
        for c in range(eighth):
            for nibble, channel in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                o = 8 * c + channel
                code = int(t["qweight"][i, c]) >> (4 * nibble) & 15
                zero = int(t["qzeros"][group, c]) >> (4 * nibble) & 15
                weight[o, i] = (code - zero) * float(t["scales"][group, o])
    return weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, -1])
def test_layout(make_quantized: Any, symmetric: bool, group_size: int) -> None:
    spec = IntSpec(4, group_size, symmetric)
    q = make_quantized(spec, 24, 48)
    tensors = CODEC.encode(q)
    groups = spec.groups(48)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        "qweight": (torch.int32, (48, 3)),
        "qzeros": (torch.int32, (groups, 3)),
        "scales": (torch.float16, (groups, 24)),
    }
    assert torch.equal(naive_weight(tensors, group_size), q.dequantize())
    if symmetric:
        assert {word & 0xFFFFFFFF for word in tensors["qzeros"].flatten().tolist()} == {0x88888888}
    back = CODEC.decode(tensors, spec, q.shape)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.dequantize(), q.dequantize())
    assert (back.zero_points is None) == symmetric
    assert tensors.keys() == CODEC.local_names(spec)


def test_zero_points_other_than_8_contradict_symmetry(make_quantized: Any) -> None:
    q = make_quantized(IntSpec(4, 16, symmetric=False), 24, 48)
    with pytest.raises(CheckpointError, match="symmetric"):
        CODEC.decode(CODEC.encode(q), IntSpec(4, 16), q.shape)


def test_config_is_read_back(make_quantized: Any) -> None:
    plan = {"model.layers.0.a": IntSpec(4, 16), "model.layers.0.b": IntSpec(4, 16, symmetric=False)}
    headers = {
        f"{name}.{local}": tensor
        for name, spec in plan.items()
        for local, tensor in CODEC.encode(make_quantized(spec, 24, 48)).items()
    }
    config = CODEC.config(plan, ["lm_head"])
    assert config == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 16,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }
    legacy = {"w_bit": 4, "q_group_size": 16, "zero_point": True, "version": "GEMM"}
    for written in (config, legacy):
        found = CODEC.read_plan(written, headers)
        assert {n: (m.spec, m.shape) for n, m in found.items()} == {
            name: (IntSpec(4, 16, symmetric=False), (24, 48)) for name in plan
        }
    symmetric = CODEC.read_plan({**config, "zero_point": False}, headers)
    assert all(entry.spec.symmetric for entry in symmetric.values())
    with pytest.raises(CheckpointError, match="disagree"):
        CODEC.read_plan({**config, "group_size": 32}, headers)
    with pytest.raises(UnsupportedError, match="gemv_fast"):
        CODEC.read_plan({**config, "version": "gemv_fast"}, headers)


def test_what_one_config_cannot_say_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="one group size"):
        CODEC.config({"a": IntSpec(4, 64), "b": IntSpec(4, 128)}, [])
    with pytest.raises(UnsupportedError, match=r"mlp\.gate_proj for dense"):
        CODEC.config({"model.layers.0.mlp.gate_proj": IntSpec(4)}, ["model.layers.0.mlp.gate"])


@pytest.mark.parametrize(
    ("spec", "shape", "reason"),
    [
        (IntSpec(3, 32), (32, 64), "use 4 bits"),
        (IntSpec(4, 56), (32, 64), "use group size 64"),
        (IntSpec(4, 0), (32, 64), "per channel"),
        (IntSpec(4, 32), (30, 64), "30 is no multiple"),
        (IntSpec(4, 32, scale_dtype=torch.float32), (32, 64), "float16"),
    ],
)
def test_refusals_name_the_way_out(spec: IntSpec, shape: tuple[int, int], reason: str) -> None:
    (found,) = CODEC.supports(spec, shape)
    assert reason in found
