"""The picture of an estimate: memory of one device by part, one bar a precision, against what the device has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lowbit.sizing.estimate_results import Estimate
from lowbit.sizing.pictures import write_figure

_GIB = 2**30

COLOURS: Mapping[str, str] = {
    "embedding": "#93c5fd",
    "attention": "#2563eb",
    "mlp": "#0f8a6d",
    "experts": "#0f8a6d",
    "encoder": "#7a6a00",
    "head": "#60a5fa",
    "other": "#8b949e",
    "kv cache": "#d9660a",
    "activations": "#8b3fd1",
    "graphs": "#f472b6",
    "engine": "#c4306f",
}
"""Colour of each part, in the order of a bar."""


def write_picture(result: Estimate, path: str | Path) -> None:
    """Draw ``result`` into a file whose ending names the format. Raises :class:`UsageError` for one that is unknown."""
    write_figure(draw(result), path)


def draw(result: Estimate) -> Figure:
    """Horizontal stacked bars, the device's memory and what may be used of it as lines."""
    shown = [entry for entry in result.precisions if entry.parts]
    figure = Figure(figsize=(9, 1.8 + 0.45 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    used: dict[str, None] = {}
    for place, entry in enumerate(shown):
        left = 0.0
        for part, size in entry.segments.items():
            axes.barh(place, size / _GIB, left=left, color=COLOURS[part], height=0.7)
            left += size / _GIB
            used[part] = None
        box = {"boxstyle": "square,pad=0.15", "fc": "white", "ec": "none"}
        label = axes.annotate(f"{entry.total / _GIB:.2f}", (left, place), (5, 0), textcoords="offset points", bbox=box)
        label.set(va="center", fontsize=9, zorder=3)
    axes.axvline(result.devices.memory / _GIB, color="#1b1f24", linestyle="--", linewidth=1)
    if shown:
        axes.axvline(shown[0].budget / _GIB, color="#1b1f24", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(shown)), [entry.scheme for entry in shown])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    device = f"{result.devices.name}, {result.devices.memory / _GIB:.0f} GiB, dashed"
    axes.set_xlabel(f"GiB on one device ({device}; dotted: what {result.engine} may use of them)")
    title = f"{result.model}: {result.requests} × {result.context:,} tokens, {result.engine}"
    axes.set_title(title, fontsize=11, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles = [Patch(color=COLOURS[part], label=part) for part in COLOURS if part in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure
