"""The allocator against trying every choice."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import ResourceError
from lowbit.quant.allocation import Option, allocate

OPTIONS = st.dictionaries(
    st.sampled_from("abcd"), st.builds(Option, st.integers(0, 40), st.floats(0, 10, width=32)), min_size=1
)


@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(0, 160))
def test_equals_brute_force(groups: list[dict[str, Option]], budget: int) -> None:
    choices = [
        (sum(g[n].cost for g, n in zip(groups, names, strict=True)), names)
        for names in itertools.product(*groups)
        if sum(g[n].bytes for g, n in zip(groups, names, strict=True)) <= budget
    ]
    if not choices:
        with pytest.raises(ResourceError, match="more than"):
            allocate(groups, budget)
        return
    found = allocate(groups, budget)
    assert sum(g[n].bytes for g, n in zip(groups, found, strict=True)) <= budget
    assert sum(g[n].cost for g, n in zip(groups, found, strict=True)) == pytest.approx(min(choices)[0], abs=1e-5)


def test_large_budgets_are_met_closely() -> None:
    groups = [{f"{b}": Option(b * 10**8 + i, 4.0**-b * (i + 1)) for b in (2, 3, 4, 5, 6, 8)} for i in range(200)]
    budget = 87_654_321_987
    names = allocate(groups, budget)
    spent = sum(g[n].bytes for g, n in zip(groups, names, strict=True))
    assert 0.98 * budget < spent <= budget


@given(st.integers(1, 10**9), st.integers(0, 10**4), st.integers(2, 60))
def test_a_budget_that_one_option_fills_to_the_byte_is_filled(size: int, more: int, count: int) -> None:
    """Rounding sizes up would make the same choice everywhere look too large for its own size."""
    groups = [{"small": Option(7 * size, 3.0), "large": Option((7 + more) * size, 1.0)} for _ in range(count)]
    assert allocate(groups, (7 + more) * size * count) == ["large"] * count
