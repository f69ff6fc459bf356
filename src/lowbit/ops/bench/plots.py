"""Pictures of a benchmark: precisions side by side, bits against quality against speed, and latency against load."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Picture
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lowbit.evaluation.plots import LIGHT
from lowbit.ops.bench.results import Bench, Run, write_file
from lowbit.ops.bench.stats import Figure

__all__ = ["draw_bench"]

_PANELS: tuple[tuple[str, str, float, tuple[tuple[str, str], ...]], ...] = (
    ("resident memory (MiB)", "memory", 2.0**-20, (("memory", ""),)),
    ("time until it answers (s)", "load", 1.0, (("load", ""),)),
    ("latency (ms)", "ttft", 1e3, (("ttft", "first token"), ("itl_p50", "token, p50"), ("itl_p99", "token, p99"))),
    ("throughput (tokens/s)", "decode", 1.0, (("prefill", "prefill"), ("decode", "decode"))),
)
"""Title, key, factor and figures of each panel of the comparison of precisions."""


def draw_bench(directory: Path, bench: Bench) -> list[Path]:
    """Write every picture that the runs have data for into ``directory``; gives the paths."""
    if bench.kind == "offline":
        pictures = {"bench-precision.png": _precisions(bench.runs), "bench-tradeoff.png": _tradeoff(bench.runs)}
    else:
        pictures = {"bench-load.png": _load(bench)}
    paths = []
    for name, picture in pictures.items():
        if picture is not None:
            buffer = io.BytesIO()
            picture.savefig(buffer, format="png", dpi=144, metadata={"Software": None})
            write_file(directory / name, buffer.getvalue())
            paths.append(directory / name)
    return paths


def _precisions(runs: Sequence[Run]) -> Picture:
    """A panel each for memory, load time, latency and throughput; bars are medians, whiskers quartiles."""
    picture = Picture(figsize=(9.6, 1.6 + 1.0 * len(runs)), layout="constrained")
    for axes, (title, _, factor, series) in zip(picture.subplots(2, 2).flat, _PANELS, strict=True):
        _clean(axes)
        height = 0.8 / len(series)
        for index, (key, label) in enumerate(series):
            figures = [run.figures[key] for run in runs]
            places = [row + (index - (len(series) - 1) / 2) * height for row in range(len(runs))]
            middle = [figure.median * factor for figure in figures]
            axes.barh(
                places, middle, height=height * 0.9, color=LIGHT.palette[index], label=label,
                xerr=_whiskers(figures, factor), error_kw={"ecolor": LIGHT.text, "elinewidth": 1, "capsize": 2},
            )  # fmt: skip
            for place, value, figure in zip(places, middle, figures, strict=True):
                edge = figure.spread[1] * factor
                axes.annotate(f"{value:.3g}", (edge, place), xytext=(4, 0), textcoords="offset points", va="center",
                              fontsize=8, color=LIGHT.muted)  # fmt: skip
        axes.set_yticks(range(len(runs)), [run.name for run in runs], fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.grid(False, axis="y")
        axes.set_title(title, loc="left", fontsize=10)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8, loc="best")
    return picture


def _tradeoff(runs: Sequence[Run]) -> Picture | None:
    """Bits to the right, divergence upwards, speed as the size of the mark; None with fewer than two models."""
    known = [run for run in runs if run.facts.get("bits_per_weight")]
    if len(known) < 2:
        return None
    picture = Picture(figsize=(6.8, 4.4), layout="constrained")
    axes = picture.subplots()
    _clean(axes)
    fastest = max(run.figures["decode"].median for run in known)
    divergences = {run.name: run.facts.get("kl_divergence") for run in known}
    positive = [value for value in divergences.values() if value]
    floor = min(positive, default=1e-3) / 4
    for run in known:
        speed = run.figures["decode"].median
        value = divergences[run.name]
        color = LIGHT.palette[0] if value else LIGHT.baseline  # a zero has no place on this axis: grey, at the bottom
        place = (run.facts["bits_per_weight"], value or floor)
        axes.scatter(*place, s=700 * speed / fastest, color=color, alpha=0.35, linewidth=0)
        axes.scatter(*place, s=14, color=color)
        quality = "not measured" if value is None else "exact" if value == 0 else f"KL {value:.3g}"
        axes.annotate(f"{run.name}\n{speed:.4g} tokens/s, {quality}", place, xytext=(14, 0), fontsize=8,
                      textcoords="offset points", va="center", color=LIGHT.text)  # fmt: skip
    axes.set_yscale("log")
    _plain_log(axes.yaxis, steps=(1.0,))
    axes.margins(x=0.35, y=0.3)
    axes.set_xlabel("bits per weight", color=LIGHT.muted)
    axes.set_ylabel("KL divergence from the original (nats)", color=LIGHT.muted)
    axes.set_title("bits, quality, speed (the larger the disc, the faster)", loc="left", fontsize=10)
    return picture


def _load(bench: Bench) -> Picture:
    """Time to first token, time per token and time in all against load, and goodput beside what was offered."""
    opened = any(run.facts.get("rate") for run in bench.runs)
    key = "rate" if opened else "clients"
    runs = sorted((run for run in bench.runs if run.facts.get(key)), key=lambda run: float(run.facts[key]))
    loads = [float(run.facts[key]) for run in runs]
    picture = Picture(figsize=(9.6, 6.4), layout="constrained")
    panels = picture.subplots(2, 2).flat
    for axes, (name, title) in zip(
        panels, (("ttft", "time to first token (s)"), ("tpot", "time per token (s)"), ("e2e", "whole answer (s)")),
        strict=False,
    ):  # fmt: skip
        _clean(axes)
        for color, share in zip(LIGHT.palette, (50, 90, 99), strict=False):
            _line(axes, loads, [run.figures[f"{name}_p{share}"] for run in runs], color, f"p{share}")
        objective = bench.settings.get("objectives", {}).get({"tpot": "itl"}.get(name, name))
        if objective is not None:
            axes.axhline(objective, color=LIGHT.baseline, linestyle="--", linewidth=1, label="objective")
        axes.set_yscale("log")
        _plain_log(axes.yaxis)
        axes.set_title(title, loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    axes = picture.axes[3]
    _clean(axes)
    _line(axes, loads, [run.figures["requests_per_second"] for run in runs], LIGHT.palette[1], "answered")
    _line(axes, loads, [run.figures["goodput"] for run in runs], LIGHT.palette[0], "within the objectives (goodput)")
    if opened:
        axes.plot(loads, loads, color=LIGHT.baseline, linestyle="--", linewidth=1, label="offered")
    axes.set_ylim(bottom=0)
    axes.set_title("requests per second", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    for axes in picture.axes:
        axes.set_xlabel("requests per second offered" if opened else "requests under way", color=LIGHT.muted)
    return picture


def _line(axes: Any, loads: Sequence[float], figures: Sequence[Figure], color: str, label: str) -> None:
    points = [(load, figure) for load, figure in zip(loads, figures, strict=True) if math.isfinite(figure.median)]
    if points:
        axes.errorbar(
            [load for load, _ in points], [figure.median for _, figure in points],
            yerr=_whiskers([figure for _, figure in points], 1.0), color=color, marker="o", markersize=4,
            linewidth=1.6, capsize=2, elinewidth=1, label=label,
        )  # fmt: skip


def _plain_log(axis: Any, steps: Sequence[float] = (1.0, 2.0, 5.0)) -> None:
    """Ticks at ``steps`` of each power of ten, written out."""
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _whiskers(figures: Sequence[Figure], factor: float) -> list[list[float]]:
    """Distances from the medians to the quartiles."""
    below = [max(0.0, (figure.median - figure.spread[0]) * factor) for figure in figures]
    above = [max(0.0, (figure.spread[1] - figure.median) * factor) for figure in figures]
    return [below, above]


def _clean(axes: Any) -> None:
    axes.grid(True, color=LIGHT.grid)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=LIGHT.muted)
