"""The best of several methods against the errors of each alone, by forwards in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowbit.errors import NumericsError, UsageError
from lowbit.formats import CodebookSpec, FloatSpec, IntSpec, WeightSpec, parse_spec
from lowbit.quant import METHODS, BestOptions, InputStatistics, Pace, PairedStatistics
from lowbit.quant.best import CANDIDATES, choose, parse_budget
from lowbit.quant.rtn import RtnOptions, round_to_nearest
from lowbit.quant.sparse import PRUNERS, parse_sparsity

SPECS = ["int3-g32-sym", "int2-g32-asym", "int4-g64-affine", "nvfp4", "nf4-b64"]


def paired(problem: Any, drift: float = 0.2) -> tuple[PairedStatistics, torch.Tensor]:
    """Statistics of the problem's inputs beside others that are correlated with them; and those others."""
    features = problem.inputs.shape[1]
    turn = torch.randn(features, features, generator=torch.Generator().manual_seed(7)) / features**0.5
    reference = problem.inputs + drift * problem.inputs @ turn
    statistics = PairedStatistics(features)
    statistics.add_pair(problem.inputs, reference)
    return statistics, reference


def alone(name: str, problem: Any, statistics: InputStatistics, spec: WeightSpec) -> torch.Tensor | None:
    method = METHODS[name]
    return None if method.supports(spec) else method.solve(problem.weight, statistics, spec).tensor.dequantize()


@pytest.mark.parametrize("text", SPECS)
def test_the_winner_has_the_least_output_error_of_all(text: str, problems: Any) -> None:
    """Towards the original weights (strength 0), the squared error of the outputs, forwards and in float64."""
    problem, spec = problems(48, 128), parse_spec(text)
    solution = METHODS["best"].solve(problem.weight, problem.statistics, spec, BestOptions(strength=0.0))
    won = problem.forward_error(solution.tensor.dequantize())
    others = {name: alone(name, problem, problem.statistics, spec) for name in ("rtn", "hqq", "gptq")}
    errors = {name: problem.forward_error(other) for name, other in others.items() if other is not None}
    assert set(solution.errors) == set(errors)
    assert won <= min(errors.values()) * (1 + 1e-5)
    assert solution.method == min(errors, key=errors.__getitem__)
    for name, error in errors.items():
        assert solution.errors[name] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_what_is_wanted_are_the_float_models_outputs(strength: float, problems: Any) -> None:
    """The quantity compared is, up to what no candidate can change, the distance to the float model's outputs."""
    problem, spec = problems(32, 96), IntSpec(3, 32)
    statistics, reference = paired(problem)
    solution = METHODS["best"].solve(problem.weight, statistics, spec, BestOptions(strength=strength))
    assert set(solution.errors) == {"rtn", "gptq", "gptaq"}
    x, gap = problem.inputs.double(), (reference - problem.inputs).double()
    # the part of the gap that a linear map of the inputs can reach
    reachable = x @ torch.linalg.solve(x.T @ x, x.T @ gap)
    goal = x @ problem.weight.double().T + strength * reachable @ problem.weight.double().T
    distances = {}
    for name in solution.errors:
        found = alone(name, problem, statistics, spec)
        assert found is not None
        distances[name] = float((x @ found.double().T - goal).square().sum() / goal.square().sum())
    assert solution.method == min(distances, key=distances.__getitem__) == "gptaq"
    for name, distance in distances.items():
        assert solution.errors[name] == pytest.approx(distance, rel=0.1)


def test_the_same_bits_every_time_and_after_a_scaling(problems: Any) -> None:
    problem, spec = problems(24, 64), IntSpec(3, 32)
    found = [METHODS["best"].solve(problem.weight, problem.statistics, spec, transform="awq") for _ in range(2)]
    assert torch.equal(found[0].tensor.codes, found[1].tensor.codes)  # type: ignore[union-attr]
    assert set(found[0].errors) == {"awq+rtn", "awq", "awq+gptq"}


def test_zeros_of_a_pruner_stay(problems: Any) -> None:
    problem = problems(24, 64)
    pruned = PRUNERS["wanda"](problem.weight, problem.statistics, parse_sparsity("2:4"))
    solution = METHODS["best"].solve(problem.weight, problem.statistics, IntSpec(4, 32), pruned=pruned)
    assert not bool(solution.tensor.dequantize()[~pruned.keep].any())
    assert set(solution.errors) == {"rtn", "gptq"}


def test_time_that_runs_out_leaves_the_dearer_out() -> None:
    """Each weight has its share of the time; what is not used is there later, and the first is always tried."""
    now = [0.0]
    weight, spec = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), IntSpec(4, 32)

    def attempt(seconds: float) -> Any:
        def solve() -> Any:
            now[0] += seconds
            return round_to_nearest(weight, None, spec, RtnOptions())

        return solve

    pace = Pace(seconds=100.0, weights=40, clock=lambda: now[0])
    attempts = {"first": attempt(1.0), "second": attempt(20.0), "third": attempt(1.0)}
    late = []
    for _ in range(4):
        solution = choose(lambda: weight, None, attempts, pace, 10)
        late.append(solution.left_out)
        pace.done += 10
    # 22 s are used each time, of 40 at first and 20 more each time
    assert late == [(), (), (), ()]
    pace = Pace(seconds=40.0, weights=40, clock=lambda: now[0])
    late = []
    for _ in range(4):
        late.append(choose(lambda: weight, None, attempts, pace, 10).left_out)
        pace.done += 10
    # the first time nothing is known of the second; 16 s are there then and 8 more each time, never enough again
    assert late == [("third",), ("second",), ("second",), ("second",)]
    spent = Pace(seconds=40.0, weights=40, spent=50.0, clock=lambda: now[0])
    assert choose(lambda: weight, None, attempts, spent, 10).left_out == ("second", "third")


def test_a_candidate_that_fails_is_passed_over(problems: Any) -> None:
    problem, spec = problems(8, 32), IntSpec(4, 32)

    def broken() -> Any:
        raise NumericsError("cannot be factorised")

    def rounded() -> Any:
        return round_to_nearest(problem.weight, None, spec, RtnOptions())

    attempts = {"broken": broken, "rounded": rounded}
    solution = choose(lambda: problem.weight, problem.statistics, attempts, Pace.unlimited(), 1)
    assert solution.method == "rounded"
    assert "broken failed: cannot be factorised" in solution.notes
    with pytest.raises(NumericsError, match="broken failed"):
        choose(lambda: problem.weight, problem.statistics, {"broken": broken}, Pace.unlimited(), 1)


def test_candidates_that_a_format_has_no_place_for_are_passed_over(problems: Any) -> None:
    problem = problems(16, 64)
    for text, expected in (("int4-g32-asym", {"rtn", "hqq", "gptq"}), ("fp8-channel", {"rtn", "gptq"})):
        spec = parse_spec(text)
        assert isinstance(spec, IntSpec | FloatSpec | CodebookSpec)
        assert set(METHODS["best"].solve(problem.weight, problem.statistics, spec).errors) == expected
    with pytest.raises(NumericsError, match="none of the candidates hqq can be used"):
        METHODS["best"].solve(problem.weight, problem.statistics, IntSpec(4, 32), BestOptions(candidates=("hqq",)))


def test_what_cannot_be_meant_is_said() -> None:
    assert [parse_budget(text) for text in ("30m", "1.5h", "90s", "90")] == [1800, 5400, 90, 90]
    for wrong in ("", "x", "0m", "-1s", "5 days"):
        with pytest.raises(UsageError, match="--budget"):
            parse_budget(wrong)
    for given in ({"candidates": ("autoround",)}, {"candidates": ()}, {"candidates": "rtn"}, {"strength": 2.0}):
        with pytest.raises(UsageError, match=next(iter(given))):
            BestOptions(**given)  # type: ignore[arg-type]
    assert set(METHODS) - set(CANDIDATES) == {"autoround", "best"}
