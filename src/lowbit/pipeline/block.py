"""Quantize one block: statistics in, solved linears and folded norms out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from lowbit.checkpoint import Checkpoint
from lowbit.codecs import Codec, read_dense
from lowbit.codecs.names import owner
from lowbit.formats import QuantizedTensor, WeightTensor
from lowbit.pipeline.attempts import options_of
from lowbit.pipeline.executor import Executor, Here, Ref, insist
from lowbit.pipeline.experts import UnfusedExperts
from lowbit.pipeline.folding import Folds, divided
from lowbit.pipeline.inputs import InputScales, RoundingLinear
from lowbit.pipeline.kv_scales import CacheRange
from lowbit.pipeline.module_plan import ModulePlan
from lowbit.pipeline.progress import Progress, Silent
from lowbit.pipeline.recipe import Recipe
from lowbit.pipeline.refine import Learnable, refine
from lowbit.pipeline.shard import Load, Placed
from lowbit.pipeline.shards import Shards
from lowbit.pipeline.solving import ModuleReport, Problem, Result, Solved, joined_weight, search, solve, solve_part
from lowbit.pipeline.stages import Group, Stage, discover_stages, split_stages
from lowbit.pipeline.streamed import StreamedModel, model_dtype
from lowbit.quant import METHODS, AutoRoundOptions, Pace, weight_error
from lowbit.quant.methods import Options

__all__ = ["Beside", "BlockQuantizer", "Load", "ModuleReport"]

STARVED_SHARE = 0.005
"""An expert that saw less than this share of the calibration tokens is solved without statistics."""


OnOutput = Callable[[int, torch.Tensor], None]
"""Gets the outputs of a batch."""


@dataclass(frozen=True, slots=True)
class Beside:
    """The float model's hidden states: its inputs of the block in the same batches, and who gets its outputs.

    ``outputs`` read what was handed over.
    """

    batches: Sequence[Load]
    on_output: OnOutput
    outputs: Sequence[Load]


class BlockQuantizer:
    """Quantizes the planned linears of one block while its forward runs.

    ``plans`` maps names relative to the block to what is planned for them; linears without a plan stay dense.
    ``pace`` limits methods that try others (None: no limit); ``executor`` has the workers (None: this process).
    """

    def __init__(
        self,
        model: StreamedModel,
        index: int,
        plans: Mapping[str, ModulePlan],
        recipe: Recipe,
        codec: Codec,
        calibration_tokens: int,
        progress: Progress | None = None,
        pace: Pace | None = None,
        executor: Executor | None = None,
    ) -> None:
        self.executor: Executor = executor or Here()
        self.model = model
        self.index = index
        self.pace = pace or Pace.unlimited()
        self.block = model.load_block(index)
        self.plans = plans
        self.recipe = recipe
        self.codec = codec
        self.calibration_tokens = calibration_tokens
        self.progress = progress or Silent()
        self.reports: list[ModuleReport] = []
        self._solved: dict[str, WeightTensor] = {}
        self._input_scales = InputScales()
        self._cache_ranges: dict[str, CacheRange] = {}
        self._folds = Folds(self.block, model.family, self._stored, self._solved)
        self._learnable: dict[str, Learnable] = {}
        for module in self.block.modules():
            if isinstance(module, UnfusedExperts):
                module.all_tokens = recipe.all_experts
        self.linears = [n for n, m in self.block.named_modules() if isinstance(m, nn.Linear)]

    # ---- with calibration --------------------------------------------------------------------------------------

    def run(
        self,
        batches: Sequence[Load],
        on_output: OnOutput,
        *,
        stages: Sequence[Stage],
        keep: bool,
        group_limit: int,
        beside: Beside | None = None,
    ) -> None:
        """Solve stage by stage over ``batches`` of hidden states and hand the quantized block's outputs over.

        ``beside`` has the same batches of the float model.
        """
        planned = [replace(stage, groups=tuple(g for g in stage.groups if self._planned(g))) for stage in stages]
        groups = {group for stage in planned for group in stage.groups}
        tuned = [plan for plan in self.plans.values() if METHODS[plan.method].scope == "block"]
        parts = split_stages([stage for stage in planned if stage.groups], group_limit)
        forward = Shards(
            self.executor,
            self.model,
            self.index,
            (self.block, None if beside is None else self.model.load_block(self.index)),
            parts,
            batches,
            None if beside is None else beside.batches,
            keep=keep,
            paired=[g for g in groups if any(self.plans[name].needs_reference for name in self._planned(g))],
            spill=self.recipe.all_experts,
            watch_cache=self.recipe.kv_cache is not None,
        )

        def hand_over(batch: int, output: torch.Tensor, other: torch.Tensor | None) -> None:
            if beside is not None and other is not None:
                beside.on_output(batch, other)
            if not tuned or other is None:
                on_output(batch, output)

        with forward:
            for stage in parts:
                self._solve_stage(forward, stage)
            forward.outputs(hand_over)
            if tuned and beside is not None:
                forward.pause()
                self._refine(options_of(self.recipe, tuned[0]), batches, beside.outputs)
                forward.outputs(hand_over, beside=False)
            self._cache_ranges = forward.ranges() if self.recipe.kv_cache is not None else {}

    def _planned(self, group: Group) -> list[str]:
        return [name for name in group if name in self.plans]

    def _solve_stage(self, forward: Shards, stage: Stage) -> None:
        left = list(stage.groups)

        def work() -> None:
            forward.advance(stage)
            self._solve_groups(left, partial(forward.statistics, stage), forward)

        forward.insist(work)
        forward.close(stage)

    def _refine(self, options: Options, batches: Sequence[Load], outputs: Sequence[Load]) -> None:
        """Tune the solved linears together so that ``batches`` come out as the float block's ``outputs``."""
        assert isinstance(options, AutoRoundOptions)
        pairs = list(zip(batches, outputs, strict=True))
        tuned = refine(
            self._learnable, self.block, lambda x: self.model.run_block(self.block, self.index, x), pairs, options
        )
        changed = {
            self.full_name(name): weight_error(self._learnable[name].weight, q.dequantize())
            for name, q in tuned.items()
        }
        for name, q in tuned.items():
            rows = self._folds.divided.get(name)
            self._solved[name] = q if rows is None else divided(q, rows)
        self.reports = [
            replace(r, weight_error=changed[r.name].relative, error=None) if r.name in changed else r
            for r in self.reports
        ]

    def stages(self, load: Callable[[], torch.Tensor]) -> list[Stage]:
        """The block's stages, found by one forward of one batch."""
        return discover_stages(
            self.block, self.linears, lambda: self.model.run_block(self.block, self.index, load()[:1])
        )

    # ---- solving -----------------------------------------------------------------------------------------------

    def solve_without_statistics(self) -> None:
        """Solve every planned linear from its weights alone."""
        left: list[Group] = [(name,) for name in self.plans]
        insist(partial(self._solve_groups, left, lambda group: None, None), self.executor.mend)

    def _solve_groups(self, left: list[Group], statistics: Callable[[Group], Ref], forward: Shards | None) -> None:
        """Solve the groups ``left``, a few at a time, each taken off when it is in its place."""
        limit = 2 * self.executor.workers if self.executor.apart else 1
        begun: deque[tuple[Group, list[Ref]]] = deque()
        for group in list(left):
            begun.append((group, self._begin(group, statistics(group), len(left))))
            if len(begun) >= limit:
                self._end(*begun.popleft(), left, forward)
        while begun:
            self._end(*begun.popleft(), left, forward)

    def _begin(self, group: Group, statistics: Ref, groups: int) -> list[Ref]:
        """Have a group solved, one of ``groups`` at hand; results of it all or, for more workers, of its parts."""
        planned = self._planned(group)
        needs = any(self.plans[name].needs_statistics for name in planned)
        problem = Problem(
            {name: self._linear(name).weight.data for name in planned},
            {name: self.plans[name] for name in planned},
            {name: self.full_name(name) for name in planned},
            self.recipe,
            self._folds.producer(group[0]),
            max(1, STARVED_SHARE * self.calibration_tokens) if needs else 0.0,
        )
        if not self.executor.apart:
            return [self.executor.submit(solve, problem, statistics, self.pace, self.progress.at)]
        self.progress.at(self.full_name(planned[0]))
        parts = problem.parts()
        if len(parts) == 1 or groups >= self.executor.workers:
            return [self.executor.submit(solve, problem, statistics)]
        fold = self.executor.submit(search, problem, statistics)
        return [self.executor.submit(solve_part, part, statistics, fold) for part in parts]

    def _end(self, group: Group, refs: list[Ref], left: list[Group], forward: Shards | None) -> None:
        """Put what was solved of a group in its place."""
        results: list[Result] = [self.executor.result(ref) for ref in refs]
        fold, largest = results[0].fold, results[0].largest
        scales = None if fold is None else fold.scales
        if fold is not None:
            self._folds.apply(fold)
        if largest is not None:
            for name in self._planned(group):
                self._input_scales.note(name, largest)
        for solved in (linear for result in results for linear in result.linears):
            self._place(solved, scales, forward)
        for name in group:
            if scales is not None and name not in self.plans:
                self._folds.overrides[f"{name}.weight"] = self._linear(name).weight * scales
        left.remove(group)

    def _place(self, solved: Solved, scales: torch.Tensor | None, forward: Shards | None) -> None:
        """Put a solved linear in its place; its input was multiplied by ``scales``."""
        name, linear, plan = solved.name, self._linear(solved.name), self.plans[solved.name]
        # what method best chose may have a transform's name before it
        method = METHODS.get(solved.report.method)
        if method is not None and method.scope == "block" and isinstance(solved.tensor, QuantizedTensor):
            weight = joined_weight([linear.weight.data], scales)
            self._learnable[name] = Learnable(linear, weight, solved.tensor, scales)
        placed = Placed(solved.weight, plan.inputs, self._input_scales.of(name, plan.inputs), scales)
        if forward is None:
            placed.put(linear)
        else:
            forward.place({name: placed})
        self._solved[name] = solved.tensor
        self.reports.append(solved.report)

    def _linear(self, name: str) -> RoundingLinear:
        module = self.block.get_submodule(name)
        assert isinstance(module, RoundingLinear)
        return module

    # ---- output ------------------------------------------------------------------------------------------------

    def full_name(self, name: str) -> str:
        """The checkpoint's name of a module of this block."""
        return self.model.stored_name(f"{self.model.block_names[self.index]}.{name}")

    def _stored(self, name: str) -> torch.Tensor:
        """A parameter of this block in the precision that it is kept in."""
        stored = self.full_name(name)
        tensor = read_dense(self.checkpoint, self.model.plan, stored)
        info = self.checkpoint.tensors.get(stored)
        return tensor.to(model_dtype(self.checkpoint) if info is None else info.dtype)

    @property
    def checkpoint(self) -> Checkpoint:
        """The source."""
        return self.model.checkpoint

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the block as it goes to the file, by the checkpoint's names."""
        out: dict[str, torch.Tensor] = {}
        handled: set[str] = set()
        for name, _ in self.block.named_parameters():
            module, _, last = name.rpartition(".")
            handled.add(self.full_name(name))
            if last == "weight" and module in self._solved:
                inputs = self.plans[module].inputs
                scale = self._input_scales.of(module, inputs)
                for local, tensor in self.codec.encode(self._solved[module], scale, inputs=inputs).items():
                    out[f"{self.full_name(module)}.{local}"] = tensor.contiguous().cpu()
                continue
            kept = self._stored(name)
            override = self._folds.overrides.get(name)
            out[self.full_name(name)] = kept if override is None else override.to("cpu", kept.dtype).contiguous()
        for attention, seen in self._cache_ranges.items():
            cache = seen.scales(self.recipe.kv_cache or "fp8", self._folds.divided.get(f"{attention}.v_proj"))
            for local, tensor in cache.tensors().items() if cache is not None else ():
                out[f"{self.full_name(attention)}.{local}"] = tensor
        for stored in self.model.block_tensor_names(self.index):
            if stored not in handled and stored not in out and owner(stored, self.model.plan) is None:
                out[stored] = self.checkpoint.read(stored)
        return out
