"""What holds for any weight, shape and format."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import NumericsError
from lowbit.formats import PER_CHANNEL, PER_TENSOR, IntSpec
from lowbit.quant import METHODS, AwqOptions, GptqOptions, InputStatistics, RtnOptions, search_scales
from lowbit.quant.factor import quadratic_form

SPECS = st.builds(
    IntSpec,
    bits=st.integers(2, 8),
    group_size=st.sampled_from([PER_CHANNEL, PER_TENSOR, 1, 3, 8, 16, 40]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
OPTIONS = st.one_of(
    st.builds(RtnOptions, range_method=st.sampled_from(["minmax", "mse", "gram"])),
    st.builds(
        GptqOptions,
        damping=st.sampled_from([0.001, 0.01, 0.1]),
        block_size=st.integers(1, 40),
        ordering=st.sampled_from(["none", "static"]),
        range_method=st.sampled_from(["minmax", "mse"]),
    ),
    st.builds(AwqOptions, clip=st.booleans(), steps=st.integers(1, 8), duo_scaling=st.booleans()),
)
NAMES = {RtnOptions: "rtn", GptqOptions: "gptq", AwqOptions: "awq"}


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, InputStatistics]:
    """Weights with zeros, constants and outliers; inputs with dead, equal and huge channels, sometimes too few rows."""
    rows, columns, tokens = draw(st.integers(1, 20)), draw(st.integers(1, 40)), draw(st.integers(1, 60))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, columns, generator=generator) * draw(st.sampled_from([1e-6, 0.02, 1.0, 100.0]))
    inputs = torch.randn(tokens, columns, generator=generator) * draw(st.sampled_from([1e-4, 1.0, 1e3]))
    for column in draw(st.lists(st.integers(0, columns - 1), max_size=4)):
        kind = draw(st.sampled_from(["dead", "huge", "copy", "zero", "outlier"]))
        if kind == "dead":
            inputs[:, column] = 0.0
        elif kind == "huge":
            inputs[:, column] *= 100
        elif kind == "copy":
            inputs[:, column] = inputs[:, 0]
        elif kind == "zero":
            weight[:, column] = 0.0
        else:
            weight[0, column] *= 30
    statistics = InputStatistics(columns)
    statistics.add(inputs)
    return weight, statistics


@settings(max_examples=120, deadline=None)
@given(problems(), SPECS, OPTIONS)
def test_every_method_gives_a_valid_tensor_near_the_weight(
    problem: tuple[torch.Tensor, InputStatistics], spec: IntSpec, options: RtnOptions | GptqOptions | AwqOptions
) -> None:
    weight, statistics = problem
    before = weight.clone()
    try:
        solution = METHODS[NAMES[type(options)]].solve(weight, statistics, spec, options, name="layer")
    except NumericsError:
        # outliers of outliers may be too large for the scales: they are refused rather than stored as infinities
        if float(weight.abs().max()) <= torch.finfo(spec.scale_dtype).max:
            raise
        return
    solution.tensor.validate("layer")
    restored = solution.tensor.dequantize()
    assert torch.equal(weight, before)
    assert restored.shape == weight.shape
    assert torch.isfinite(restored).all()
    error = float(quadratic_form(weight - restored, statistics.upper_gram).sum())
    # no column may be off by more than the largest weight, whatever the correlations
    assert error <= 1.1 * weight.numel() * float(weight.abs().max() ** 2 * statistics.diagonal.sum()) + 1e-20


@settings(max_examples=60, deadline=None)
@given(problems(), SPECS, st.integers(1, 12), st.booleans())
def test_scales_are_finite_positive_and_never_make_it_worse(
    problem: tuple[torch.Tensor, InputStatistics], spec: IntSpec, steps: int, duo: bool
) -> None:
    weight, statistics = problem
    found = search_scales([weight], statistics, spec, AwqOptions(steps=steps, duo_scaling=duo))
    assert torch.isfinite(found.scales).all()
    assert (found.scales > 0).all()
    assert found.after <= found.before
