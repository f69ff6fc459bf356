"""Loops and jobs on several threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lowbit.kernels.threads import over_rows, workers


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def parts(rows: int, tile: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    over_rows(rows, tile, lambda begin, end: found.append((begin, end)))
    return sorted(found)


@pytest.mark.parametrize(("rows", "tile", "count"), [(100, 1, 3), (100, 8, 3), (5, 8, 1), (17, 8, 3), (0, 8, 0)])
def test_parts_cover_the_rows_once(rows: int, tile: int, count: int) -> None:
    found = parts(rows, tile)
    assert len(found) == count
    assert [row for begin, end in found for row in range(begin, end)] == list(range(rows))
    assert all(begin % tile == 0 for begin, _ in found)


def test_a_worker_has_one_thread() -> None:
    with workers() as pool:
        assert pool.submit(parts, 100, 1).result() == [(0, 100)]
        assert pool.submit(parts, 0, 1).result() == []
    assert len(parts(100, 1)) == 3


def test_an_error_of_any_part_is_raised() -> None:
    def loop(begin: int, end: int) -> None:
        if end == 9:
            raise ValueError("the last part")

    with pytest.raises(ValueError, match="the last part"):
        over_rows(9, 1, loop)
