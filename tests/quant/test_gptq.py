"""GPTQ against a naive full-update solver in float64 that eliminates columns from an explicit inverse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lowbit.errors import NumericsError, UsageError
from lowbit.formats import PER_CHANNEL, PER_TENSOR, IntSpec
from lowbit.formats.integer import choose_range
from lowbit.quant import METHODS, GptqOptions, InputStatistics, RtnOptions, factorise, round_to_nearest, solve_gptq


def naive_gptq(weight: torch.Tensor, inputs: torch.Tensor, spec: IntSpec, options: GptqOptions) -> torch.Tensor:
    """Dequantized weights by optimal brain quantization in a fixed order: no block, no Cholesky, no laziness."""
    w = weight.double().clone()
    h = inputs.double().T @ inputs.double()
    h += options.damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    columns = len(h)
    order = list(range(columns))
    if options.ordering == "static":
        order = torch.argsort(inputs.square().sum(0), descending=True, stable=True).tolist()
    # importance of a column: its share of the error once all later columns have done what they can
    conditional = torch.zeros(columns, dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    for column in order:
        conditional[column] = 1 / inverse[column, column]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    per_group = options.ordering == "none" and spec.group_size > 0
    size = spec.group_size if spec.group_size > 0 else columns
    grids: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def grid(part: torch.Tensor, part_spec: IntSpec, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scales, zeros = choose_range(
            part.float(), part_spec, method=options.range_method, importance=importance.float()
        )
        points = torch.full_like(scales, spec.midpoint) if zeros is None else zeros
        return scales.double().expand(len(w), -1), points.double().expand(len(w), -1)

    if not per_group:
        scales, zeros = grid(w, spec, conditional)
        grids = {g: (scales[:, g], zeros[:, g]) for g in range(scales.shape[1])}
    inverse = torch.linalg.inv(h)
    done = torch.zeros(columns, dtype=torch.bool)
    result = torch.zeros_like(w)
    for column in order:
        group = column // size
        if group not in grids:
            columns_of_group = slice(column, column + size)
            scales, zeros = grid(w[:, columns_of_group], replace(spec, group_size=-1), conditional[columns_of_group])
            grids[group] = (scales[:, 0], zeros[:, 0])
        step, zero = grids[group]
        code = ((w[:, column] / step).round() + zero).clamp(0, spec.levels - 1)
        result[:, column] = (code - zero) * step
        error = (w[:, column] - result[:, column]) / inverse[column, column]
        done[column] = True
        w -= torch.where(done, 0.0, error[:, None] * inverse[column])
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return result.float()


CASES = [
    (IntSpec(4, 32, True), GptqOptions(ordering="none", range_method="minmax")),
    (IntSpec(4, 32, True), GptqOptions(ordering="none", block_size=16)),
    (IntSpec(3, 24, False), GptqOptions(ordering="none", range_method="minmax", block_size=50)),
    (IntSpec(3, 40, False), GptqOptions(ordering="none", block_size=40)),
    (IntSpec(2, 96, False), GptqOptions(ordering="none", block_size=32, damping=0.1)),
    (IntSpec(4, PER_CHANNEL, True), GptqOptions(ordering="none", block_size=32)),
    (IntSpec(4, PER_TENSOR, False), GptqOptions(ordering="none", range_method="minmax")),
    (IntSpec(4, 32, True), GptqOptions(ordering="static", range_method="minmax", block_size=40)),
    (IntSpec(3, 24, False), GptqOptions(ordering="static")),
    (IntSpec(4, PER_CHANNEL, False), GptqOptions(ordering="static", block_size=64)),
    (IntSpec(8, 128, True), GptqOptions()),
]


@pytest.mark.parametrize(("spec", "options"), CASES, ids=lambda value: str(value).replace("GptqOptions", ""))
def test_same_weights_as_the_naive_solver(spec: IntSpec, options: GptqOptions, problems: Any) -> None:
    problem = problems(24, 96)
    quantized = solve_gptq(problem.weight, factorise(problem.statistics, options), spec, options).tensor
    quantized.validate("weight")
    assert quantized.group_index is None
    found, expected = quantized.dequantize(), naive_gptq(problem.weight, problem.inputs, spec, options)
    # a value on the edge between two codes may fall either way, and then the rest of its row differs too
    same_rows = (found - expected).abs().amax(1) < 1e-5
    assert same_rows.float().mean() >= 0.9
    assert problem.forward_error(found) == pytest.approx(problem.forward_error(expected), rel=0.02)


@pytest.mark.parametrize("spec", [IntSpec(4, 64), IntSpec(3, 64), IntSpec(3, 64, False), IntSpec(4, -1)], ids=str)
@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_beats_rounding_to_nearest(spec: IntSpec, method: Any, problems: Any) -> None:
    problem = problems(48, 256, outliers=4)
    rounded = round_to_nearest(problem.weight, problem.statistics, spec, RtnOptions(method)).tensor.dequantize()
    baseline = problem.forward_error(rounded)
    for ordering in ("none", "static"):
        options = GptqOptions(ordering=ordering, range_method=method)
        solved = solve_gptq(problem.weight, factorise(problem.statistics, options), spec, options).tensor
        assert problem.forward_error(solved.dequantize()) < 0.5 * baseline


def test_block_size_changes_nothing_but_rounding_noise(problems: Any) -> None:
    problem = problems(16, 300)
    spec = IntSpec(4, 60)
    errors = []
    for block_size in (11, 60, 128, 1000):
        options = GptqOptions(ordering="none", block_size=block_size)
        solved = solve_gptq(problem.weight, factorise(problem.statistics, options), spec, options).tensor
        errors.append(problem.forward_error(solved.dequantize()))
    assert max(errors) < 1.05 * min(errors)


def test_two_runs_give_the_same_bits(problems: Any) -> None:
    problem = problems(40, 200)
    spec, options = IntSpec(4, 40), GptqOptions()
    first, second = (
        solve_gptq(problem.weight, factorise(problem.statistics, options), spec, options).tensor for _ in range(2)
    )
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)


def test_dead_columns_become_zero_and_harm_nothing(problems: Any) -> None:
    inputs = problems.inputs(300, 64)
    inputs[:, [0, 17, 63]] = 0.0
    statistics = InputStatistics(64)
    statistics.add(inputs)
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(4))
    before = weight.clone()
    for ordering in ("none", "static"):
        options = GptqOptions(ordering=ordering)
        solved = solve_gptq(weight, factorise(statistics, options), IntSpec(4, 32), options).tensor.dequantize()
        assert (solved[:, [0, 17, 63]] == 0).all()
        assert torch.isfinite(solved).all()
    assert torch.equal(weight, before)


def test_damping_rises_until_the_factorisation_holds(problems: Any) -> None:
    statistics = InputStatistics(64)
    statistics.add(problems.inputs(5, 64, outliers=0))
    factor = factorise(statistics, GptqOptions(damping=0.01))
    assert factor.damping == 0.01
    # a Gram matrix spoilt by rounding: its negative eigenvalues need a damping above 0.01
    statistics.gram.diagonal().mul_(0.8)
    options = GptqOptions(damping=0.001)
    raised = factorise(statistics, options)
    assert 0.001 < raised.damping <= 1.0
    solution = solve_gptq(torch.randn(4, 64), raised, IntSpec(4, 32), options)
    assert solution.damping == raised.damping
    assert "raised" in solution.notes[0]
    statistics.gram.fill_(1.0).diagonal().fill_(0.01)
    with pytest.raises(NumericsError, match="rtn"):
        factorise(statistics, options)


def test_float64_takes_over_where_float32_fails(problems: Any) -> None:
    statistics = InputStatistics(64)
    statistics.add(problems.inputs(5, 64, outliers=0))
    factor = factorise(statistics, GptqOptions(damping=2e-7))
    assert factor.precision == torch.float64 or factor.damping > 2e-7
    assert torch.isfinite(factor.upper.triu()).all()


def test_linears_on_one_input_share_the_factorisation(problems: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems(16, 64)
    calls = []
    monkeypatch.setattr("lowbit.quant.gptq.factorise", lambda *given: calls.append(given) or factorise(*given))
    shared: dict[Any, Any] = {}
    for name in ("q_proj", "k_proj"):
        METHODS["gptq"].solve(problem.weight, problem.statistics, IntSpec(4, 32), shared=shared, name=name)
    assert len(calls) == 1


def test_what_cannot_work_is_said(problems: Any) -> None:
    with pytest.raises(NumericsError, match=r"o_proj: .*calibration"):
        METHODS["gptq"].solve(torch.ones(2, 8), InputStatistics(8), IntSpec(4, 8), name="o_proj")
    with pytest.raises(NumericsError, match="calibration"):
        METHODS["gptq"].solve(torch.ones(2, 8), None, IntSpec(4, 8))
    problem = problems(4, 32)
    with pytest.raises(NumericsError, match="columns"):
        METHODS["gptq"].solve(torch.ones(2, 8), problem.statistics, IntSpec(4, 8))
    broken = problem.weight.clone()
    broken[1, 2] = float("nan")
    with pytest.raises(NumericsError, match="NaN"):
        METHODS["gptq"].solve(broken, problem.statistics, IntSpec(4, 8))
    for wrong in ({"damping": 0.0}, {"damping": 2.0}, {"block_size": 0}, {"ordering": "x"}, {"range_method": "gram"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            GptqOptions(**wrong)
