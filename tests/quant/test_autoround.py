"""Learned rounding against signed gradient descent written out by hand in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lowbit.errors import NumericsError, UsageError
from lowbit.formats import PER_CHANNEL, PER_TENSOR, IntSpec
from lowbit.formats.integer import quantize
from lowbit.quant import METHODS, AutoRoundOptions
from lowbit.quant.autoround import Rounding, Tuned, tune

SPECS = [IntSpec(3, 32), IntSpec(2, 32, False), IntSpec(4, PER_CHANNEL, False), IntSpec(4, PER_TENSOR)]


def learn(problem: Any, spec: IntSpec, options: AutoRoundOptions, columns: torch.Tensor | None = None) -> Tuned:
    """Tune one linear on two batches of the problem's inputs."""
    linear = nn.Linear(problem.weight.shape[1], problem.weight.shape[0], bias=False)
    linear.weight.requires_grad_(False).copy_(problem.weight)
    scaled = problem.weight if columns is None else problem.weight * columns
    halves = problem.inputs.chunk(2)
    batches = [lambda x=x: (x, x @ problem.weight.T) for x in halves]
    rounding = Rounding(linear, scaled, quantize(scaled, spec), columns)
    tuned = tune([rounding], linear, batches, options)
    assert torch.equal(linear.weight, problem.weight)
    assert isinstance(linear.weight, nn.Parameter)
    return tuned


def test_the_descent_is_the_one_written_out_by_hand(problems: Any) -> None:
    """The gradient of an offset is that of the weight, times the step, where the code is not at the end."""
    problem, spec, steps = problems(12, 64, outliers=0), IntSpec(3, 32), 8
    start = quantize(problem.weight, spec)
    rounding = Rounding(nn.Linear(64, 12, bias=False), problem.weight, start)
    step = start.scales.double()[:, start.columns_to_groups()]
    whole = start.dequantize().double()
    weight = whole + (problem.weight.double() - whole).clamp(-0.49 * step, 0.49 * step)
    offset = torch.zeros(12, 64, dtype=torch.float64)
    gram = problem.inputs.double().T @ problem.inputs.double()
    for rate in torch.linspace(1 / steps, 0, steps + 1)[:-1].tolist():
        error = problem.inputs @ (rounding.quantized() - problem.weight).T
        error.square().sum().backward()
        free = ((weight / step + offset).round() + spec.midpoint).clamp(-1, spec.levels)
        inside = (free >= 0) & (free <= spec.levels - 1)
        quantized = (free.clamp(0, spec.levels - 1) - spec.midpoint) * step
        torch.testing.assert_close(rounding.quantized().detach().double(), quantized, rtol=1e-5, atol=1e-7)
        gradient = 2 * (quantized - problem.weight.double()) @ gram * step * inside
        torch.testing.assert_close(rounding.offset.grad.double(), gradient, rtol=1e-3, atol=1e-5)  # type: ignore[union-attr]
        sign = rounding.offset.grad.sign().double()  # type: ignore[union-attr]
        rounding.descend(rate, ranges=False)
        offset = (offset - rate * sign).clamp(-0.5, 0.5)
    torch.testing.assert_close(rounding.offset.detach().double(), offset, rtol=0, atol=1e-6)


def straight_through(value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    return value + (rounded - value).detach()


def signround(problem: Any, spec: IntSpec, options: AutoRoundOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """The paper's algorithm by autograd in float64: codes and scales of the best step.

    An offset in [-1/2, 1/2] for each weight, a factor on either end of each range, mean squared error of the output,
    steps against the gradients' signs with a rate that falls linearly from 1 / steps to 0.
    """
    start = quantize(problem.weight, spec)
    size, top = spec.group_size, spec.levels - 1
    first_steps = start.scales.double()
    first_zeros = torch.full_like(first_steps, spec.midpoint) if spec.symmetric else start.zero_points.double()
    wide = lambda values: values.repeat_interleave(size, 1)  # noqa: E731
    base = start.dequantize().double()
    weight = base + torch.minimum(
        torch.maximum(problem.weight.double() - base, -0.49 * wide(first_steps)), 0.49 * wide(first_steps)
    )
    offset = torch.zeros_like(weight, requires_grad=True)
    lower = torch.ones_like(first_steps, requires_grad=True)
    upper = torch.ones_like(first_steps, requires_grad=True)

    def grid() -> tuple[torch.Tensor, torch.Tensor]:
        low = -first_zeros * first_steps * (upper if spec.symmetric else lower)
        high = (top - first_zeros) * first_steps * upper
        steps = (high - low) / top
        steps = straight_through(steps, steps.half().double())
        if spec.symmetric:
            return steps, first_zeros
        return steps, straight_through(-low / steps, (-low / steps).round().clamp(0, top))

    def codes() -> torch.Tensor:
        steps, zeros = grid()
        position = weight / wide(steps) + offset
        return (straight_through(position, position.round()) + wide(zeros)).clamp(0, top)

    def error(x: torch.Tensor) -> torch.Tensor:
        steps, zeros = grid()
        return (x @ ((codes() - wide(zeros)) * wide(steps) - problem.weight.double()).T).square().mean()

    batches = [x.double() for x in problem.inputs.chunk(2)]
    first = [float((x @ (base - problem.weight.double()).T).square().mean()) for x in batches]
    generator = torch.Generator().manual_seed(options.seed)
    best, found = float("inf"), (codes().detach(), grid()[0].detach())
    for step in range(options.steps):
        picked = torch.randint(2, (options.batches,), generator=generator).tolist()
        loss = sum(error(batches[index]) for index in picked)
        share = float(loss.detach()) / sum(first[index] for index in picked)
        if share < best:
            best, found = share, (codes().detach(), grid()[0].detach())
        gradients = torch.autograd.grad(loss, [offset, lower, upper], allow_unused=True)
        rate = (1 - step / options.steps) / options.steps
        with torch.no_grad():
            for values, gradient, bounds in zip(
                (offset, lower, upper), gradients, ((-0.5, 0.5), (0.5, 1.25), (0.5, 1.25)), strict=True
            ):
                if gradient is not None:
                    values.sub_(rate * gradient.sign()).clamp_(*bounds)
    return found


@pytest.mark.parametrize("spec", [IntSpec(3, 32), IntSpec(2, 32, False)], ids=str)
def test_the_whole_of_it_is_that_of_the_paper(spec: IntSpec, problems: Any) -> None:
    problem, options = problems(12, 64, outliers=0), AutoRoundOptions(steps=30)
    tuned = learn(problem, spec, options).tensors[0]
    codes, scales = signround(problem, spec, options)
    # a gradient next to zero may have either sign in float32, and leads elsewhere
    assert float((tuned.codes.double() == codes).double().mean()) > 0.97
    torch.testing.assert_close(tuned.scales.double(), scales, rtol=0.02, atol=0)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("ranges", [True, False])
def test_comes_closer_and_moves_codes_by_one_at_most(spec: IntSpec, ranges: bool, problems: Any) -> None:
    problem = problems(24, 96)
    tuned = learn(problem, spec, AutoRoundOptions(steps=60, rate=0.0 if ranges else 0.005, ranges=ranges))
    start = quantize(problem.weight, spec)
    found = tuned.tensors[0]
    found.validate("weight")
    assert tuned.after < tuned.before
    share = problem.forward_error(found.dequantize()) / problem.forward_error(start.dequantize())
    assert share < (0.9 if ranges else 1.0)
    if not ranges:
        assert torch.equal(found.scales, start.scales)
        assert int((found.codes.int() - start.codes.int()).abs().max()) <= 1


def test_tunes_what_a_transform_has_scaled(problems: Any) -> None:
    problem, spec = problems(16, 64), IntSpec(3, 32)
    columns = 0.5 + torch.rand(64, generator=torch.Generator().manual_seed(3))
    tuned = learn(problem, spec, AutoRoundOptions(steps=40), columns)
    before = quantize(problem.weight * columns, spec).dequantize() / columns
    assert problem.forward_error(tuned.tensors[0].dequantize() / columns) < problem.forward_error(before)


def test_the_same_seed_gives_the_same_bits(problems: Any) -> None:
    problem = problems(8, 64)
    first, second = (learn(problem, IntSpec(3, 32), AutoRoundOptions(steps=10)).tensors[0] for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)


def test_what_is_no_better_is_dropped(problems: Any) -> None:
    """On weights that lie on the grid there is nothing to gain."""
    problem, spec = problems(8, 64), IntSpec(4, 32)
    exact = quantize(problem.weight, spec)
    problem.weight.copy_(exact.dequantize())
    linear = nn.Linear(64, 8, bias=False)
    batches = [lambda: (problem.inputs, problem.inputs @ problem.weight.T)]
    tuned = tune([Rounding(linear, problem.weight, exact)], linear, batches, AutoRoundOptions(steps=3, rate=1.0))
    assert tuned.tensors[0] is exact
    assert tuned.after == tuned.before


def test_starts_from_the_codes_of_another_solver(problems: Any) -> None:
    problem, spec = problems(16, 64), IntSpec(3, 32)
    for start in ("rtn", "gptq"):
        options = AutoRoundOptions(start=start)
        found = METHODS["autoround"].solve(problem.weight, problem.statistics, spec, options).tensor
        assert torch.equal(found.codes, METHODS[start].solve(problem.weight, problem.statistics, spec).tensor.codes)


def test_what_cannot_work_is_said(problems: Any) -> None:
    for wrong in ({"steps": 0}, {"batches": 0}, {"rate": -1.0}, {"rate": 2.0}, {"start": "x"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            AutoRoundOptions(**wrong)
    problem = problems(4, 32)
    linear = nn.Linear(32, 4, bias=False)
    rounding = Rounding(linear, problem.weight, quantize(problem.weight, IntSpec(4, 32)))
    broken = problem.inputs.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        tune([rounding], linear, [lambda: (broken, broken @ problem.weight.T)], AutoRoundOptions(steps=1))
    assert isinstance(linear.weight, nn.Parameter)
