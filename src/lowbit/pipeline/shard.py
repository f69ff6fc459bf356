"""A worker's share of a block's forward: the block, some consecutive batches, and what is counted of them.

A shard stops where linears receive their input (:mod:`lowbit.pipeline.stages`). It is a function of the block's weights
and its batches: one that was lost is started again elsewhere, with the weights solved so far, and runs to the same
stop. How shards work together: :mod:`lowbit.pipeline.shards`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from lowbit.errors import ResourceError
from lowbit.formats import ActivationSpec
from lowbit.pipeline.inputs import RoundingLinear
from lowbit.pipeline.kv_scales import CacheRange, intercepted_attention
from lowbit.pipeline.stages import Group, Reference, Stage, StagedForward
from lowbit.pipeline.streamed import apply_block
from lowbit.quant import InputStatistics, PairedStatistics
from lowbit.quant.statistics import InputSums, add_to_panel, panel_starts

__all__ = ["Load", "Placed", "Shard", "ShardWork", "joined"]

Load: TypeAlias = Callable[[], torch.Tensor]
"""Reads one batch of hidden states."""

_Context: TypeAlias = Mapping[str, Any] | Callable[[int, int], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Placed:
    """What a solved linear computes from now on: its weight, and how it rounds its input."""

    weight: torch.Tensor
    inputs: ActivationSpec | None = None
    input_scale: torch.Tensor | None = None
    divisor: torch.Tensor | None = None

    def put(self, linear: nn.Module) -> None:
        """Into ``linear``."""
        assert isinstance(linear, RoundingLinear)
        device = linear.weight.device
        linear.weight.data = self.weight.to(device)
        scale, divisor = (None if t is None else t.to(device) for t in (self.input_scale, self.divisor))
        linear.round_inputs(self.inputs, scale, divisor)


@dataclass(frozen=True, slots=True)
class ShardWork:
    """What every shard of a block needs; the ``stages`` are those that are not solved yet.

    ``keep`` keeps the states between stages in memory, ``spill`` the inputs of a stage on the disk; ``paired`` groups
    have :class:`PairedStatistics`; ``watch_cache`` measures keys and values.
    """

    block: nn.Module
    reference: nn.Module | None
    stages: tuple[Stage, ...]
    paired: frozenset[Group]
    device: torch.device
    dtype: torch.dtype
    keep: bool
    spill: bool
    watch_cache: bool


class Shard:
    """Some batches on one worker. What was called for a stage may be called again before it is closed."""

    def __init__(self, work: ShardWork) -> None:
        self._work = work
        self._block, self._reference = work.block, work.reference
        self._stages = {stage.name: stage for stage in work.stages}
        self._forwards: dict[int, Load] = {}
        self._beside: dict[int, Load] = {}
        self._given, self._spill = _Spill(), _Spill()
        self._ranges: dict[str, CacheRange] = {}
        self._has_run = False
        self._restart()

    def _restart(self) -> None:
        """Forget how far the batches are."""
        self._running: StagedForward | None = None
        self._at = ""
        self._held: dict[Group, list[tuple[Load, Load | None]]] = {}
        self._bad: dict[Group, set[tuple[int, int]]] = {}
        self._statistics: dict[Group, InputStatistics] = {}

    def ping(self) -> None:
        """Nothing, where the worker lives."""

    def give(
        self, index: int, states: torch.Tensor | Load, beside: torch.Tensor | Load | None, context: _Context
    ) -> None:
        """Hidden states of batch ``index``, the float model's ``beside``, and what the block is called with."""
        self._forwards[index] = self._forward_of(self._block, self._loading(states), context)
        if beside is not None and self._reference is not None:
            self._beside[index] = self._forward_of(self._reference, self._loading(beside), context)

    def _loading(self, states: torch.Tensor | Load) -> Load:
        if not isinstance(states, torch.Tensor):
            return states
        return _in_memory(states) if self._work.keep else self._given.add(states)

    def _forward_of(self, block: nn.Module, load: Load, context: _Context) -> Load:
        def forward() -> torch.Tensor:
            x = load().to(self._work.device, self._work.dtype)
            return apply_block(block, x, context(x.shape[0], x.shape[1]) if callable(context) else context)

        return forward

    def _staged(self) -> StagedForward:
        if self._running is None:
            order = sorted(self._forwards)
            reference = None
            if self._reference is not None:
                reference = Reference(self._reference, [self._beside[index] for index in order])
            forwards = [self._forwards[index] for index in order]
            stages = list(self._stages.values())
            self._running = StagedForward(self._block, stages, forwards, keep=self._work.keep, reference=reference)
            self._running.__enter__()
        return self._running

    def _watched(self) -> AbstractContextManager[None]:
        """While it lasts, the keys and values of this block are measured, if its cache is to have scales."""
        if not self._work.watch_cache:
            return nullcontext()
        names = {module: name for name, module in self._block.named_modules()}

        def note(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if module in names:
                self._ranges.setdefault(names[module], CacheRange()).note(key, value)
            return key, value

        return intercepted_attention(note)

    # ---- alone: statistics are counted as the inputs come in ---------------------------------------------------

    def collect(self, name: str) -> None:
        """Run all batches to the stage ``name`` and count its inputs, of which none is kept."""
        if self._at == name:
            self.stop()

        def add(group: Group, x: torch.Tensor, beside: torch.Tensor | None) -> None:
            statistics = self._statistics.get(group)
            if statistics is None:
                kind = PairedStatistics if beside is not None and group in self._work.paired else InputStatistics
                statistics = self._statistics[group] = kind(x.shape[-1], device=x.device)
            if isinstance(statistics, PairedStatistics) and beside is not None:
                statistics.add_pair(x, beside)
            else:
                statistics.add(x)

        with self._watched():
            self._staged().advance(self._stages[name], add)
        self._at, self._has_run = name, True

    def taken(self, group: Group) -> InputStatistics | None:
        """What was counted of a group's input, which is not kept; None where no token reached it."""
        return self._statistics.pop(group, None)

    # ---- one of several: inputs are held, and sums go from shard to shard -------------------------------------

    def hold(self, name: str) -> None:
        """Run all batches to the stage ``name`` and hold its inputs."""
        if self._at == name:
            return
        self._held, self._bad = {}, {}
        holding: Callable[[torch.Tensor], Load] = self._spill.add if self._work.spill else _in_memory

        def hold(group: Group, x: torch.Tensor, beside: torch.Tensor | None) -> None:
            paired = beside is not None and group in self._work.paired
            self._held.setdefault(group, []).append((holding(x), holding(beside) if paired else None))  # type: ignore[arg-type]

        with self._watched():
            self._staged().advance(self._stages[name], hold)
        self._at, self._has_run = name, True

    def count(self, group: Group, sums: InputSums | None) -> InputSums | None:
        """``sums`` (None: of nothing) and this shard's rows."""
        bad = self._bad[group] = set()
        for batch, (load, _) in enumerate(self._held.get(group, [])):
            x = load()
            sums = InputSums(x.shape[-1], device=self._work.device) if sums is None else sums
            for part, rows in enumerate(sums.rows(x)):
                if sums.count(rows) is not rows:
                    bad.add((batch, part))
        return sums

    def panel(self, group: Group, start: int, panel: torch.Tensor | None) -> torch.Tensor | None:
        """The Gram matrix's panel from row ``start`` on (None: of nothing) and this shard's rows, once counted."""
        for batch, (load, _) in enumerate(self._held.get(group, [])):
            x = load()
            for part, rows in enumerate(InputSums(x.shape[-1], device=self._work.device).rows(x)):
                finite = rows[torch.isfinite(rows).all(dim=1)] if (batch, part) in self._bad[group] else rows
                if panel is None:
                    height = panel_starts(rows.shape[1]).step
                    panel = torch.zeros(min(height, rows.shape[1] - start), rows.shape[1] - start, device=rows.device)
                add_to_panel(panel, start, finite)
        return panel

    def pairs(self, group: Group, statistics: PairedStatistics | None) -> PairedStatistics | None:
        """``statistics`` (None: of nothing) and this shard's rows beside the float model's."""
        for load, beside in self._held.get(group, []):
            x = load()
            if statistics is None:
                statistics = PairedStatistics(x.shape[-1], device=self._work.device)
            assert beside is not None
            statistics.add_pair(x.to(self._work.device), beside().to(self._work.device))
        return statistics

    # ---- going on ---------------------------------------------------------------------------------------------

    def place(self, name: str, placed: Placed) -> None:
        """Compute with a solved linear from now on."""
        placed.put(self._block.get_submodule(name))

    def close(self, name: str) -> None:
        """All linears of a stage are placed."""
        if self._running is not None:
            self._running.close(self._stages[name])
        del self._stages[name]
        self._held, self._bad, self._statistics, self._at = {}, {}, {}, ""
        self._spill.clear()

    def output(self, index: int, beside: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The outputs of batch ``index`` and (``beside``) the float block's, once every stage is closed."""
        with self._watched():
            return self._staged().output(sorted(self._forwards).index(index), beside=beside)

    def ranges(self) -> dict[str, CacheRange]:
        """What keys and values this shard has seen, by attention module."""
        if not self._has_run:
            for index in self._forwards:
                self.output(index, False)
        return self._ranges

    def stop(self) -> None:
        """Take the hooks off the block and let its states go."""
        if self._running is not None:
            self._running.__exit__()
        self._restart()


def joined(sums: InputSums | None, *panels: torch.Tensor) -> InputStatistics | None:
    """The statistics of what was counted (None: of nothing), as :meth:`Shard.count` and :meth:`Shard.panel` left it."""
    return None if sums is None else InputStatistics.joined(sums, panels)


def _in_memory(x: torch.Tensor) -> Load:
    return lambda: x


class _Spill:
    """Tensors in a file without a name, which the page cache keeps in memory where there is room."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="lowbit-")  # noqa: SIM115

    def add(self, x: torch.Tensor) -> Load:
        """Write ``x``; what comes back reads it."""
        flat = x.detach().cpu().contiguous()
        offset = self._file.seek(0, 2)
        try:
            self._file.write(flat.view(torch.uint8).numpy().data)
            self._file.flush()
        except OSError as error:
            reason = f"{error.strerror}: free disk space there (or set TMPDIR) and run again with --resume"
            raise ResourceError(f"{tempfile.gettempdir()}: cannot store activations: {reason}") from error

        def load() -> torch.Tensor:
            out = torch.empty(flat_shape, dtype=dtype)
            self._file.seek(offset)
            self._file.readinto(out.view(torch.uint8).numpy().data)
            return out

        flat_shape, dtype = flat.shape, flat.dtype
        return load

    def clear(self) -> None:
        """Forget all of them."""
        self._file.truncate(0)
