"""The picture of a recommendation: what each precision needs against what it costs, and which was chosen."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowbit.evaluation.plots import LIGHT
from lowbit.planning.choice import LIMITS, Candidate, loss_of
from lowbit.sizing.recommend import Recommendation

_GIB = 2**30
_FLOOR = 0.001
"""Losses below this are drawn at it: the axis is logarithmic."""
_TICKS = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)


def draw_recommendation(result: Recommendation) -> Figure:
    """Memory of one device against the increase of perplexity, filled marks where it was measured.

    A candidate on the right of the dashed line does not fit, one above the dotted line loses more than the use allows.
    """
    figure = Figure(figsize=(8.2, 5.0), layout="constrained")
    axes = figure.add_subplot()
    parameters, allowed = result.estimate.parameters, LIMITS[result.quality]
    caches = list(dict.fromkeys(one.kv_dtype for one in result.candidates))
    for place, cache in enumerate(caches):
        shown = sorted((one for one in result.candidates if one.kv_dtype == cache), key=lambda one: one.total)
        color = LIGHT.palette[place % len(LIGHT.palette)]
        sizes = [one.total / _GIB for one in shown]
        losses = [_drawn(one, parameters) for one in shown]
        axes.plot(sizes, losses, "-", color=color, lw=1, alpha=0.5)
        for one, size, loss in zip(shown, sizes, losses, strict=True):
            axes.plot(size, loss, "o", ms=7, color=color, mfc=color if one.measured else "white")
        axes.plot([], [], "o-", color=color, mfc="white", label=f"{cache} cache")
        if place == 0:
            _name(axes, shown, sizes, losses)
    chosen = result.chosen
    at = (chosen.total / _GIB, _drawn(chosen, parameters))
    axes.plot(*at, "o", ms=15, mfc="none", mec=LIGHT.text, mew=1.6, label=f"chosen: {result.scheme}")
    axes.axvline(chosen.budget / _GIB, color=LIGHT.text, ls="--", lw=1)
    axes.axhline(allowed, color=LIGHT.muted, ls=":", lw=1.2)
    axes.set_yscale("log")
    top = 1.3 * max(1.5 * allowed, *(_drawn(one, parameters) for one in result.candidates))
    ticks = [tick for tick in _TICKS if tick <= top]
    axes.set_yticks(ticks, [_percent(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(_FLOOR * 0.7, top)
    axes.margins(x=0.12)
    axes.set_xlabel(f"GiB on one device (dashed: the {chosen.budget / _GIB:.1f} that may be used)")
    axes.set_ylabel(f"increase of perplexity (dotted: allowed for {result.quality!r})")
    served = f"{result.estimate.requests} × {result.estimate.context:,} tokens, {result.engine}"
    axes.set_title(f"{result.model}: {served}", fontsize=11, loc="left")
    axes.grid(True, color=LIGHT.grid)
    axes.spines[["top", "right"]].set_visible(False)
    axes.plot([], [], "o", color=LIGHT.muted, label="measured")
    axes.plot([], [], "o", color=LIGHT.muted, mfc="white", label="expected of its width")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _name(axes: Axes, shown: Sequence[Candidate], sizes: Sequence[float], losses: Sequence[float]) -> None:
    """Names beside the marks of the first cache, above and below in turns where they lie close."""
    box = {"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.85}
    for place, (one, size, loss) in enumerate(zip(shown, sizes, losses, strict=True)):
        told = f"{one.scheme}, KL {one.measured.divergence:.3g}" if one.measured else one.scheme
        offset = (6, 7) if place % 2 == 0 else (6, -13)
        axes.annotate(told, (size, loss), xytext=offset, textcoords="offset points", fontsize=8, bbox=box)


def _drawn(candidate: Candidate, parameters: int) -> float:
    return max(_FLOOR, loss_of(candidate, parameters))


def _percent(value: float) -> str:
    return "0.1% or less" if value == _FLOOR else f"{value:.1%}" if value < 0.01 else f"{value:.0%}"
