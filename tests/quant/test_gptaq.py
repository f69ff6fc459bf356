"""GPTAQ against the paper's loop in float64, written with explicit inverses, and against least squares."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowbit.errors import NumericsError, UsageError
from lowbit.formats import IntSpec
from lowbit.formats.integer import choose_range
from lowbit.quant import METHODS, GptaqOptions, GptqOptions, PairedStatistics, factorise, solve_gptq
from lowbit.quant.gptaq import prepare, solve

SPEC = IntSpec(3, 32, False)


def pair(inputs: torch.Tensor, share: float = 0.3, seed: int = 5) -> tuple[torch.Tensor, PairedStatistics]:
    """The float model's inputs, which differ from ``inputs`` partly in a way that a linear map explains."""
    generator = torch.Generator().manual_seed(seed)
    width = inputs.shape[1]
    mixing = torch.randn(width, width, generator=generator) / width**0.5
    noise = inputs.std() * torch.randn(inputs.shape, generator=generator)
    reference = inputs + share * (inputs @ mixing + 0.3 * noise)
    statistics = PairedStatistics(width)
    statistics.add_pair(inputs, reference)
    return reference, statistics


def paired_error(weight: torch.Tensor, quantized: torch.Tensor, inputs: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative squared distance from what the float model puts out."""
    wanted = reference.double() @ weight.double().T
    return float((inputs.double() @ quantized.double().T - wanted).square().sum() / wanted.square().sum())


def naive_gptaq(
    weight: torch.Tensor, inputs: torch.Tensor, reference: torch.Tensor, spec: IntSpec, options: GptaqOptions
) -> torch.Tensor:
    """The paper's loop, column by column: errors and each column's share of the correction go to the right."""
    x = inputs.double()
    order = torch.arange(x.shape[1])
    if options.ordering == "static":
        order = torch.argsort(x.square().sum(0), descending=True, stable=True)
    w = weight.double().clone()
    h = x.T @ x
    h += options.damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    cross = (reference.double() - x).T @ x
    conditional = torch.empty(len(h), dtype=torch.float64)
    for position in range(len(h)):
        left = order[: position + 1]
        conditional[order[position]] = 1 / torch.linalg.inv(h[left][:, left])[-1, -1]
    scales, zeros = choose_range(weight, spec, method=options.range_method, importance=conditional.float())
    w, h, cross = w[:, order], h[order][:, order], cross[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    carry = options.strength * (cross @ upper.T).triu(1) @ upper
    result = torch.zeros_like(w)
    for column in range(len(h)):
        group = int(order[column]) // spec.group_size
        step, zero = scales[:, group].double(), 0 if zeros is None else zeros[:, group].double()
        now = w[:, column].clone()
        result[:, column] = (((now / step).round() + zero).clamp(0, spec.levels - 1) - zero) * step
        error = (now - result[:, column]) / upper[column, column]
        w[:, column:] -= error[:, None] * upper[column, column:] - now[:, None] * carry[column, column:]
    back = torch.empty_like(result)
    back[:, order] = result
    return back.float()


@pytest.mark.parametrize("ordering", ["static", "none"])
@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_as_good_as_the_papers_loop(ordering: Any, strength: float, problems: Any) -> None:
    problem = problems(32, 96)
    reference, statistics = pair(problem.inputs)
    method = "minmax" if ordering == "none" else "mse"
    spec = IntSpec(3, 96, False) if ordering == "none" else SPEC
    options = GptaqOptions(ordering=ordering, strength=strength, range_method=method, correction="columns")
    found = solve(problem.weight, prepare(statistics, options), spec, options).tensor.dequantize()
    expected = naive_gptaq(problem.weight, problem.inputs, reference, spec, options)
    errors = [paired_error(problem.weight, tensor, problem.inputs, reference) for tensor in (found, expected)]
    assert errors[0] <= 1.02 * errors[1]


def test_the_joint_correction_is_least_squares(problems: Any) -> None:
    """With codes so fine that rounding does not count, the solved weights are those of ridge regression."""
    problem = problems(12, 64)
    reference, statistics = pair(problem.inputs)
    options = GptaqOptions(strength=1.0, correction="joint")
    fine = IntSpec(8, 1, False, torch.float32)
    found = solve(problem.weight, prepare(statistics, options), fine, options).tensor.dequantize().double()
    x = problem.inputs.double()
    ridge = 0.01 * x.square().sum(0).mean() * torch.eye(64, dtype=torch.float64)
    wanted = (reference.double() - x) @ problem.weight.double().T
    expected = problem.weight.double() + torch.linalg.solve(x.T @ x + ridge, x.T @ wanted).T
    assert float((found - expected).norm() / expected.norm()) < 2e-3


def test_comes_closer_to_the_float_model_than_gptq(problems: Any) -> None:
    problem = problems(48, 128, rows=2000)
    reference, statistics = pair(problem.inputs)
    plain = solve_gptq(problem.weight, factorise(statistics, GptqOptions()), SPEC, GptqOptions()).tensor.dequantize()
    before = paired_error(problem.weight, plain, problem.inputs, reference)
    errors = {}
    for correction in ("columns", "joint"):
        options = GptaqOptions(strength=1.0, correction=correction)  # type: ignore[arg-type]
        solved = solve(problem.weight, prepare(statistics, options), SPEC, options).tensor.dequantize()
        errors[correction] = paired_error(problem.weight, solved, problem.inputs, reference)
    assert errors["joint"] < errors["columns"] < before


def test_without_a_float_model_beside_it_is_gptq(problems: Any) -> None:
    problem = problems(16, 64)
    gptq = METHODS["gptq"].solve(problem.weight, problem.statistics, SPEC)
    gptaq = METHODS["gptaq"].solve(problem.weight, problem.statistics, SPEC)
    assert torch.equal(gptq.tensor.codes, gptaq.tensor.codes)
    same = PairedStatistics(64)
    same.add_pair(problem.inputs, problem.inputs)
    assert torch.equal(gptq.tensor.codes, METHODS["gptaq"].solve(problem.weight, same, SPEC).tensor.codes)


def test_paired_statistics_are_sums_over_finite_pairs(problems: Any) -> None:
    inputs = problems.inputs(300, 40)
    reference, _ = pair(inputs)
    broken, wanted = inputs.clone(), reference.clone()
    broken[7, 3], wanted[50, 1] = float("nan"), float("inf")
    good = torch.ones(300, dtype=torch.bool)
    good[[7, 50]] = False
    statistics = PairedStatistics(40)
    statistics.add_pair(broken[:100].view(4, 25, 40), wanted[:100].view(4, 25, 40))
    statistics.add_pair(broken[100:], wanted[100:])
    assert (statistics.tokens, statistics.nonfinite) == (298, 2)
    x, difference = inputs[good].double(), (reference - inputs)[good].double()
    torch.testing.assert_close(statistics.gram.double(), x.T @ x, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(statistics.cross.double(), difference.T @ x, rtol=1e-4, atol=1e-2)
    scales = 0.5 + torch.rand(40)
    restored = PairedStatistics.from_state(statistics.state()).divide_(scales)
    divided = (difference / scales).T @ (x / scales)
    torch.testing.assert_close(restored.cross.double(), divided, rtol=1e-4, atol=1e-1)


def test_what_cannot_work_is_said() -> None:
    with pytest.raises(NumericsError, match=r"o_proj: .*calibration"):
        METHODS["gptaq"].solve(torch.ones(2, 8), None, IntSpec(4, 8), name="o_proj")
    for wrong in ({"damping": 0.0}, {"strength": 1.5}, {"strength": -0.1}, {"correction": "x"}, {"ordering": "x"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            GptaqOptions(**wrong)  # type: ignore[arg-type]
