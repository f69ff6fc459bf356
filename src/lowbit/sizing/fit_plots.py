"""Pictures of a fit: divergence against size with the choice marked, and the bits that each module got."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from lowbit.evaluation.plots import LIGHT
from lowbit.formats.ggml import GGML_TYPES
from lowbit.pipeline.fit import Fit, Measurement
from lowbit.pipeline.fit_candidates import UNTOUCHED

_BLOCK = re.compile(r"^(.*?\.)?(\d+)\.(.*)$")
_NAME_WIDTH = 0.6
"""Bits per weight that a name takes on the axis."""
_EXPERT = re.compile(r"experts\.\d+\.")


def draw_fit(
    directory: Path,
    measurement: Measurement,
    chosen: Fit,
    curve: Sequence[Fit],
    quality: Mapping[str, Any] | None,
) -> tuple[Path, ...]:
    """Write ``fit-pareto.png`` and ``fit-bits.png`` into ``directory`` and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = (directory / "fit-pareto.png", directory / "fit-bits.png")
    _pareto(measurement, chosen, curve, quality).savefig(paths[0], dpi=144)
    _bits(chosen).savefig(paths[1], dpi=144)
    return paths


def _pareto(measurement: Measurement, chosen: Fit, curve: Sequence[Fit], quality: Mapping[str, Any] | None) -> Figure:
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    shown = [one for one in curve if one.divergence > 0]
    axes.plot(
        [one.bits_per_weight for one in shown], [one.divergence for one in shown],
        color=LIGHT.palette[0], label="best choice per module (predicted)",
    )  # fmt: skip
    uniform = _uniform(measurement)
    for index, (name, bits, divergence) in enumerate(uniform):
        label = "the same for all modules (predicted)" if index == 0 else None
        axes.plot(bits, divergence, "s", color=LIGHT.baseline, label=label)
        # A name goes to the left of its mark where the next mark is too near for it.
        crowded = index + 1 < len(uniform) and uniform[index + 1][1] - bits < _NAME_WIDTH
        place: dict[str, Any] = {"xytext": (-7, 3), "ha": "right"} if crowded else {"xytext": (7, -3)}
        axes.annotate(name, (bits, divergence), textcoords="offset points", fontsize=8, **place)
    axes.plot(chosen.bits_per_weight, chosen.divergence, "o", ms=11, mfc="none", color=LIGHT.palette[1], label="chosen")
    if quality is not None and quality.get("kl_divergence"):
        axes.plot(
            chosen.bits_per_weight, quality["kl_divergence"], "x", ms=9, mew=2, color=LIGHT.palette[2], label="measured"
        )
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight of what is chosen")
    axes.set_ylabel("KL divergence from the original (nats)")
    axes.set_title(f"{measurement.source}: what each size costs", loc="left")
    axes.grid(True, color=LIGHT.grid)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _uniform(measurement: Measurement) -> list[tuple[str, float, float]]:
    """Name, bits per weight and predicted divergence of giving every module the same, by rising size."""
    found = []
    names = {name for group in measurement.groups for name in group.candidates if name not in UNTOUCHED}
    for name in sorted(names):
        if all(name in group.candidates for group in measurement.groups):
            picked = [group.candidates[name] for group in measurement.groups]
            bits = 8 * sum(one.bytes for one in picked) / measurement.weights
            found.append((name, bits, sum(one.divergence for one in picked)))
    # Of methods that make the same size, the one that loses least.
    return [
        min((one for one in found if one[1] == bits), key=lambda one: one[2])
        for bits in sorted({bits for _, bits, _ in found})
    ]


def _bits(chosen: Fit) -> Figure:
    rows: dict[str, dict[int, str]] = {}
    for module, choice in chosen.choices.items():
        match = _BLOCK.match(module)
        if match:
            kind = _EXPERT.sub("experts.", match[3])
            rows.setdefault(kind, {})[int(match[2])] = choice
    names = sorted(set(chosen.choices.values()), key=_order)
    blocks = 1 + max((block for row in rows.values() for block in row), default=0)
    figure = Figure(figsize=(min(14.0, 3.4 + 0.34 * blocks), 2.1 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    shades = ["#dbe7ff", "#a9c6ff", "#6ba1ff", "#2563eb", "#173e9a", "#0b1f52"]
    colors = [shades[round(i * (len(shades) - 1) / max(1, len(names) - 1))] for i in range(len(names))]
    cells = [[names.index(row[b]) if b in row else -1 for b in range(blocks)] for row in rows.values()]
    axes.imshow(cells, cmap=ListedColormap(["#ffffff", *colors]), vmin=-1, vmax=max(len(names) - 1, 0), aspect="auto")
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.set_xticks(range(0, blocks, max(1, blocks // 16)))
    axes.set_xlabel("block")
    outside = [f"{module} {choice}" for module, choice in chosen.choices.items() if not _BLOCK.match(module)]
    title = [f"what each module got: {chosen.bits_per_weight:.3f} bits per weight", *outside]
    axes.set_title("\n".join(title), loc="left", fontsize=10)
    axes.spines[:].set_visible(False)
    handles = [
        axes.plot([], [], "s", ms=9, color=color, label=name)[0] for name, color in zip(names, colors, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(names)), frameon=False, fontsize=8)
    return figure


def _order(name: str) -> tuple[float, int, str]:
    """Fewer bits first, coarser groups first, then by method; dense last."""
    if name in GGML_TYPES:
        return GGML_TYPES[name].bits, 0, name
    match = re.match(r"int(\d+)(?:-g(\d+))?", name)
    return (99.0, 0, name) if match is None else (float(match[1]), -int(match[2] or 1 << 20), name)
