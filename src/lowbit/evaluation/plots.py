"""The report's plots: each draws a comparison on a matplotlib figure, once for light and once for dark pages.

Colour says the method (the baseline is grey), line style and marker the number format, everywhere.
"""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from matplotlib import font_manager, rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lowbit.evaluation.frontier import frontier
from lowbit.evaluation.results import Candidate, Comparison

BASELINE = "rtn"
"""The method that margins are counted from."""

_FONTS = ("Inter", "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei")
_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of one rendering; ``palette`` is for methods in order of appearance, ``baseline`` for RTN."""

    name: str
    surface: str
    text: str
    muted: str
    grid: str
    baseline: str
    palette: tuple[str, ...]


LIGHT = Theme(
    "light", "#ffffff", "#1b1f24", "#5b6570", "#e4e7eb", "#8b949e",
    ("#2563eb", "#d9660a", "#0f8a6d", "#8b3fd1", "#c4306f", "#7a6a00"),
)  # fmt: skip
DARK = Theme(
    "dark", "#171b21", "#e6e9ee", "#98a2ae", "#2b323b", "#7d8793",
    ("#6ba1ff", "#ff9f4a", "#3fc7a0", "#c08cff", "#ff7eb0", "#d8c04a"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawn plot: PNG bytes for both themes, and the words that go with it."""

    name: str
    title: str
    caption: str
    wide: bool
    light: bytes
    dark: bytes


@dataclass(frozen=True, slots=True)
class _Style:
    color: str
    line: str
    marker: str


def draw_plots(comparison: Comparison) -> list[Plot]:
    """Draw every plot that the comparison has data for."""
    plots = []
    fonts = [name for name in _FONTS if name in set(font_manager.get_font_names())]
    for name, (title, caption, wide, draw) in _PLOTS.items():
        images = []
        for theme in (LIGHT, DARK):
            with rc_context({"font.family": fonts, "font.size": 10, "axes.unicode_minus": True}):
                figure = draw(comparison, theme)
                if figure is None:
                    break
                images.append(_png(figure, theme))
        if images:
            plots.append(Plot(name, title, caption, wide, *images))
    return plots


def styles_of(comparison: Comparison, theme: Theme) -> dict[str, _Style]:
    """Colour, line and marker of each candidate by name."""
    methods = list(dict.fromkeys(entry.method for entry in comparison.candidates if entry.method != BASELINE))
    specs = list(dict.fromkeys(entry.spec for entry in comparison.candidates))
    colors = {method: theme.palette[index % len(theme.palette)] for index, method in enumerate(methods)}
    colors[BASELINE] = theme.baseline
    return {
        entry.name: _Style(
            colors[entry.method],
            _STYLES[specs.index(entry.spec) % len(_STYLES)],
            _MARKERS[specs.index(entry.spec) % len(_MARKERS)],
        )
        for entry in comparison.candidates
    }


def margin_over_baseline(candidate: Candidate, comparison: Comparison) -> float | None:
    """Change of divergence against the baseline at the same number format (-0.4 is 40 % less), if there is one."""
    own = candidate.evaluation.kl_divergence
    for other in comparison.candidates:
        base = other.evaluation.kl_divergence
        if other.method == BASELINE and other.spec == candidate.spec and other is not candidate and base and own:
            return own / base - 1
    return None


def _measured(comparison: Comparison) -> list[tuple[Candidate, float]]:
    pairs = [(entry, entry.evaluation.kl_divergence) for entry in comparison.candidates]
    return [(entry, value) for entry, value in pairs if value is not None and 0 < value < math.inf]


def _figure(theme: Theme, size: tuple[float, float], rows: int = 1, columns: int = 1) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=size, facecolor=theme.surface, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=rows * columns > 1, sharey=rows * columns > 1)
    for one in axes.flat:
        one.set_facecolor(theme.surface)
        one.grid(True, color=theme.grid, linewidth=0.8)
        one.set_axisbelow(True)
        one.tick_params(colors=theme.muted, which="both", length=0, labelsize=9)
        one.spines[["top", "right", "left"]].set_visible(False)
        one.spines["bottom"].set_color(theme.grid)
    return figure, list(axes.flat)


def _label(axes: Any, theme: Theme, x: str, y: str) -> None:
    axes.set_xlabel(x, color=theme.muted)
    axes.set_ylabel(y, color=theme.muted)


def _legend(figure: Figure, axes: Any, theme: Theme, columns: int) -> None:
    """One legend above the axes, so that it never covers a line."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=min(columns, len(labels)), frameon=False,
        labelcolor=theme.text, fontsize=9.5, handlelength=2.4, columnspacing=1.6,
    )  # fmt: skip


def _log_axis(axis: Any, values: Sequence[float]) -> None:
    """Ticks at 1-2-5 when the data span few decades, else at powers of ten; never in 2·10^-2 notation."""
    narrow = max(values) / min(values) < 1000
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _png(figure: Figure, theme: Theme) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor=theme.surface, metadata={"Software": None})
    return buffer.getvalue()


def _divergence_by_bits(comparison: Comparison, theme: Theme) -> Figure | None:
    measured = _measured(comparison)
    if len({round(entry.evaluation.linear_bits_per_weight, 3) for entry, _ in measured}) < 2:
        return None
    figure, (axes,) = _figure(theme, (6.2, 4.3))
    styles = styles_of(comparison, theme)
    by_method: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for entry, value in measured:
        error = entry.evaluation.kl_divergence_error or 0.0
        by_method[entry.method].append((entry.evaluation.linear_bits_per_weight, value, error))
    for method, points in by_method.items():
        points.sort()
        color = next(styles[entry.name].color for entry, _ in measured if entry.method == method)
        bits, values, errors = zip(*points, strict=True)
        axes.errorbar(
            bits, values, yerr=errors, color=color, marker="o", markersize=7, linewidth=2, capsize=3,
            label=method.upper(), markeredgecolor=theme.surface, markeredgewidth=1.2,
        )  # fmt: skip
    best = frontier(comparison)
    front = sorted((entry.evaluation.linear_bits_per_weight, value) for entry, value in measured if entry.name in best)
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), color=theme.muted, linewidth=7, alpha=0.25, zorder=0, label="Pareto front")
    axes.set_yscale("log")
    _log_axis(axes.yaxis, [value for _, value in measured])
    axes.margins(x=0.08, y=0.12)
    _label(axes, theme, "bits per weight of the quantized modules", "KL divergence (nats per token)")
    _legend(figure, axes, theme, 5)
    return figure


def _divergence_by_method(comparison: Comparison, theme: Theme) -> Figure | None:
    measured = _measured(comparison)
    if len(measured) < 2:
        return None
    figure, (axes,) = _figure(theme, (6.2, max(2.4, 0.9 + 0.5 * len(measured))))
    styles = styles_of(comparison, theme)
    specs = list(dict.fromkeys(entry.spec for entry, _ in measured))
    place, places, gap = 0.0, [], 0.55
    widest = max(value + (entry.evaluation.kl_divergence_error or 0) for entry, value in measured)
    for spec in specs:
        for entry, value in (pair for pair in measured if pair[0].spec == spec):
            error = entry.evaluation.kl_divergence_error or 0.0
            axes.barh(place, value, height=0.72, color=styles[entry.name].color)
            axes.errorbar(value, place, xerr=error, color=theme.text, capsize=3, linewidth=1.1)
            margin = margin_over_baseline(entry, comparison)
            text = f"{value:.3g}" + (f"   {margin:+.0%}".replace("-", "−") if margin is not None else "")
            axes.text(value + error + widest * 0.02, place, text, va="center", color=theme.text, fontsize=9.5)
            places.append((place, entry.name))
            place += 1
        place += gap
    axes.set_yticks([place for place, _ in places], [name for _, name in places], color=theme.text)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.spines["bottom"].set_visible(False)
    axes.set_xlim(0, widest * 1.28)
    _label(axes, theme, "KL divergence (nats per token)", "")
    return figure


def _error_by_depth(comparison: Comparison, theme: Theme) -> Figure | None:
    table: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for entry in comparison.candidates:
        for module, error in entry.module_errors.items():
            depth = re.search(r"\.(\d+)\.", module)
            if depth and error > 0:
                table[module.rsplit(".", 1)[-1]][entry.name][int(depth[1])].append(error)
    if not table:
        return None
    kinds = list(table)[:12]
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure, panels = _figure(theme, (12.6, 0.7 + 2.3 * rows), rows, columns)
    styles = styles_of(comparison, theme)
    everything: list[float] = []
    for panel, kind in zip(panels, kinds, strict=False):
        for name, depths in table[kind].items():
            points = sorted((depth, fmean(errors)) for depth, errors in depths.items())
            everything += [error for _, error in points]
            style = styles[name]
            panel.plot(
                *zip(*points, strict=True), color=style.color, linestyle=style.line, marker=style.marker,
                markersize=4.5, linewidth=1.7, label=name,
            )  # fmt: skip
        panel.set_title(kind, color=theme.text, fontsize=10, loc="left")
        panel.set_yscale("log")
    for panel in panels[len(kinds) :]:
        panel.set_visible(False)
    _log_axis(panels[0].yaxis, everything)
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    for index in range(columns):
        panels[min(len(kinds), columns * rows) - 1 - index].tick_params(labelbottom=True)
    figure.supxlabel("block", color=theme.muted, fontsize=10)
    figure.supylabel("relative output error", color=theme.muted, fontsize=10)
    fullest = max(panels, key=lambda panel: len(panel.get_legend_handles_labels()[1]))
    _legend(figure, fullest, theme, 5)
    return figure


def _divergence_by_position(comparison: Comparison, theme: Theme) -> Figure | None:
    entries = [entry for entry in comparison.candidates if len(entry.evaluation.kl_by_position) > 1]
    if not entries:
        return None
    figure, (axes,) = _figure(theme, (6.2, 4.3))
    styles = styles_of(comparison, theme)
    values: list[float] = []
    for entry in entries:
        bins = [one for one in entry.evaluation.kl_by_position if one.divergence > 0]
        values += [one.divergence for one in bins]
        style = styles[entry.name]
        axes.plot(
            [one.position for one in bins], [one.divergence for one in bins], color=style.color,
            linestyle=style.line, linewidth=1.8, label=entry.name,
        )  # fmt: skip
    if not values:
        return None
    axes.set_yscale("log")
    _log_axis(axes.yaxis, values)
    _label(axes, theme, "position in the window (tokens)", "mean KL divergence (nats)")
    _legend(figure, axes, theme, 3)
    return figure


def _divergence_histogram(comparison: Comparison, theme: Theme) -> Figure | None:
    entries = [entry for entry in comparison.candidates if entry.evaluation.kl_histogram is not None]
    filled = [
        index
        for entry in entries
        for index, count in enumerate(entry.evaluation.kl_histogram.counts if entry.evaluation.kl_histogram else ())
        if count
    ]
    if not filled:
        return None
    figure, (axes,) = _figure(theme, (6.2, 4.3))
    styles = styles_of(comparison, theme)
    for entry in entries:
        histogram = entry.evaluation.kl_histogram
        if histogram is None:
            continue
        shown = slice(min(filled), max(filled) + 1)
        counts, edges = histogram.counts[shown], histogram.edges[min(filled) : max(filled) + 2]
        total = max(1, sum(histogram.counts))
        style = styles[entry.name]
        shares = [count / total for count in counts]
        centres = [(low * high) ** 0.5 for low, high in pairwise(edges)]
        axes.plot(centres, shares, color=style.color, linestyle=style.line, linewidth=1.8, label=entry.name)
        if len(entries) <= 3:
            axes.fill_between(centres, shares, color=style.color, alpha=0.08, linewidth=0)
    axes.set_xscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    _label(axes, theme, "KL divergence of a token (nats)", "share of tokens")
    axes.set_ylim(bottom=0)
    _legend(figure, axes, theme, 3)
    return figure


_Draw = Callable[[Comparison, Theme], "Figure | None"]
_PLOTS: dict[str, tuple[str, str, bool, _Draw]] = {
    "divergence-by-bits": (
        "Divergence against bits per weight",
        "Lower and further left is better. Bars are one standard error, clustered by window.",
        False,
        _divergence_by_bits,
    ),
    "divergence-by-method": (
        "Divergence by method",
        "The percentage is the change against round-to-nearest (RTN) in the same number format.",
        False,
        _divergence_by_method,
    ),
    "divergence-by-position": (
        "Divergence along the window",
        "A rise to the right would mean that errors pile up with context.",
        False,
        _divergence_by_position,
    ),
    "divergence-histogram": (
        "Divergence per token",
        "How many tokens are touched, and how hard: a good quantization has a thin right tail.",
        False,
        _divergence_histogram,
    ),
    "error-by-depth": (
        "Output error of each module, by depth",
        "Relative error of a module's output on the calibration inputs; experts of a block are averaged.",
        True,
        _error_by_depth,
    ),
}
