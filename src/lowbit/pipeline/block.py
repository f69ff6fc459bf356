"""Quantize one block: statistics in, solved linears and folded norms out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from lowbit.checkpoint import Checkpoint
from lowbit.codecs import Codec, read_dense
from lowbit.codecs.names import owner
from lowbit.errors import NumericsError
from lowbit.formats import QuantizedTensor, Scheme, WeightTensor
from lowbit.pipeline.attempts import Attempt, better, options_of, prune, rows_of, units
from lowbit.pipeline.experts import UnfusedExperts
from lowbit.pipeline.folding import Fold, Folds, divided, folded
from lowbit.pipeline.inputs import InputScales, RoundingLinear
from lowbit.pipeline.kv_scales import CacheRange, intercepted_attention
from lowbit.pipeline.progress import Progress, Silent
from lowbit.pipeline.recipe import ModulePlan, Recipe
from lowbit.pipeline.refine import Learnable, refine
from lowbit.pipeline.stages import Group, Reference, Stage, StagedForward, discover_stages, split_stages
from lowbit.pipeline.streamed import StreamedModel, model_dtype
from lowbit.quant import METHODS, AutoRoundOptions, InputStatistics, Pace, PairedStatistics, output_error, weight_error
from lowbit.quant.methods import Options
from lowbit.quant.solution import Solution
from lowbit.quant.transforms import NO_TRANSFORM, TRANSFORMS

STARVED_SHARE = 0.005
"""An expert that saw less than this share of the calibration tokens is solved without statistics."""


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What happened to one linear; ``error`` is the relative squared output error, None without statistics.

    ``zeros`` is the share of weights that are zero, of pruned ones. Where there was a choice of methods, ``candidates``
    are the errors of those that were tried (:class:`lowbit.quant.Solution`), ``left_out`` the others, and ``method``
    the one that was chosen.
    """

    name: str
    spec: str
    method: str
    bits_per_weight: float
    weights: int
    weight_error: float
    error: float | None = None
    tokens: int = 0
    damping: float | None = None
    scaled: bool = False
    zeros: float | None = None
    starved: bool = False
    dropped: int = 0
    candidates: Mapping[str, float] | None = None
    left_out: Sequence[str] | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that are set, for the manifest and the journal."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {key: value for key, value in values.items() if value not in (None, False) or key == "weight_error"}


Load = Callable[[], torch.Tensor]
"""Reads one batch of hidden states."""
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
    ``pace`` limits methods that try others (None: no limit).
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
    ) -> None:
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
        self._statistics: dict[Group, InputStatistics] = {}
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
        wanted = [stage for stage in stages if any(name in self.plans for group in stage.groups for name in group)]

        def forwards(block: nn.Module, loads: Sequence[Load]) -> list[Load]:
            return [lambda load=load: self.model.run_block(block, self.index, load()) for load in loads]  # type: ignore[misc]

        reference = None
        if beside is not None:
            block = self.model.load_block(self.index)
            reference = Reference(block, forwards(block, beside.batches), beside.on_output)
        staged = StagedForward(
            self.block,
            split_stages(wanted, group_limit),
            forwards(self.block, batches),
            keep=keep,
            reference=reference,
        )
        tuned = [plan for plan in self.plans.values() if METHODS[plan.method].scope == "block"]
        with self._watched_cache():
            staged.run(self._add_input, self._solve_stage, (lambda index, output: None) if tuned else on_output)
            if tuned and beside is not None:
                self._refine(options_of(self.recipe, tuned[0]), batches, beside.outputs)
                for index, forward in enumerate(forwards(self.block, batches)):
                    on_output(index, forward())

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

    def _watched_cache(self) -> AbstractContextManager[None]:
        """While it lasts, the keys and values of this block are measured, if its cache is to have scales."""
        if self.recipe.kv_cache is None:
            return nullcontext()
        names = {module: name for name, module in self.block.named_modules()}

        def note(module: nn.Module, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if module in names:
                self._cache_ranges.setdefault(names[module], CacheRange()).note(key, value)
            return key, value

        return intercepted_attention(note)

    def _add_input(self, group: Group, x: torch.Tensor, reference: torch.Tensor | None) -> None:
        planned = [self.plans[name] for name in group if name in self.plans]
        if not planned:
            return
        statistics = self._statistics.get(group)
        if statistics is None:
            paired = reference is not None and any(plan.needs_reference for plan in planned)
            kind = PairedStatistics if paired else InputStatistics
            statistics = self._statistics[group] = kind(x.shape[-1], device=x.device)
        if isinstance(statistics, PairedStatistics) and reference is not None:
            statistics.add_pair(x, reference)
        else:
            statistics.add(x)

    def _solve_stage(self, stage: Stage) -> None:
        for group in stage.groups:
            if any(name in self.plans for name in group):
                self._solve_group(group, self._statistics.pop(group, None))

    # ---- solving -----------------------------------------------------------------------------------------------

    def solve_without_statistics(self) -> None:
        """Solve every planned linear from its weights alone."""
        for name in self.plans:
            self._solve_group((name,), None)

    def _solve_group(self, group: Group, statistics: InputStatistics | None) -> None:
        planned = [name for name in group if name in self.plans]
        tokens = 0 if statistics is None else statistics.tokens
        needs = any(self.plans[name].needs_statistics for name in planned)
        starved = needs and tokens < max(1, STARVED_SHARE * self.calibration_tokens)
        usable = None if starved else statistics
        attempt = self._best_attempt(group, planned, usable)
        dropped = 0 if statistics is None else statistics.nonfinite
        scales = None if attempt.fold is None else attempt.fold.scales
        if attempt.fold is not None:
            self._folds.apply(attempt.fold)
        with folded(usable, attempt.fold):
            for name in planned if statistics is not None else ():
                self._input_scales.note(name, float(statistics.abs_max.max()))  # type: ignore[union-attr]
            for names, solution in attempt.solved.items():
                for report in self._accept(names, solution, usable, scales):
                    self.reports.append(replace(report, tokens=tokens, dropped=dropped, starved=starved))
        for name in group:
            if scales is not None and name not in self.plans:
                self._folds.overrides[f"{name}.weight"] = self._linear(name).weight * scales

    def _best_attempt(self, group: Group, planned: list[str], statistics: InputStatistics | None) -> Attempt:
        """Solve what is planned on one input, after each transform that its method tries; the least error wins."""
        best: Attempt | None = None
        for transform in self.plans[planned[0]].transforms if statistics is not None else (NO_TRANSFORM,):
            weights = sum(self._linear(name).weight.numel() for name in planned)
            search = f"search of {transform}"
            if best is not None and not self.pace.allows(search, weights):
                best = best.without(transform)
                continue
            fold = self.pace.timed(search, weights, partial(self._search, transform, group, planned, statistics))
            if best is None or fold is not None:
                attempt = self._attempt(transform, fold, planned, statistics)
                best = attempt if best is None else better(best, attempt)
        assert best is not None
        chosen = [name for name in planned if METHODS[self.plans[name].method].scope == "candidates"]
        self.pace.done += sum(self._linear(name).weight.numel() for name in chosen)
        return best

    def _attempt(
        self, transform: str, fold: Fold | None, planned: Sequence[str], statistics: InputStatistics | None
    ) -> Attempt:
        """Solve what is planned on one input, scaled as ``fold`` says."""
        solved: dict[tuple[str, ...], Solution] = {}
        shared: dict[Any, Any] = {}
        with folded(statistics, fold):
            for names in units(planned, self.plans):
                full = self.full_name(names[0])
                self.progress.at(full)
                plan = self.plans[names[0]]
                if statistics is None and METHODS[plan.method].needs_statistics:
                    plan = replace(plan, method="rtn")
                weight = self._weight(names, None if fold is None else fold.scales)
                solved[names] = METHODS[plan.method].solve(
                    weight,
                    statistics,
                    plan.spec,
                    options_of(self.recipe, plan),
                    shared=shared,
                    name=full,
                    pruned=prune(weight, statistics, plan),
                    transform=None if fold is None else transform,
                    pace=self.pace,
                )
        return Attempt(fold, solved)

    def _weight(self, names: Sequence[str], scales: torch.Tensor | None) -> torch.Tensor:
        """Float32 weights of linears on one input, one below the other, their columns times ``scales``."""
        weights = [self._linear(name).weight.float() for name in names]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        return weight if scales is None else weight * scales

    def _search(
        self, transform: str, group: Group, planned: list[str], statistics: InputStatistics | None
    ) -> Fold | None:
        """Search a scaling of the group's input; None where there is none."""
        target = None if transform == NO_TRANSFORM or statistics is None else self._folds.target(group[0])
        if target is None or statistics is None:
            return None
        plan, row = self.plans[planned[0]], TRANSFORMS[transform]
        options = options_of(self.recipe, plan)
        chosen = options if isinstance(options, row.options) else row.options()
        weights = [self._linear(linear).weight for linear in planned]
        found = row.search(weights, statistics, plan.spec, plan.inputs, chosen)
        return None if found is None else self._folds.prepare(target, found)

    def _accept(
        self,
        names: tuple[str, ...],
        solution: Solution,
        statistics: InputStatistics | None,
        scales: torch.Tensor | None,
    ) -> list[ModuleReport]:
        """Put linears that were solved as one matrix in their places, and say how it went."""
        weight, first, reports = self._weight(names, scales), 0, []
        for name in names:
            rows = slice(first, first + self._linear(name).out_features)
            tensor = solution.tensor if len(names) == 1 else rows_of(solution.tensor, rows)
            reports.append(self._place(name, weight[rows], replace(solution, tensor=tensor), statistics, scales))
            first = rows.stop
        return reports

    def _place(
        self,
        name: str,
        weight: torch.Tensor,
        solution: Solution,
        statistics: InputStatistics | None,
        scales: torch.Tensor | None,
    ) -> ModuleReport:
        """Put a solved linear in its place; ``weight`` is what it was solved from."""
        linear, full, plan = self._linear(name), self.full_name(name), self.plans[name]
        method = plan.method if statistics is not None or not METHODS[plan.method].needs_statistics else "rtn"
        restored = solution.tensor.dequantize()
        if not bool(torch.isfinite(restored).all()):
            raise NumericsError(f"{full}: the quantized weight is not finite: try --method rtn for it")
        report = ModuleReport(
            name=full,
            spec=str(Scheme(plan.spec, plan.inputs)),
            method=solution.method or method,
            bits_per_weight=solution.tensor.bits_per_weight,
            weights=weight.numel(),
            error=None if statistics is None else output_error(weight, restored, statistics),
            weight_error=weight_error(weight, restored).relative,
            damping=solution.damping or None,
            scaled=scales is not None,
            zeros=None if plan.sparsity is None else float((restored == 0).float().mean()),
            candidates=dict(solution.errors) or None,
            left_out=solution.left_out or None,
        )
        linear.weight.data = (restored if scales is None else restored.div_(scales)).to(linear.weight.dtype)
        input_scale = self._input_scales.of(name, plan.inputs)
        linear.round_inputs(plan.inputs, None if input_scale is None else input_scale.to(linear.weight.device), scales)
        self._solved[name] = solution.tensor
        if METHODS[method].scope == "block" and isinstance(solution.tensor, QuantizedTensor):
            self._learnable[name] = Learnable(linear, weight, solution.tensor, scales)
        return report

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
