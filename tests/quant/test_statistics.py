from __future__ import annotations

from typing import Any

import pytest
import torch

from lowbit.errors import NumericsError
from lowbit.quant import InputStatistics, output_error, weight_error
from lowbit.quant.factor import invert_upper, quadratic_form, reverse_cholesky_


@pytest.mark.parametrize("features", [1, 40, 1024, 1100])
def test_gram_is_the_sum_of_outer_products(features: int, problems: Any) -> None:
    inputs = problems.inputs(70, features, outliers=0)
    statistics = InputStatistics(features)
    statistics.add(inputs[:30].reshape(2, 15, features))
    assert statistics.gram.shape == (features, features)
    statistics.add(inputs[30:])
    expected = inputs.double().T @ inputs.double()
    assert torch.allclose(statistics.gram.double(), expected, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(statistics.gram, statistics.gram.T) or features <= 1024
    assert torch.allclose(statistics.abs_mean.double(), inputs.double().abs().mean(0), rtol=1e-5)
    assert torch.allclose(statistics.diagonal.double(), expected.diagonal(), rtol=1e-4)
    assert statistics.tokens == 70


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_dropped_and_counted(bad: float, problems: Any) -> None:
    inputs = problems.inputs(50, 24)
    broken = inputs.clone()
    broken[7, 3] = bad
    broken[19] = bad
    statistics = InputStatistics(24)
    statistics.add(broken)
    kept = torch.cat([inputs[:7], inputs[8:19], inputs[20:]])
    assert (statistics.tokens, statistics.nonfinite) == (48, 2)
    assert torch.allclose(statistics.gram, kept.T @ kept, rtol=1e-4, atol=1e-3)
    assert torch.isfinite(statistics.abs_sum).all()


def test_low_precision_inputs_are_summed_in_float32(problems: Any) -> None:
    inputs = problems.inputs(400, 16).bfloat16()
    statistics = InputStatistics(16)
    statistics.add(inputs)
    expected = inputs.double().T @ inputs.double()
    assert torch.allclose(statistics.gram.double(), expected, rtol=1e-4, atol=1e-3)


def test_divide_gives_the_statistics_of_divided_inputs(problems: Any) -> None:
    inputs = problems.inputs(60, 1100)
    scales = torch.rand(1100, generator=torch.Generator().manual_seed(5)) + 0.5
    statistics = InputStatistics(1100)
    statistics.add(inputs)
    assert statistics.divide_(scales) is statistics
    expected = InputStatistics(1100)
    expected.add(inputs / scales)
    assert torch.allclose(statistics.gram, expected.gram, rtol=1e-4, atol=1e-3 * float(expected.diagonal.max()))
    assert torch.allclose(statistics.abs_sum, expected.abs_sum, rtol=1e-4)


def test_state_comes_back(problems: Any) -> None:
    statistics = InputStatistics(1030)
    statistics.add(problems.inputs(20, 1030))
    restored = InputStatistics.from_state(statistics.state())
    assert (restored.tokens, restored.nonfinite) == (20, 0)
    assert torch.equal(restored.gram, statistics.gram)
    with pytest.raises(NumericsError, match="gram"):
        InputStatistics.from_state({**statistics.state(), "abs_sum": torch.zeros(3)})


@pytest.mark.parametrize("size", [1, 5, 256, 300, 700])
def test_reverse_cholesky_factorises_from_the_end(size: int, problems: Any) -> None:
    inputs = problems.inputs(2 * size + 10, size)
    matrix = inputs.T @ inputs
    matrix.diagonal().add_(0.01 * float(matrix.diagonal().mean()))
    work = matrix.clone()
    if size > 256:
        work[256:, :256] = float("nan")  # below the diagonal blocks nothing may be read
    assert reverse_cholesky_(work)
    upper = work.triu()
    assert torch.allclose((upper @ upper.T).double(), matrix.double(), atol=1e-5 * float(matrix.abs().max()))
    textbook = torch.linalg.cholesky(torch.linalg.inv(matrix.double()), upper=True)
    inverse = invert_upper(upper)
    assert torch.allclose(inverse, textbook, atol=2e-3 * float(textbook.abs().max()))


def test_reverse_cholesky_refuses_what_is_not_positive_definite() -> None:
    assert not reverse_cholesky_(torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    assert not reverse_cholesky_(torch.full((2, 2), float("nan")))


@pytest.mark.parametrize("size", [3, 512, 1200])
def test_quadratic_form_reads_the_upper_half_only(size: int, problems: Any) -> None:
    inputs = problems.inputs(50, size)
    rows = torch.randn(9, size, generator=torch.Generator().manual_seed(1))
    gram = inputs.T @ inputs
    for start in range(0, size, 512):
        gram[start + 512 :, start : start + 512] = float("nan")
    expected = (inputs.double() @ rows.double().T).square().sum(0)
    assert torch.allclose(quadratic_form(rows, gram), expected, rtol=1e-3)


def test_output_error_is_that_of_forwards(problems: Any) -> None:
    inputs = problems.inputs(200, 48)
    statistics = InputStatistics(48)
    statistics.add(inputs)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(20, 48, generator=generator)
    noisy = weight + 0.1 * torch.randn(20, 48, generator=generator)
    x = inputs.double()
    expected = float((x @ (noisy - weight).double().T).square().sum() / (x @ weight.double().T).square().sum())
    assert output_error(weight, noisy, statistics) == pytest.approx(expected, rel=1e-3)
    assert output_error(weight, weight, statistics) == 0.0
    zero = torch.zeros_like(weight)
    assert output_error(zero, zero, statistics) == 0.0
    assert output_error(zero, weight, statistics) == float("inf")
    assert output_error(weight, noisy, statistics, rows=10) == pytest.approx(expected, rel=0.5)


def test_weight_error() -> None:
    original = torch.tensor([[3.0, 4.0]])
    error = weight_error(original, torch.tensor([[3.5, 4.0]]))
    assert (error.mean, error.std, error.max, error.relative) == pytest.approx((0.25, 0.25, 0.5, 0.1))
    assert weight_error(torch.zeros(1, 2), torch.zeros(1, 2)).relative == 0.0
