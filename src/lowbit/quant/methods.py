"""The methods by name: what each needs, and how it transforms and solves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch

from lowbit.errors import NumericsError
from lowbit.formats.codebook import CodebookSpec
from lowbit.formats.floating import FloatSpec
from lowbit.formats.spec import IntSpec
from lowbit.formats.weights import GridSpec, WeightSpec
from lowbit.quant import awq, best, gptaq, gptq, hqq
from lowbit.quant.autoround import AutoRoundOptions
from lowbit.quant.awq import AwqOptions
from lowbit.quant.best import BestOptions, Pace
from lowbit.quant.gptaq import GptaqOptions
from lowbit.quant.gptq import GptqOptions
from lowbit.quant.hqq import HqqOptions
from lowbit.quant.paired import PairedStatistics
from lowbit.quant.rtn import RtnOptions, round_to_nearest
from lowbit.quant.solution import Solution
from lowbit.quant.sparse import Pruned
from lowbit.quant.statistics import InputStatistics

__all__ = ["METHODS", "Method", "Options", "candidate_name"]

Options: TypeAlias = RtnOptions | GptqOptions | GptaqOptions | AwqOptions | HqqOptions | AutoRoundOptions | BestOptions
_Shared: TypeAlias = MutableMapping[Options, Any]
_Solver: TypeAlias = Callable[..., Solution]


@dataclass(frozen=True, slots=True)
class Method:
    """A way to quantize a linear.

    ``options``           dataclass of its settings
    ``needs_statistics``  whether it solves nothing without calibration inputs
    ``needs_reference``   whether it wants the float model's inputs beside the quantized model's
    ``scope``             ``block``: the solved linears of a block are tuned together once they are all there;
                          ``candidates``: its solver tries other methods, and the transforms of those are tried, too
    ``masks``             whether its solver takes ``keep``, False where a weight must be zero, and makes up for that
    ``supports``          reasons why it makes no weights of a format, each with the way out
    ``transform``         the one of :data:`lowbit.quant.transforms.TRANSFORMS` that goes before it unless the recipe
                          names another
    """

    name: str
    options: type[Options]
    needs_statistics: bool
    solver: _Solver
    supports: Callable[[WeightSpec], list[str]]
    transform: str | None = None
    needs_reference: bool = False
    scope: Literal["linear", "block", "candidates"] = "linear"
    masks: bool = False

    def solve(
        self,
        weight: torch.Tensor,
        statistics: InputStatistics | None,
        spec: WeightSpec,
        options: Options | None = None,
        *,
        shared: _Shared | None = None,
        name: str = "weight",
        pruned: Pruned | None = None,
        transform: str | None = None,
        pace: Pace | None = None,
    ) -> Solution:
        """Quantize ``weight`` float ``[out, in]`` (left unchanged); options of another method count as none given.

        ``pruned`` is that weight pruned: what is zero in it is zero in the result. ``transform`` names the one that
        has scaled the weight; it and ``pace`` (no limit by default) matter to a method that tries others.

        ``shared`` is one dictionary for all linears on one input: what they can share is kept in it. ``name`` is the
        module's, for roles (AWQ can leave query and key projections unclipped) and messages. Raises
        :class:`NumericsError` naming it.
        """
        chosen = options if isinstance(options, self.options) else self.options()
        try:
            rest: tuple[Any, ...] = (statistics, spec, chosen, {} if shared is None else shared, name)
            if self.scope == "candidates":
                return self.solver(weight, *rest, pruned, transform, pace)
            if pruned is None:
                return self.solver(weight, *rest)
            if self.masks:
                return self.solver(pruned.weight if pruned.made_up else weight, *rest, keep=pruned.keep)
            return self.solver(pruned.weight, *rest)
        except NumericsError as error:
            raise NumericsError(f"{name}: {error}") from error


def _rtn(
    weight: torch.Tensor,
    statistics: InputStatistics | None,
    spec: WeightSpec,
    options: RtnOptions,
    shared: _Shared,
    name: str,
) -> Solution:
    return round_to_nearest(weight, statistics, spec, options)


def _gptq(
    weight: torch.Tensor,
    statistics: InputStatistics | None,
    spec: GridSpec,
    options: GptqOptions,
    shared: _Shared,
    name: str,
    keep: torch.Tensor | None = None,
) -> Solution:
    if statistics is None:
        raise NumericsError("gptq needs calibration inputs and has none: give more calibration text, or use rtn")
    if options not in shared:
        shared[options] = gptq.factorise(statistics, options)
    return gptq.solve(weight, shared[options], spec, options, keep)


def _gptaq(
    weight: torch.Tensor,
    statistics: InputStatistics | None,
    spec: GridSpec,
    options: GptaqOptions,
    shared: _Shared,
    name: str,
    keep: torch.Tensor | None = None,
) -> Solution:
    if statistics is None:
        raise NumericsError("gptaq needs calibration inputs and has none: give more calibration text, or use rtn")
    if options not in shared:
        shared[options] = gptaq.prepare(statistics, options)
    return gptaq.solve(weight, shared[options], spec, options, keep)


def _awq(
    weight: torch.Tensor,
    statistics: InputStatistics | None,
    spec: WeightSpec,
    options: AwqOptions,
    shared: _Shared,
    name: str,
) -> Solution:
    return awq.solve(weight, statistics, spec, options, name=name)


def _hqq(
    weight: torch.Tensor,
    statistics: InputStatistics | None,
    spec: IntSpec,
    options: HqqOptions,
    shared: _Shared,
    name: str,
) -> Solution:
    return hqq.solve(weight, spec, options)


def _autoround(
    weight: torch.Tensor,
    statistics: InputStatistics | None,
    spec: WeightSpec,
    options: AutoRoundOptions,
    shared: _Shared,
    name: str,
) -> Solution:
    start = METHODS[options.start]
    return start.solver(weight, statistics, spec, start.options(), shared, name)


def _best(
    weight: torch.Tensor,
    statistics: InputStatistics | None,
    spec: WeightSpec,
    options: BestOptions,
    shared: _Shared,
    name: str,
    pruned: Pruned | None,
    transform: str | None,
    pace: Pace | None,
) -> Solution:
    usable = [
        method
        for method in (METHODS[candidate] for candidate in options.candidates)
        if not method.supports(spec)
        and (statistics is not None or not method.needs_statistics)
        and method.transform in (None, transform)
        # without a reference it is GPTQ
        and (isinstance(statistics, PairedStatistics) or method.name != "gptaq" or "gptq" not in options.candidates)
    ]
    if not usable:
        raise NumericsError(f"none of the candidates {', '.join(options.candidates)} can be used: add rtn to them")
    attempts = {
        candidate_name(method, transform): partial(
            method.solve, weight, statistics, spec, shared=shared, name=name, pruned=pruned
        )
        for method in usable
    }

    def wanted() -> torch.Tensor:
        aim = GptaqOptions(strength=options.strength)
        if not isinstance(statistics, PairedStatistics):
            return weight.float()
        if aim not in shared:
            shared[aim] = gptaq.prepare(statistics, aim)
        return gptaq.target(weight, shared[aim])

    return best.choose(wanted, statistics, attempts, pace or Pace.unlimited(), weight.numel())


def candidate_name(method: Method, transform: str | None) -> str:
    """What a method after a transform is called: ``gptq``, ``awq+gptq``, and ``awq`` alone after its own."""
    return method.name if transform in (None, method.transform) else f"{transform}+{method.name}"


def _any(spec: WeightSpec) -> list[str]:
    return []


def _integers(spec: WeightSpec) -> list[str]:
    if isinstance(spec, IntSpec) and not spec.has_float_zeros:
        return []
    return [f"it solves for integer weights, not {spec}: use --method rtn, or e.g. --scheme W4A16"]


def _with_zero_points(spec: WeightSpec) -> list[str]:
    if isinstance(spec, IntSpec) and not spec.symmetric:
        return []
    return [f"it solves for zero points, and {spec} has none: use --scheme int4-g64-affine, or --asym"]


def _with_zero(spec: WeightSpec) -> list[str]:
    if isinstance(spec, FloatSpec | CodebookSpec) or (isinstance(spec, IntSpec) and not spec.has_float_zeros):
        return []
    return [f"it solves for integers, small floats and tables, not {spec}: use --method rtn, or e.g. --scheme W4A16"]


METHODS: Mapping[str, Method] = {
    "rtn": Method("rtn", RtnOptions, needs_statistics=False, solver=_rtn, supports=_any),
    "gptq": Method(
        "gptq",
        GptqOptions,
        needs_statistics=True,
        solver=_gptq,
        supports=_with_zero,
        masks=True,
    ),
    "gptaq": Method(
        "gptaq",
        GptaqOptions,
        needs_statistics=True,
        solver=_gptaq,
        supports=_with_zero,
        needs_reference=True,
        masks=True,
    ),
    "hqq": Method("hqq", HqqOptions, needs_statistics=False, solver=_hqq, supports=_with_zero_points),
    "autoround": Method(
        "autoround",
        AutoRoundOptions,
        needs_statistics=True,
        solver=_autoround,
        supports=_integers,
        needs_reference=True,
        scope="block",
    ),
    "awq": Method("awq", AwqOptions, needs_statistics=True, solver=_awq, supports=_any, transform="awq"),
    "best": Method(
        "best",
        BestOptions,
        needs_statistics=True,
        solver=_best,
        supports=_any,
        needs_reference=True,
        scope="candidates",
    ),
}
"""Every method of ``--method``."""
