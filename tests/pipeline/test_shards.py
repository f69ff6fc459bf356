"""Shards of a block's forward, in any number and with losses, give the bits of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from scattered import Scattered
from torch import nn

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import ResourceError
from lowbit.pipeline.executor import Executor, Here
from lowbit.pipeline.shard import Placed
from lowbit.pipeline.shards import Shards
from lowbit.pipeline.stages import discover_stages
from lowbit.pipeline.streamed import StreamedModel
from lowbit.quant import InputStatistics, PairedStatistics
from lowbit.quant.statistics import InputSums, add_to_panel, panel_starts

BATCHES = 7


def _bits(value: Any) -> Any:
    """Something that is equal for equal bits only."""
    if isinstance(value, torch.Tensor):
        return (value.shape, value.dtype, value.contiguous().view(torch.uint8).numpy().tobytes())
    if isinstance(value, InputStatistics):
        return {name: _bits(tensor) for name, tensor in value.state().items()}
    return value


def _run(path: Path, executor: Executor, *, paired: bool = False, broken: bool = False, **options: Any) -> Any:
    """Statistics, outputs and key-value ranges of a block whose linears are all halved, as bits."""
    model = StreamedModel(open_checkpoint(path))
    ids = torch.randint(3, 320, (BATCHES, 24), generator=torch.Generator().manual_seed(1))
    hidden = model.embed(ids)
    if broken:
        hidden[3, 5, 7] = float("nan")
    blocks = (model.load_block(0), model.load_block(0) if paired else None)
    names = [name for name, module in blocks[0].named_modules() if isinstance(module, nn.Linear)]
    stages = discover_stages(blocks[0], names, lambda: model.run_block(blocks[0], 0, model.embed(ids[:1])))
    loads = [lambda i=i: hidden[i : i + 1] for i in range(BATCHES)]
    beside = [lambda i=i: hidden[i : i + 1] + 0.1 for i in range(BATCHES)] if paired else None
    groups = {group for stage in stages for group in stage.groups} if paired else set()
    found: dict[Any, Any] = {}
    shards = Shards(
        executor,
        model,
        0,
        blocks,
        stages,
        loads,
        beside,
        paired=groups,
        **{"keep": True, "watch_cache": True} | options,
    )
    with torch.no_grad(), shards:
        for stage in stages:

            def solve(stage: Any = stage) -> None:
                shards.advance(stage)
                for group in stage.groups:
                    found[group] = _bits(executor.result(shards.statistics(stage, group)))

            shards.insist(solve)
            linears = {name: blocks[0].get_submodule(name) for group in stage.groups for name in group}
            shards.place({n: Placed(each.weight * 0.5) for n, each in linears.items() if isinstance(each, nn.Linear)})
            shards.close(stage)
        shards.outputs(lambda index, out, other: found.__setitem__(index, (_bits(out), _bits(other))))
        scales = {name: seen.scales("fp8") for name, seen in shards.ranges().items()}
        found["cache"] = {name: _bits(scale.key) for name, scale in scales.items() if scale is not None}
        assert found["cache"]
    assert not any(module._forward_pre_hooks for module in blocks[0].modules())
    return found


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_any_number_of_shards_gives_the_bits_of_one(
    family: str, paired: bool, workers: int, checkpoint_of: Callable[[str], Path]
) -> None:
    path = checkpoint_of(family)
    expected = _run(path, Here(), paired=paired)
    with Scattered(workers, seed=workers) as executor:
        assert _run(path, executor, paired=paired) == expected
        assert len(executor.by_worker) >= min(workers, BATCHES)


@pytest.mark.parametrize("options", [{"keep": False}, {"spill": True}], ids=str)
def test_little_memory_changes_nothing(options: dict[str, bool], tiny_llama: Path) -> None:
    expected = _run(tiny_llama, Here())
    assert _run(tiny_llama, Here(), **options) == expected
    with Scattered(3) as executor:
        assert _run(tiny_llama, executor, **options) == expected


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("at", [2, 9, 25, 60, 77])
def test_lost_workers_change_nothing(at: int, keep: bool, tiny_llama: Path) -> None:
    expected = _run(tiny_llama, Here())
    with Scattered(3, losses=(at, at + 3)) as executor:
        assert _run(tiny_llama, executor, keep=keep) == expected
        assert executor.lost == 2


def test_fewer_workers_than_before_take_over(tiny_llama: Path) -> None:
    with Scattered(3, losses=(30,), spare=0) as executor:
        assert _run(tiny_llama, executor) == _run(tiny_llama, Here())
        assert executor.workers == 2


def test_nobody_left_is_said(tiny_llama: Path) -> None:
    with Scattered(1, losses=(12,), spare=0) as executor, pytest.raises(ResourceError, match="no worker"):
        _run(tiny_llama, executor)


def test_rows_that_are_not_finite_are_left_out_by_every_number_of_shards(tiny_llama: Path) -> None:
    expected = _run(tiny_llama, Here(), broken=True)
    with Scattered(3) as executor:
        assert _run(tiny_llama, executor, broken=True) == expected


@pytest.mark.parametrize("features", [1, 512, 513, 1100])
def test_panels_join_to_the_gram_matrix(features: int) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(700, features, generator=generator)
    whole, sums = InputStatistics(features), InputSums(features)
    panels = [torch.zeros(min(512, features - start), features - start) for start in panel_starts(features)]
    for rows in torch.split(inputs, 300):
        whole.add(rows)
        sums.count(rows)
        for start, panel in zip(panel_starts(features), panels, strict=True):
            add_to_panel(panel, start, rows)
    joined = InputStatistics.joined(sums, panels)
    assert _bits(joined) == _bits(whole)
    expected = inputs.double().T @ inputs.double()
    torch.testing.assert_close(joined.gram.double(), expected, rtol=1e-4, atol=1e-3)
    paired = PairedStatistics(features)
    paired.add_pair(inputs, inputs)
    assert torch.equal(paired.cross, torch.zeros_like(paired.cross))
