"""What packages are written down to do with inputs, beside lowbit's simulation: the same, or apart by a known rule."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lowbit.formats.activations import ActivationSpec, fake_quantize

sys.path.insert(0, str(Path(__file__).parent))
import package_rules

SCALE = torch.tensor([0.03125])


def _inputs() -> torch.Tensor:
    x = torch.randn(1, 24, 128, generator=torch.Generator().manual_seed(0))
    x[0, 3] *= 1000
    x[0, :, 17] *= 30
    return x


@pytest.mark.parametrize(
    ("scheme", "spec"),
    [
        ("W8A8_STATIC", ActivationSpec("int8", "tensor", dynamic=False)),
        ("FP8", ActivationSpec("e4m3", "tensor", dynamic=False)),
        ("FP8_DYNAMIC", ActivationSpec("e4m3")),
        ("MXFP4", ActivationSpec("e2m1", "group", group_size=32, scale="e8m0")),
    ],
)
def test_the_package_and_the_simulation_round_alike(scheme: str, spec: ActivationSpec) -> None:
    x = _inputs()
    theirs = package_rules.RULES[scheme](x, {"input_scale": SCALE})
    ours = fake_quantize(x, spec, None if spec.dynamic else SCALE)
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=0)


def test_int8_by_token_differs_by_the_step_alone() -> None:
    x = _inputs()
    largest = x.abs().amax(-1, keepdim=True)
    for rounded, steps in (
        (package_rules.integers_by_token(x, {}), 127.5),
        (fake_quantize(x, ActivationSpec("int8")), 127),
    ):
        codes = rounded / (largest / steps)
        assert float((codes - codes.round()).abs().max()) < 1e-3
        assert bool(((rounded - x).abs() <= largest / steps * 0.5001).all())


def test_outliers_are_apart_from_the_simulation_by_float16_alone() -> None:
    x = _inputs().to(torch.float16).float()
    theirs = package_rules.outliers_apart(x, {}) / (6.200124e-05 * 127**2)
    outliers = (x.abs() >= package_rules.THRESHOLD).any(-2, keepdim=True)
    ours = fake_quantize(x, ActivationSpec("int8", outliers=package_rules.THRESHOLD))
    torch.testing.assert_close(theirs.masked_fill(outliers, 0), ours.masked_fill(outliers, 0), rtol=1e-5, atol=0)
    assert bool(outliers.any())


def test_group_scales_of_nvfp4_are_left_in_floats() -> None:
    x = _inputs()
    spec = ActivationSpec("e2m1", "group", group_size=16, scale="e4m3")
    theirs = package_rules.nvfp4(x, {})
    largest = x.unflatten(-1, (-1, 16)).abs().amax(-1)
    # unrounded scales keep the largest of a group; those in E4M3 move it by up to a sixteenth
    torch.testing.assert_close(theirs.unflatten(-1, (-1, 16)).abs().amax(-1), largest)
    ours = fake_quantize(x, spec, torch.tensor([448 * 6 / float(x.abs().max())]))
    apart = (ours.unflatten(-1, (-1, 16)).abs().amax(-1) / largest - 1).abs()
    assert 0.01 < float(apart.max()) < 0.07
