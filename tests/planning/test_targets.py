"""What is said of schemes with floats and quantized inputs before a run for an engine."""

from __future__ import annotations

import pytest

from lowbit.formats import PRESETS
from lowbit.planning.modules import PlannedModule
from lowbit.planning.targets import Placement, check_target, parse_target

CASES = [
    ("W8A8", "vllm", set(), ""),
    ("W8A8", "vllm-cpu", {"info"}, "measured in vllm-cpu"),
    ("W8A8_STATIC", "vllm-cpu", {"info"}, "measured in vllm-cpu"),
    ("FP8_DYNAMIC", "vllm", {"info"}, "8.9"),
    ("FP8_BLOCK", "vllm-cpu", {"error"}, "W8A8"),
    ("NVFP4", "vllm", {"info"}, "10.0"),
    ("NVFP4A16", "vllm-cpu", {"error"}, "no kernel"),
    ("MXFP8", "vllm", {"info"}, "Blackwell"),
    ("W4A8", "vllm", {"warning"}, "Humming"),
    ("W4AFP8", "vllm", {"info"}, "9.0"),
    ("W4A8", "vllm-cpu", {"error"}, "W8A8"),
]


@pytest.mark.parametrize(("scheme", "engine", "levels", "told"), CASES)
def test_schemes(scheme: str, engine: str, levels: set[str], told: str) -> None:
    chosen = PRESETS[scheme]
    modules = (
        PlannedModule("model.layers.0.up", (256, 256), chosen.weights, "rtn", chosen.inputs),
        PlannedModule("model.layers.0.norm", (256, 256)),
    )
    found = check_target(parse_target(engine), Placement(modules, "compressed-tensors", 64))
    assert {finding.level for finding in found} == levels
    assert all("model.layers.0.up" in finding.message and "norm" not in finding.message for finding in found)
    assert told == "" or any(told in finding.message for finding in found)


def test_weights_alone_are_judged_as_before() -> None:
    modules = (PlannedModule("up", (256, 256), PRESETS["W8A8"].weights),)
    (finding,) = check_target(parse_target("vllm-cpu"), Placement(modules, "compressed-tensors", 64))
    assert finding.level == "error"
    assert "4-bit" in finding.message
