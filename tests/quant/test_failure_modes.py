"""What goes wrong in real models, for every method and transform: a finite result in range, or a clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lowbit.formats import IntSpec
from lowbit.formats.integer import quantize
from lowbit.quant import METHODS, InputStatistics, PairedStatistics
from lowbit.quant.error import output_error
from lowbit.quant.sparse import PRUNERS, parse_sparsity
from lowbit.quant.transforms import TRANSFORMS

SPECS = {"hqq": IntSpec(4, 32, False, zero_dtype=torch.float16)}
"""Formats of methods that do not solve for the usual one."""


def outlier_channels(x: torch.Tensor, w: torch.Tensor) -> None:
    """Two inputs a thousand times larger than the others."""
    x[:, [3, 40]] *= 1000


def dead_columns(x: torch.Tensor, w: torch.Tensor) -> None:
    """Inputs that are always zero, the first and last of a group among them."""
    x[:, [0, 5, 31, 32, 63]] = 0.0


def constant_columns(x: torch.Tensor, w: torch.Tensor) -> None:
    """Inputs that never change, and are all the same."""
    x[:, 8:24] = 1.5


def constant_weights(x: torch.Tensor, w: torch.Tensor) -> None:
    """Rows and columns of one value, zero among them."""
    w[2], w[5], w[:, 7] = 0.0, 0.03, -0.01


def half_overflow(x: torch.Tensor, w: torch.Tensor) -> None:
    """Activations beyond what float16 holds."""
    x *= 1e6


def broken_rows(x: torch.Tensor, w: torch.Tensor) -> None:
    """Rows with NaN or infinity, as an overflow upstream leaves them."""
    x[4, 10], x[9] = float("nan"), float("inf")


def fewer_rows_than_columns(x: torch.Tensor, w: torch.Tensor) -> None:
    """A Gram matrix of low rank."""
    x[7:] = x[:7].repeat(-(-(len(x) - 7) // 7), 1)[: len(x) - 7]


MODES: list[Callable[[torch.Tensor, torch.Tensor], None]] = [
    outlier_channels,
    dead_columns,
    constant_columns,
    constant_weights,
    half_overflow,
    broken_rows,
    fewer_rows_than_columns,
]


def build(mode: Callable[[torch.Tensor, torch.Tensor], None], problems: Any) -> tuple[torch.Tensor, PairedStatistics]:
    inputs = problems.inputs(200, 64).clone()
    weight = 0.02 * torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    mode(inputs, weight)
    statistics = PairedStatistics(64)
    statistics.add_pair(inputs, inputs * 1.01)
    return weight, statistics


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method(method: str, mode: Any, problems: Any) -> None:
    weight, statistics = build(mode, problems)
    assert statistics.nonfinite == (2 if mode is broken_rows else 0)
    spec = SPECS.get(method, IntSpec(4, 32))
    before = weight.clone()
    solved = METHODS[method].solve(weight, statistics, spec, name="layer").tensor
    solved.validate("layer")
    restored = solved.dequantize()
    assert torch.equal(weight, before)
    assert torch.isfinite(restored).all()
    # no worse than twice rounding to nearest within the extrema, and the sign of a method that gave up
    plain = quantize(weight, IntSpec(4, 32)).dequantize()
    assert output_error(weight, restored, statistics) <= 2 * output_error(weight, plain, statistics) + 1e-6


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("transform", sorted(TRANSFORMS))
def test_every_transform(transform: str, mode: Any, problems: Any) -> None:
    weight, statistics = build(mode, problems)
    entry = TRANSFORMS[transform]
    scales = entry.search([weight], statistics, IntSpec(4, 32), None, entry.options())
    if scales is not None:
        assert torch.isfinite(scales).all()
        assert (scales > 0).all()
        assert torch.isfinite(statistics.divide_(scales).gram).all()


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("pruner", sorted(PRUNERS))
def test_every_pruner(pruner: str, mode: Any, problems: Any) -> None:
    weight, statistics = build(mode, problems)
    pruned = PRUNERS[pruner](weight, statistics, parse_sparsity("2:4"))
    assert torch.isfinite(pruned.weight).all()
    assert (pruned.keep.reshape(24, -1, 4).sum(2) == 2).all()
    assert (pruned.weight[~pruned.keep] == 0).all()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_groups_of_one_column(method: str, problems: Any) -> None:
    weight, statistics = build(constant_columns, problems)
    spec = IntSpec(4, 1, method != "hqq", zero_dtype=SPECS.get(method, IntSpec(4)).zero_dtype)
    solved = METHODS[method].solve(weight, statistics, spec, name="layer").tensor
    solved.validate("layer")
    assert output_error(weight, solved.dequantize(), statistics) < 0.05


@pytest.mark.parametrize("method", sorted(name for name, entry in METHODS.items() if not entry.needs_statistics))
def test_an_expert_that_is_never_routed_to(method: str, problems: Any) -> None:
    """What is used in its place works without any statistics."""
    weight = 0.02 * torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    solved = METHODS[method].solve(weight, None, SPECS.get(method, IntSpec(4, 32)), name="experts.3.up_proj").tensor
    assert float((solved.dequantize() - weight).norm() / weight.norm()) < 0.15


def test_statistics_of_broken_rows_alone_count_nothing() -> None:
    statistics = InputStatistics(8)
    statistics.add(torch.full((5, 8), float("nan")))
    assert (statistics.tokens, statistics.nonfinite) == (0, 5)
    assert torch.isfinite(statistics.gram).all()
