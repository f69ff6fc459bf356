"""Pruning against the papers' definitions in float64, and solving under a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lowbit.errors import NumericsError, UsageError
from lowbit.formats import PER_CHANNEL, FloatTensor, IntSpec, parse_spec
from lowbit.quant import METHODS, GptqOptions, InputStatistics
from lowbit.quant.sparse import PRUNERS, Pruned, Sparsity, parse_sparsity

PATTERNS = ["50%", "30%", "2:4", "4:8", "1:3"]


def naive_sparsegpt(weight: torch.Tensor, inputs: torch.Tensor, sparsity: Sparsity, damping: float) -> torch.Tensor:
    """Optimal brain surgery from left to right with explicit inverses: each zero is paid for by the columns to come."""
    w = weight.double().clone()
    h = inputs.double().T @ inputs.double()
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    rows, columns = w.shape
    keep = torch.ones(rows, columns, dtype=torch.bool)
    pivots = torch.stack([torch.linalg.inv(h[j:, j:])[0, 0] for j in range(columns)])
    for column in range(columns):
        if sparsity.of and column % sparsity.of == 0:
            for row in range(rows):
                run = range(column, min(column + sparsity.of, columns))
                ranked = sorted(run, key=lambda j: float(w[row, j] ** 2 / pivots[j]), reverse=True)
                keep[row, ranked[sparsity.kept :]] = False
        elif not sparsity.of and column % 128 == 0:
            block = slice(column, min(column + 128, columns))
            scores = (w[:, block] ** 2 / pivots[block]).flatten()
            gone = scores.argsort(stable=True)[: round(sparsity.share * len(scores))]
            mask = torch.ones_like(scores, dtype=torch.bool)
            mask[gone] = False
            keep[:, block] = mask.reshape(rows, -1)
        inverse = torch.linalg.inv(h[column:, column:])
        error = w[:, column] * ~keep[:, column] / inverse[0, 0]
        w[:, column:] -= error[:, None] * inverse[0]
        w[:, column] *= keep[:, column]
    return w


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_is_that_of_the_paper(pattern: str, problems: Any) -> None:
    problem, sparsity = problems(12, 140), parse_sparsity(pattern)
    found = PRUNERS["sparsegpt"](problem.weight, problem.statistics, sparsity)
    expected = naive_sparsegpt(problem.weight, problem.inputs, sparsity, GptqOptions().damping)
    if sparsity.of and 128 % sparsity.of:
        return  # the naive one's blocks are the paper's, and end elsewhere
    assert ((expected != 0) == found.keep).double().mean() > 0.99
    assert problem.forward_error(found.weight) == pytest.approx(problem.forward_error(expected.float()), rel=0.02)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("pruner", sorted(PRUNERS))
def test_the_pattern_is_met(pruner: str, pattern: str, problems: Any) -> None:
    problem, sparsity = problems(32, 141), parse_sparsity(pattern)
    before = problem.weight.clone()
    pruned = PRUNERS[pruner](problem.weight, problem.statistics, sparsity)
    assert torch.equal(problem.weight, before)
    assert torch.equal(pruned.weight != 0, pruned.keep)
    if not sparsity.of:
        assert float((pruned.weight == 0).double().mean()) == pytest.approx(sparsity.share, abs=0.005)
        return
    whole = 141 - 141 % sparsity.of
    kept = pruned.keep[:, :whole].reshape(32, -1, sparsity.of).sum(2)
    assert (kept == sparsity.kept).all()
    assert (pruned.keep[:, whole:].sum(1) <= sparsity.kept).all()


def test_wanda_and_magnitude_keep_the_largest_products(problems: Any) -> None:
    problem, half = problems(10, 64), parse_sparsity("50%")
    norms = problem.inputs.double().norm(dim=0)
    scores = problem.weight.double().abs() * norms
    wanda = PRUNERS["wanda"](problem.weight, problem.statistics, half).keep
    for row in range(10):
        assert float(scores[row][wanda[row]].min()) >= float(scores[row][~wanda[row]].max())
        assert int(wanda[row].sum()) == 32
    magnitude = PRUNERS["magnitude"](problem.weight, None, half).keep
    assert float(problem.weight[magnitude].abs().min()) >= float(problem.weight[~magnitude].abs().max())


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_the_more_a_pruner_knows_the_less_it_costs(pattern: str, problems: Any) -> None:
    problem, sparsity = problems(48, 128, outliers=6), parse_sparsity(pattern)
    errors = {
        n: problem.forward_error(p(problem.weight, problem.statistics, sparsity).weight) for n, p in PRUNERS.items()
    }
    assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]


def naive_masked(
    weight: torch.Tensor, problem: Any, round_column: Callable[[int, torch.Tensor], torch.Tensor], keep: torch.Tensor
) -> torch.Tensor:
    """GPTQ with explicit inverses in float64, left to right; where a weight must be zero, zero is its rounded value."""
    hessian = problem.inputs.double().T @ problem.inputs.double()
    hessian += GptqOptions().damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    w, out = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for column in range(w.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        out[:, column] = round_column(column, w[:, column]) * keep[:, column]
        w[:, column:] -= ((w[:, column] - out[:, column]) / inverse[0, 0])[:, None] * inverse[0]
    return out


@pytest.mark.parametrize("text", ["int4-g32-sym", "int3-g32-asym", "fp8-channel", "nvfp4", "nf4-b64", "fp4-b64"])
@pytest.mark.parametrize("masked", [True, False])
def test_solving_under_a_mask_is_that_of_the_definition(text: str, masked: bool, problems: Any) -> None:
    """For every kind of grid: the ranges that were found are taken as given, and all codes follow in float64."""
    problem, spec = problems(16, 64), parse_spec(text)
    pruned = PRUNERS["magnitude"](problem.weight, None, parse_sparsity("50%"))
    keep = pruned.keep if masked else torch.ones_like(pruned.keep)
    pruned = Pruned(problem.weight, keep)
    options = GptqOptions(ordering="none", block_size=16)
    solved = METHODS["gptq"].solve(problem.weight, problem.statistics, spec, options, pruned=pruned).tensor
    solved.validate("weight")
    values = _grid(solved)

    def nearest(column: int, current: torch.Tensor) -> torch.Tensor:
        here = values[:, column]
        return here.gather(1, (here - current[:, None]).abs().argmin(1, keepdim=True))[:, 0]

    expected = naive_masked(problem.weight, problem, nearest, keep.double())
    found = solved.dequantize().double()
    assert not bool(found[~keep].any())
    same = (found - expected).abs() <= 1e-5 * expected.abs() + 1e-8
    # A weight at the edge between two values may fall either way in float32, and moves those after it.
    assert float(same.double().mean()) > 0.9
    assert problem.forward_error(found) == pytest.approx(problem.forward_error(expected), rel=0.05)


def _grid(tensor: Any) -> torch.Tensor:
    """float64 ``[out, in, values]``: all that each weight may become under the scales of ``tensor``."""
    codes = 256 if isinstance(tensor, FloatTensor) and tensor.spec.element == "e4m3" else 2**tensor.spec.bits
    columns = []
    for code in range(codes):
        if codes == 256 and code & 0x7F == 0x7F:
            continue
        columns.append(replace(tensor, codes=torch.full_like(tensor.codes, code)).dequantize().double())
    return torch.stack(columns, 2)


@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_wanda_and_magnitude_are_their_definitions(pattern: str, problems: Any) -> None:
    """In float64, one comparison group after the other: a row (or the matrix), or every run of four."""
    problem, sparsity = problems(12, 64), parse_sparsity(pattern)
    norms = problem.inputs.double().square().sum(0).sqrt()
    for name, scores in (
        ("wanda", problem.weight.double().abs() * norms),
        ("magnitude", problem.weight.double().abs()),
    ):
        groups = scores.reshape(-1, 4) if sparsity.of else scores.reshape(12 if name == "wanda" else 1, -1)
        kept = torch.zeros_like(groups, dtype=torch.bool)
        for row, values in enumerate(groups.tolist()):
            ranked = sorted(range(len(values)), key=values.__getitem__, reverse=True)
            kept[row, ranked[: len(values) // 2]] = True
        found = PRUNERS[name](problem.weight, problem.statistics, sparsity)
        assert torch.equal(found.keep, kept.reshape(12, 64))
        assert torch.equal(found.weight, problem.weight * found.keep)


@pytest.mark.parametrize("spec", [IntSpec(4, 32), IntSpec(3, 32, False), IntSpec(4, PER_CHANNEL)], ids=str)
@pytest.mark.parametrize("pruner", sorted(PRUNERS))
def test_zeros_outlast_quantization_and_gptq_makes_up_for_them(spec: IntSpec, pruner: str, problems: Any) -> None:
    problem = problems(24, 128)
    pruned = PRUNERS[pruner](problem.weight, problem.statistics, parse_sparsity("2:4"))
    errors = {}
    for name in ("rtn", "awq", "gptq", "gptaq"):
        for ordering in ("static", "none") if name == "gptq" else ("static",):
            options = GptqOptions(ordering=ordering) if name == "gptq" else None
            solved = METHODS[name].solve(problem.weight, problem.statistics, spec, options, pruned=pruned).tensor
            solved.validate("weight")
            restored = solved.dequantize()
            assert (restored[~pruned.keep] == 0).all()
            errors[name, ordering] = problem.forward_error(restored)
    assert errors["gptq", "static"] < errors["rtn", "static"]
    assert errors["gptq", "none"] < errors["rtn", "static"]


def test_a_mask_that_keeps_everything_changes_nothing(problems: Any) -> None:
    problem, spec = problems(70, 96), IntSpec(3, 32)
    pruned = PRUNERS["magnitude"](problem.weight, None, parse_sparsity("50%"))
    everything = type(pruned)(problem.weight, torch.ones_like(pruned.keep))
    plain = METHODS["gptq"].solve(problem.weight, problem.statistics, spec).tensor
    masked = METHODS["gptq"].solve(problem.weight, problem.statistics, spec, pruned=everything).tensor
    assert torch.equal(plain.codes, masked.codes)


def test_what_cannot_work_is_said(problems: Any) -> None:
    for wrong in ("2:2", "4:2", "0:4", "0%", "100%", "half", "2-4", "70:128", "-5%"):
        with pytest.raises(UsageError, match="sparsity"):
            parse_sparsity(wrong)
    assert [str(parse_sparsity(text)) for text in ("2:4", "62.5%")] == ["2:4", "62.5%"]
    for name in ("wanda", "sparsegpt"):
        for statistics in (None, InputStatistics(8)):
            with pytest.raises(NumericsError, match="calibration"):
                PRUNERS[name](torch.ones(2, 8), statistics, parse_sparsity("2:4"))
