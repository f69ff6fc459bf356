"""One forward of a block for many batches that stops wherever quantizable linears receive their input.

At each stop, all batches have delivered the inputs of the same linears; the caller solves those linears and the
forward goes on through the solved weights. That is GPTQ's ``true_sequential`` at the price of a single forward.

Stopping keeps the intermediate states of all batches in memory. Where that is too much, ``keep=False`` runs every
batch again from the block's input up to the next stop: the same results from more arithmetic and less memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from greenlet import greenlet
from torch import nn

from lowbit.pipeline.experts import UnfusedExperts

Group = tuple[str, ...]
"""Linears (names relative to the block) that receive the same input."""


class _StoppedError(Exception):
    """Ends a batch's forward at the next stop when states are not kept; never leaves this module."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Groups of linears that can be solved together, in the order in which the block runs them."""

    name: str
    groups: tuple[Group, ...]


def discover_stages(block: nn.Module, names: Sequence[str], forward: Callable[[], object]) -> list[Stage]:
    """The stages of ``block`` in execution order, found by one small forward.

    ``names`` are the linears of interest, relative to the block. Linears inside :class:`UnfusedExperts` form two
    stages of their own; all others are grouped by the identity of their input.
    """
    stages: list[Stage] = []
    inputs: list[tuple[torch.Tensor, list[str]]] = []
    handles = []
    inside: set[str] = set()
    for path, module in block.named_modules():
        if isinstance(module, UnfusedExperts):
            inside.update(n for n in names if n.startswith(f"{path}."))

    def record(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            for tensor, group in inputs:
                if tensor is arguments[0]:
                    group.append(name)
                    return
            inputs.append((arguments[0], [name]))
            stages.append(Stage(name, ()))

        return hook

    for name in names:
        if name not in inside:
            handles.append(block.get_submodule(name).register_forward_pre_hook(record(name)))
    for path, module in block.named_modules():
        if isinstance(module, UnfusedExperts):
            module.stage_point = _expert_stages(path, module, set(names), stages)
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
        for module in block.modules():
            if isinstance(module, UnfusedExperts):
                module.stage_point = None
    groups = {group[0]: tuple(group) for _, group in inputs}
    return [
        stage if stage.groups or ":" in stage.name else Stage(stage.name, (groups[stage.name],)) for stage in stages
    ]


def _expert_stages(
    path: str, experts: UnfusedExperts, wanted: set[str], stages: list[Stage]
) -> Callable[[str, Mapping[Group, torch.Tensor]], None]:
    """A stage point that appends the stage it is called for, all experts listed whether or not they were chosen."""

    def point(kind: str, _: Mapping[Group, torch.Tensor]) -> None:
        columns = experts.names[:2] if kind == "in" else experts.names[2:]
        groups = [
            tuple(f"{path}.{i}.{c}" for c in columns if f"{path}.{i}.{c}" in wanted) for i in range(experts.count)
        ]
        stages.append(Stage(f"{path}:{kind}", tuple(group for group in groups if group)))

    return point


def is_paired(stage: Stage) -> bool:
    """Whether the same tokens arrive in every model: everywhere but inside experts."""
    return ":" not in stage.name


def split_stages(stages: Sequence[Stage], limit: int) -> list[Stage]:
    """Stages of at most ``limit`` groups each, so that only so many experts' statistics are alive at a time."""
    split: list[Stage] = []
    for stage in stages:
        parts = [stage.groups[i : i + limit] for i in range(0, len(stage.groups), limit)]
        split += [stage] if len(parts) <= 1 else [Stage(f"{stage.name}:{i}", part) for i, part in enumerate(parts)]
    return split


OnInput = Callable[[Group, torch.Tensor, torch.Tensor | None], None]
"""Told of a group's input in one batch, and of the float model's in the same places where that runs beside."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The float block that runs beside, and its forwards batch by batch.

    Experts are excepted: the two models may choose different ones for a token, so their inputs are no pairs.
    """

    block: nn.Module
    forwards: Sequence[Callable[[], torch.Tensor]]


class StagedForward:
    """Runs a block's forward stage by stage over batches, within a ``with`` statement: :meth:`advance` to a stage,
    solve its linears, :meth:`close` it; after the last, :meth:`output`.

    ``block``      the materialised block; the caller replaces weights between stages
    ``stages``     from :func:`discover_stages`
    ``forwards``   one call per batch, each running the block and returning its output
    ``reference``  the float block, run beside to the same stages; its weights stay
    """

    def __init__(
        self,
        block: nn.Module,
        stages: Sequence[Stage],
        forwards: Sequence[Callable[[], torch.Tensor]],
        *,
        keep: bool,
        reference: Reference | None = None,
    ) -> None:
        self._block = block
        self._stages = [stage for stage in stages if stage.groups]
        self._forwards = forwards
        self._keep = keep
        self._reference = reference
        self._beside: torch.Tensor | None = None
        self._open: set[str] = {stage.name for stage in self._stages}
        self._on_input: OnInput = lambda group, x, reference: None
        self._kept: dict[int, greenlet] = {}
        self._kept_beside: dict[int, greenlet] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> StagedForward:
        self._handles = self._install()
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._block.modules():
            if isinstance(module, UnfusedExperts):
                module.stage_point = None
        self._kept.clear()
        self._kept_beside.clear()

    def advance(self, stage: Stage, on_input: OnInput) -> None:
        """Run every batch up to ``stage``, the first that is not closed, and deliver its inputs batch by batch."""
        self._on_input = on_input
        try:
            for index in range(len(self._forwards)):
                if self._reference is not None and is_paired(stage):
                    self._until_stop(self._kept_beside, index, self._reference.forwards[index])
                self._until_stop(self._kept, index, self._forwards[index])
        finally:
            self._on_input = lambda group, x, reference: None

    def close(self, stage: Stage) -> None:
        """The linears of ``stage`` are solved: nothing stops there any more."""
        self._open.discard(stage.name)

    def output(self, index: int, *, beside: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The outputs of batch ``index`` and (``beside``) the float block's, once all stages are closed."""
        other = None
        if self._reference is not None and beside:
            other = self._to_the_end(self._kept_beside, index, self._reference.forwards[index])
        return self._to_the_end(self._kept, index, self._forwards[index]), other

    def _until_stop(self, kept: dict[int, greenlet], index: int, forward: Callable[[], torch.Tensor]) -> None:
        if self._keep:
            kept.setdefault(index, greenlet(forward)).switch()
            return
        try:
            forward()
        except _StoppedError:
            return

    @staticmethod
    def _to_the_end(kept: dict[int, greenlet], index: int, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        begun = kept.pop(index, None)
        return forward() if begun is None else begun.switch()

    def _stop(self) -> None:
        if not self._keep:
            raise _StoppedError
        main = greenlet.getcurrent().parent
        main.switch()

    def _install(self) -> list[torch.utils.hooks.RemovableHandle]:
        handles = []
        modules = dict(self._block.named_modules())
        others = {} if self._reference is None else dict(self._reference.block.named_modules())
        for stage in self._stages:
            if not is_paired(stage):
                continue

            def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...], stage: Stage = stage) -> None:
                if stage.name in self._open:
                    self._on_input(stage.groups[0], arguments[0], self._beside)
                    self._beside = None
                    self._stop()

            def look(_: nn.Module, arguments: tuple[torch.Tensor, ...], stage: Stage = stage) -> None:
                if stage.name in self._open:
                    self._beside = arguments[0]
                    self._stop()

            handles.append(modules[stage.name].register_forward_pre_hook(hook))
            if others:
                handles.append(others[stage.name].register_forward_pre_hook(look))
        for path, module in modules.items():
            if isinstance(module, UnfusedExperts):
                module.stage_point = self._expert_point(path)
        return handles

    def _expert_point(self, path: str) -> Callable[[str, Mapping[Group, torch.Tensor]], None]:
        def point(kind: str, inputs: Mapping[Group, torch.Tensor]) -> None:
            by_linear = {f"{path}.{name}": names for names in inputs for name in names}
            for stage in self._stages:
                if stage.name.split(":")[:2] != [path, kind] or stage.name not in self._open:
                    continue
                for group in stage.groups:
                    if group[0] in by_linear:
                        self._on_input(group, inputs[by_linear[group[0]]], None)
                self._stop()

        return point
