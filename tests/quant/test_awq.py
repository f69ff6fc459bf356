"""AWQ against brute force with forwards in float64: every candidate's error measured on the inputs themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowbit.errors import NumericsError, UsageError
from lowbit.formats import PER_CHANNEL, PER_TENSOR, IntSpec
from lowbit.formats.integer import quantize
from lowbit.quant import METHODS, AwqOptions, InputStatistics, RtnOptions, round_to_nearest, search_scales
from lowbit.quant.transforms import TRANSFORMS

SPEC = IntSpec(4, 32)


def brute_force(problem: Any, spec: IntSpec, steps: int, *, duo: bool) -> dict[float, float]:
    """Ratio to relative output error, scales by the formula of the paper, errors by forwards."""
    inputs, weight = problem.inputs.double(), problem.weight.double()
    x = inputs.abs().mean(0)
    groups = weight.abs().reshape(len(weight), -1, spec.group_size if spec.group_size > 0 else weight.shape[1])
    w = (groups / groups.amax(2, keepdim=True)).reshape(weight.shape).mean(0)
    errors = {}
    for step in range(steps):
        ratio = step / steps
        scales = x**ratio / (w ** (1 - ratio) if duo else 1.0)
        scales = scales / (scales.max() * scales.min()).sqrt()
        rounded = quantize((weight * scales).float(), spec).dequantize().double() / scales
        errors[ratio] = problem.forward_error(rounded)
    return errors


@pytest.mark.parametrize(
    "spec", [SPEC, IntSpec(3, 32, False), IntSpec(4, PER_CHANNEL), IntSpec(8, PER_TENSOR)], ids=str
)
@pytest.mark.parametrize("duo", [True, False])
def test_finds_what_brute_force_finds(spec: IntSpec, duo: bool, problems: Any) -> None:
    problem = problems(40, 96)
    found = search_scales([problem.weight], problem.statistics, spec, AwqOptions(duo_scaling=duo, rows=0))
    errors = brute_force(problem, spec, 20, duo=duo)
    assert found.after == pytest.approx(errors[found.ratio], rel=0.01)
    assert found.after <= 1.05 * min(errors.values())
    plain = quantize(problem.weight, spec).dequantize()
    assert found.before == pytest.approx(problem.forward_error(plain), rel=0.01)
    rounded = quantize(problem.weight * found.scales, spec).dequantize() / found.scales
    assert problem.forward_error(rounded) == pytest.approx(found.after, rel=0.01)


@pytest.mark.parametrize("spec", [IntSpec(4, 64), IntSpec(3, 64), IntSpec(3, 64, False)], ids=str)
def test_beats_rounding_to_nearest_where_channels_stand_out(spec: IntSpec, problems: Any) -> None:
    problem = problems(64, 256, outliers=4)
    rounded = round_to_nearest(problem.weight, problem.statistics, spec, RtnOptions("minmax")).tensor.dequantize()
    found = search_scales([problem.weight], problem.statistics, spec, AwqOptions())
    scaled = problem.weight * found.scales
    statistics = problem.statistics.divide_(found.scales)
    errors = {}
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.q_proj"):
        solved = METHODS["awq"].solve(scaled, statistics, spec, AwqOptions(clip_query_key=False), name=name).tensor
        errors[name[-6:]] = problem.forward_error(solved.dequantize() / found.scales)
    assert errors["q_proj"] == pytest.approx(found.after, rel=0.01)
    assert errors["q_proj"] < 0.7 * problem.forward_error(rounded)
    assert errors["v_proj"] < errors["q_proj"]


def test_scales_are_shared_and_the_rows_measured_stand_for_all(problems: Any) -> None:
    problem = problems(900, 64)
    weights = [problem.weight[:600], problem.weight[600:]]
    every = search_scales(weights, problem.statistics, SPEC, AwqOptions(rows=0))
    some = search_scales(weights, problem.statistics, SPEC, AwqOptions(rows=200))
    assert some.after == pytest.approx(every.after, rel=0.1)
    rounded = quantize(problem.weight * some.scales, SPEC).dequantize() / some.scales
    assert problem.forward_error(rounded) <= 1.05 * every.after


def test_nothing_to_gain_gives_no_scales(problems: Any) -> None:
    problem = problems(8, 64, outliers=0)
    exact = quantize(problem.weight, IntSpec(2, 32)).dequantize()
    spec = IntSpec(8, 1, False, torch.float32)
    found = search_scales([exact], problem.statistics, spec, AwqOptions())
    assert (found.scales == 1).all() or found.after < found.before
    search = TRANSFORMS["awq"].search
    assert search([torch.zeros(4, 64)], problem.statistics, SPEC, None, AwqOptions()) is None


def test_dead_inputs_and_zero_weights_stay_finite(problems: Any) -> None:
    inputs = problems.inputs(200, 64)
    inputs[:, [3, 40]] = 0.0
    statistics = InputStatistics(64)
    statistics.add(inputs)
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    weight[:, 10] = 0.0
    weight[5] = 0.0
    found = search_scales([weight], statistics, SPEC, AwqOptions())
    assert torch.isfinite(found.scales).all()
    assert (found.scales > 0).all()
    assert float(found.scales.max() / found.scales.min()) <= 1.01e4


@pytest.mark.parametrize("duo", [True, False])
def test_a_layer_whose_inputs_are_all_dead(duo: bool) -> None:
    statistics = InputStatistics(32)
    statistics.add(torch.zeros(5, 32))
    found = search_scales([torch.randn(4, 32)], statistics, SPEC, AwqOptions(duo_scaling=duo))
    assert torch.equal(found.scales, torch.ones(32)), "nothing is to be gained"


def test_clip_search_finds_the_best_range_of_each_group_alone(problems: Any) -> None:
    problem = problems(80, 64)
    spec = IntSpec(3, 32, False)
    clipped = round_to_nearest(problem.weight, problem.statistics, spec, RtnOptions("gram")).tensor.dequantize()
    for group in range(2):
        columns = slice(32 * group, 32 * (group + 1))
        x = problem.inputs[:, columns].double()
        part = problem.weight[:, columns]

        def error(candidate: torch.Tensor, x: torch.Tensor = x, part: torch.Tensor = part) -> torch.Tensor:
            return (x @ (candidate - part).double().T).square().sum(0)

        low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
        best = torch.full((80,), torch.inf, dtype=torch.float64)
        for shrink in torch.linspace(1.1, 0.3, 81).tolist():
            scale = ((high - low) * shrink / 7).half().float()
            zero = (-low * shrink / scale).round().clamp(0, 7)
            candidate = (((part / scale).round() + zero).clamp(0, 7) - zero) * scale
            best = torch.minimum(best, error(candidate))
        # the search tries 17 ranges: it must come close to the best of these 81 on average
        assert float((error(clipped[:, columns]) / best).mean()) < 1.1


def test_solves_without_statistics_by_the_weights_alone(problems: Any) -> None:
    problem = problems(8, 64)
    method = METHODS["awq"]
    alone = method.solve(problem.weight, None, SPEC, name="o_proj").tensor
    expected = round_to_nearest(problem.weight, None, SPEC, RtnOptions("mse")).tensor
    assert torch.equal(alone.codes, expected.codes)


def test_what_cannot_work_is_said() -> None:
    with pytest.raises(NumericsError, match="calibration"):
        search_scales([torch.ones(2, 8)], InputStatistics(8), SPEC, AwqOptions())
    with pytest.raises(UsageError, match="steps"):
        AwqOptions(steps=0)
    with pytest.raises(UsageError, match="rows"):
        AwqOptions(rows=-1)
    with pytest.raises(UsageError, match="range_method"):
        RtnOptions("clip")  # type: ignore[arg-type]
