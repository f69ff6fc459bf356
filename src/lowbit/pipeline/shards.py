"""A block's forward over the calibration batches, in shards on the workers of an executor.

Statistics are sums of floats, which depend on the order of the terms. So that any number of shards gives the bits of
one, the sums go from shard to shard and each adds its rows where the one before left off. The Gram matrix goes in
panels of 512 rows: while the second shard works on the first panel, the first works on the second. What travels is the
matrix, whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from lowbit.pipeline.executor import Executor, Ref, WorkerLostError, insist
from lowbit.pipeline.kv_scales import CacheRange
from lowbit.pipeline.shard import Load, Placed, Shard, ShardWork, joined
from lowbit.pipeline.stages import Group, Stage, is_paired
from lowbit.pipeline.streamed import StreamedModel
from lowbit.quant.statistics import panel_starts

__all__ = ["Shards"]

_UNDER_WAY = 2
"""Batches that are on their way to or from each shard at a time."""


class Shards:
    """All shards of one block, on an executor's workers.

    ``batches``  the block's inputs, batch by batch, and ``beside`` the float model's
    ``paired``   groups that want :class:`PairedStatistics`
    The block itself is changed by :meth:`place` only; :meth:`insist` makes up for lost workers.
    """

    def __init__(
        self,
        executor: Executor,
        model: StreamedModel,
        index: int,
        blocks: tuple[nn.Module, nn.Module | None],
        stages: Sequence[Stage],
        batches: Sequence[Load],
        beside: Sequence[Load] | None,
        *,
        keep: bool,
        paired: Collection[Group] = (),
        spill: bool = False,
        watch_cache: bool = False,
    ) -> None:
        self._executor, self._model, self._index = executor, model, index
        self._batches, self._beside = batches, beside
        self._blocks = blocks
        self._open = list(stages)
        self._keep, self._spill, self._watch_cache = keep, spill or not keep, watch_cache
        self._paired = frozenset(paired)
        count = max(1, min(executor.workers, len(batches)))
        edges = [len(batches) * part // count for part in range(count + 1)]
        self._parts = [range(first, last) for first, last in pairwise(edges)]
        self._targets: list[Any] = [None] * count
        self._contexts: dict[tuple[int, int], Ref] = {}
        self._unchecked: list[Ref] = []

    def __enter__(self) -> Shards:
        self.insist(self._start_missing)
        return self

    def __exit__(self, *_: object) -> None:
        for target in self._targets:
            if target is not None:
                self._executor.call(target, "stop")
                self._executor.stop(target)

    # ---- workers ----------------------------------------------------------------------------------------------

    def insist(self, work: Callable[[], None]) -> None:
        """Do ``work``, again from its beginning whenever a worker is lost, whose shards are started elsewhere."""
        insist(work, self._recover)

    def _recover(self) -> None:
        self._executor.mend()
        with suppress(WorkerLostError):
            self._check()
        for place, target in enumerate(self._targets):
            if target is None:
                continue
            try:
                self._executor.result(self._executor.call(target, "ping"))
            except WorkerLostError:
                self._targets[place] = None
        self._start_missing()

    def _start_missing(self) -> None:
        missing = [place for place, target in enumerate(self._targets) if target is None]
        if not missing:
            return
        work = self._executor.share(
            ShardWork(
                *self._blocks,
                tuple(self._open),
                self._paired,
                self._model.device,
                self._model.dtype,
                self._keep,
                self._spill,
                self._watch_cache,
            )
        )
        started = {place: self._executor.start(Shard, work) for place in missing}
        try:
            self._give_all(started)
        except WorkerLostError:
            for target in started.values():
                self._executor.stop(target)
            raise
        for place, target in started.items():
            self._targets[place] = target

    def _give_all(self, started: Mapping[int, Any]) -> None:
        """Send new shards, by their places, their batches."""
        sent: list[Ref] = []
        for offset in range(max(len(self._parts[place]) for place in started)):
            for place, target in started.items():
                if offset < len(self._parts[place]):
                    sent.append(self._give(target, self._parts[place][offset]))
            while len(sent) > _UNDER_WAY * len(started):
                self._executor.result(sent.pop(0))
        for ref in sent:
            self._executor.result(ref)

    def _give(self, target: Any, batch: int) -> Ref:
        states: torch.Tensor | Load = self._batches[batch]
        beside: torch.Tensor | Load | None = None if self._beside is None else self._beside[batch]
        context: Any = self._context
        if self._executor.apart:
            states = self._batches[batch]()
            beside = None if self._beside is None else self._beside[batch]()
            shape = (states.shape[0], states.shape[1])
            if shape not in self._contexts:
                self._contexts[shape] = self._executor.share(self._context(*shape))
            context = self._contexts[shape]
        return self._executor.call(target, "give", batch, states, beside, context)

    def _context(self, batch: int, length: int) -> dict[str, Any]:
        return self._model.context(self._index, batch, length)

    # ---- stage by stage ---------------------------------------------------------------------------------------

    def advance(self, stage: Stage) -> None:
        """Run all batches to ``stage``. May be called again for it."""
        self._check()
        method = "collect" if len(self._targets) == 1 else "hold"
        for ref in [self._executor.call(target, method, stage.name) for target in self._targets]:
            self._executor.result(ref)

    def _check(self) -> None:
        """Raise what calls that nobody waited for have raised; a worker's loss last."""
        lost: WorkerLostError | None = None
        while self._unchecked:
            try:
                self._executor.result(self._unchecked.pop())
            except WorkerLostError as error:
                lost = error
        if lost is not None:
            raise lost

    def statistics(self, stage: Stage, group: Group) -> Ref:
        """Statistics of the input of a group of ``stage``, of all batches; None where no token reached it."""
        if len(self._targets) == 1:
            return self._executor.call(self._targets[0], "taken", group)
        if group in self._paired and is_paired(stage):
            return self._through(group, "pairs")
        linear = self._blocks[0].get_submodule(group[0])
        assert isinstance(linear, nn.Linear)
        sums = self._through(group, "count")
        panels = [self._through(group, "panel", start) for start in panel_starts(linear.in_features)]
        return self._executor.submit(joined, sums, *panels)

    def _through(self, group: Group, method: str, *arguments: Any) -> Ref:
        """What ``method`` comes to when it has gone through all shards in the order of their batches."""
        so_far = None
        for target in self._targets:
            so_far = self._executor.call(target, method, group, *arguments, so_far)
        return so_far

    def place(self, solved: Mapping[str, Placed]) -> None:
        """Compute with solved linears from now on, in the block and in all shards."""
        for name, placed in solved.items():
            placed.put(self._blocks[0].get_submodule(name))
            if self._executor.apart:
                shared = self._executor.share(placed)
                self._unchecked += [self._executor.call(target, "place", name, shared) for target in self._targets]

    def close(self, stage: Stage) -> None:
        """All linears of ``stage`` are placed."""
        self._open.remove(stage)
        self._unchecked += [self._executor.call(target, "close", stage.name) for target in self._targets]

    def outputs(
        self, on_output: Callable[[int, torch.Tensor, torch.Tensor | None], None], *, beside: bool = True
    ) -> None:
        """Hand over each batch's outputs and (``beside``) the float block's, once every stage is closed.

        Shards take turns, so that all of them work.
        """
        left = set(range(len(self._batches)))

        def work() -> None:
            self._check()
            sent: list[tuple[int, Ref]] = []
            longest = max(len(part) for part in self._parts)
            turns = [
                (part[turn], place)
                for turn in range(longest)
                for place, part in enumerate(self._parts)
                if turn < len(part)
            ]
            for batch, place in turns:
                if batch in left:
                    sent.append((batch, self._executor.call(self._targets[place], "output", batch, beside)))
                if len(sent) > _UNDER_WAY * len(self._parts):
                    hand_over(*sent.pop(0))
            while sent:
                hand_over(*sent.pop(0))

        def hand_over(batch: int, ref: Ref) -> None:
            output, other = self._executor.result(ref)
            on_output(batch, output, other)
            left.discard(batch)

        self.insist(work)

    def pause(self) -> None:
        """Take the hooks off the block; :meth:`outputs` puts them on again."""
        self._unchecked += [self._executor.call(target, "stop") for target in self._targets]

    def ranges(self) -> dict[str, CacheRange]:
        """What keys and values all batches have seen, by attention module."""
        found: dict[str, CacheRange] = {}

        def work() -> None:
            found.clear()
            for ref in [self._executor.call(target, "ranges") for target in self._targets]:
                for name, seen in self._executor.result(ref).items():
                    found.setdefault(name, CacheRange()).join(seen)

        self.insist(work)
        return found
