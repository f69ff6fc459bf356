"""Quantize one block: statistics in, solved linears and folded norms out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import nn

from lowbit.checkpoint import Checkpoint
from lowbit.codecs import Codec, read_dense
from lowbit.codecs.names import owner
from lowbit.errors import NumericsError
from lowbit.formats import PER_TENSOR, FloatSpec, FloatTensor, QuantizedTensor, Scheme, WeightSpec, WeightTensor
from lowbit.pipeline.architectures import fused_groups
from lowbit.pipeline.experts import UnfusedExperts
from lowbit.pipeline.folding import fold_into_norm, fold_target, has_unit_offset
from lowbit.pipeline.inputs import InputScales, RoundingLinear
from lowbit.pipeline.kv_scales import CacheRange, intercepted_attention
from lowbit.pipeline.progress import Progress, Silent
from lowbit.pipeline.recipe import ModulePlan, Recipe, method_options
from lowbit.pipeline.refine import Learnable, refine
from lowbit.pipeline.stages import Group, Reference, Stage, StagedForward, discover_stages, split_stages
from lowbit.pipeline.streamed import StreamedModel, model_dtype
from lowbit.quant import METHODS, AutoRoundOptions, InputStatistics, PairedStatistics, output_error, weight_error
from lowbit.quant.methods import Options
from lowbit.quant.solution import Solution
from lowbit.quant.sparse import DEFAULT_PRUNER, PRUNERS, Pruned, parse_sparsity
from lowbit.quant.transforms import NO_TRANSFORM, TRANSFORMS

_Q = TypeVar("_Q", bound=QuantizedTensor | FloatTensor)

STARVED_SHARE = 0.005
"""An expert that saw less than this share of the calibration tokens is solved without statistics."""


def options_of(recipe: Recipe, plan: ModulePlan) -> Options:
    """The options of a module's method: the recipe's where it is the recipe's method, with the module's ordering."""
    given = dict(recipe.options) if plan.method == recipe.method else {}
    if plan.ordering is not None and "ordering" in {field.name for field in fields(METHODS[plan.method].options)}:
        given["ordering"] = plan.ordering
    return method_options(METHODS[plan.method].options, given)


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What happened to one linear; ``error`` is the relative squared output error, None without statistics.

    ``zeros`` is the share of weights that are zero, of pruned ones.
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
    ) -> None:
        self.model = model
        self.index = index
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
        self._overrides: dict[str, torch.Tensor] = {}
        self._divided: dict[str, torch.Tensor] = {}
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
            self._solved[name] = _divided(q, self._divided[name]) if name in self._divided else q
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
        scales = self._scale(group, planned, usable) if usable is not None else None
        if scales is not None and usable is not None:
            usable.divide_(scales)
        dropped = 0 if statistics is None else statistics.nonfinite
        shared: dict[Any, Any] = {}
        for name in planned if statistics is not None else ():
            self._input_scales.note(name, float(statistics.abs_max.max()))  # type: ignore[union-attr]
        for names in self._units(planned):
            plan = self.plans[names[0]]
            if starved:
                plan = replace(plan, method="rtn")
            for report in self._solve(names, plan, usable, scales, shared):
                self.reports.append(replace(report, tokens=tokens, dropped=dropped, starved=starved))
        for name in group:
            if scales is not None and name not in self.plans:
                self._overrides[f"{name}.weight"] = self._linear(name).weight * scales

    def _scale(self, group: Group, planned: list[str], statistics: InputStatistics) -> torch.Tensor | None:
        """Search and fold an activation-aware scaling of the group's input; None where there is none."""
        plan = self.plans[planned[0]]
        name = plan.applied_transform
        target = fold_target(self.block, self.model.family, group[0])
        if name == NO_TRANSFORM or target is None or not self._can_divide(target):
            return None
        transform = TRANSFORMS[name]
        options = options_of(self.recipe, plan)
        chosen = options if isinstance(options, transform.options) else transform.options()
        weights = [self._linear(linear).weight for linear in planned]
        found = transform.search(weights, statistics, plan.spec, plan.inputs, chosen)
        return None if found is None else self._fold(target, found)

    def _fold(self, target: str, scales: torch.Tensor) -> torch.Tensor:
        """Divide the producer ``target`` by ``scales``; returns the scales in effect."""
        module = self.block.get_submodule(target)
        if isinstance(module, nn.Linear):
            self._divide_rows(target, module, scales)
            return scales
        stored = self._stored(f"{target}.weight")
        bias = self._stored(f"{target}.bias") if getattr(module, "bias", None) is not None else None
        weight, bias, effective = fold_into_norm(stored, bias, scales, unit_offset=has_unit_offset(module))
        self._overrides[f"{target}.weight"] = weight
        if bias is not None:
            self._overrides[f"{target}.bias"] = bias
        return effective

    def _can_divide(self, target: str) -> bool:
        """Whether the rows of a solved producer have scales of their own; others cannot be divided any more."""
        q = self._solved.get(target)
        return q is None or (isinstance(q, QuantizedTensor | FloatTensor) and _has_row_scales(q))

    def _divide_rows(self, target: str, module: nn.Linear, scales: torch.Tensor) -> None:
        self._divided[target] = scales
        q = self._solved.get(target)
        if isinstance(q, QuantizedTensor | FloatTensor):
            self._solved[target] = _divided(q, scales)
        else:
            self._overrides[f"{target}.weight"] = module.weight / scales[:, None]
        if module.bias is not None:
            self._overrides[f"{target}.bias"] = module.bias / scales

    def _units(self, planned: Sequence[str]) -> list[tuple[str, ...]]:
        """What is solved as one matrix: linears that engines merge, where the matrix has a scale of its own."""
        merged = [group for group in fused_groups(list(planned)) if _has_whole_scale(self.plans[group[0]].spec)]
        inside = {name for group in merged for name in group}
        return [*merged, *((name,) for name in planned if name not in inside)]

    def _solve(
        self,
        names: tuple[str, ...],
        plan: ModulePlan,
        statistics: InputStatistics | None,
        scales: torch.Tensor | None,
        shared: dict[Any, Any],
    ) -> list[ModuleReport]:
        """Solve linears as one matrix, put the results in their places, and say how it went."""
        full = self.full_name(names[0])
        self.progress.at(full)
        weights = [self._linear(name).weight.float() for name in names]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        weight = weight if scales is None else weight * scales
        options = options_of(self.recipe, plan)
        pruned = _prune(weight, statistics, plan)
        solution = METHODS[plan.method].solve(
            weight, statistics, plan.spec, options, shared=shared, name=full, pruned=pruned
        )
        reports, first = [], 0
        for name, part in zip(names, weights, strict=True):
            rows = slice(first, first + part.shape[0])
            tensor = solution.tensor if len(names) == 1 else _rows(solution.tensor, rows)
            part = weight[rows]
            reports.append(self._place(name, plan, part, replace(solution, tensor=tensor), statistics, scales))
            first = rows.stop
        return reports

    def _place(
        self,
        name: str,
        plan: ModulePlan,
        weight: torch.Tensor,
        solution: Solution,
        statistics: InputStatistics | None,
        scales: torch.Tensor | None,
    ) -> ModuleReport:
        """Put a solved linear in its place; ``weight`` is what it was solved from."""
        linear, full = self._linear(name), self.full_name(name)
        restored = solution.tensor.dequantize()
        if not bool(torch.isfinite(restored).all()):
            raise NumericsError(f"{full}: the quantized weight is not finite: try --method rtn for it")
        report = ModuleReport(
            name=full,
            spec=str(Scheme(plan.spec, plan.inputs)),
            method=plan.method,
            bits_per_weight=solution.tensor.bits_per_weight,
            weights=weight.numel(),
            error=None if statistics is None else output_error(weight, restored, statistics),
            weight_error=weight_error(weight, restored).relative,
            damping=solution.damping or None,
            scaled=scales is not None,
            zeros=None if plan.sparsity is None else float((restored == 0).float().mean()),
        )
        linear.weight.data = (restored if scales is None else restored.div_(scales)).to(linear.weight.dtype)
        input_scale = self._input_scales.of(name, plan.inputs)
        linear.round_inputs(plan.inputs, None if input_scale is None else input_scale.to(linear.weight.device), scales)
        self._solved[name] = solution.tensor
        if METHODS[plan.method].scope == "block" and isinstance(solution.tensor, QuantizedTensor):
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
            override = self._overrides.get(name)
            out[self.full_name(name)] = kept if override is None else override.to("cpu", kept.dtype).contiguous()
        for attention, seen in self._cache_ranges.items():
            cache = seen.scales(self.recipe.kv_cache or "fp8", self._divided.get(f"{attention}.v_proj"))
            for local, tensor in cache.tensors().items() if cache is not None else ():
                out[f"{self.full_name(attention)}.{local}"] = tensor
        for stored in self.model.block_tensor_names(self.index):
            if stored not in handled and stored not in out and owner(stored, self.model.plan) is None:
                out[stored] = self.checkpoint.read(stored)
        return out


def _prune(weight: torch.Tensor, statistics: InputStatistics | None, plan: ModulePlan) -> Pruned | None:
    """``weight`` with the zeros that ``plan`` asks for; by magnitude where there are no statistics."""
    if plan.sparsity is None:
        return None
    pruner = (plan.pruner or DEFAULT_PRUNER) if statistics is not None else "magnitude"
    return PRUNERS[pruner](weight, statistics, parse_sparsity(plan.sparsity))


def _has_whole_scale(spec: WeightSpec) -> bool:
    """Whether one scale spans the matrix, so that engines that merge matrices need the same one in all of them."""
    return isinstance(spec, FloatSpec) and (spec.group_size == PER_TENSOR or spec.scale == "e4m3")


def _has_row_scales(q: QuantizedTensor | FloatTensor) -> bool:
    """Whether each row has float scales of its own."""
    if isinstance(q, QuantizedTensor):
        return q.spec.group_size != PER_TENSOR
    return q.spec.scale == "float" and q.spec.rows == 1 and q.spec.group_size != PER_TENSOR


def _divided(q: _Q, scales: torch.Tensor) -> _Q:
    """``q`` with its rows divided by ``scales`` ``[out]``, which rounds its scales again."""
    return replace(q, scales=(q.scales.float() / scales[:, None].to(q.scales.device)).to(q.scales.dtype))


def _rows(tensor: WeightTensor, rows: slice) -> WeightTensor:
    """Some rows of a matrix of floats that share its whole scale."""
    assert isinstance(tensor, FloatTensor)
    scales = tensor.scales if tensor.spec.group_size == PER_TENSOR else tensor.scales[rows]
    return replace(tensor, codes=tensor.codes[rows], scales=scales)
