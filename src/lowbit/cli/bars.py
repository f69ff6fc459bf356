"""A bar picture of memory in the terminal: one bar a precision, its parts in colours or letters."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lowbit.cli.output import human_bytes

if TYPE_CHECKING:
    from lowbit.sizing.estimate_results import Estimate

WIDTH = 72
"""Cells of the longest bar."""

PARTS: Mapping[str, tuple[str, str]] = {
    "embedding": ("e", "blue"),
    "attention": ("a", "cyan"),
    "mlp": ("m", "green"),
    "experts": ("x", "green"),
    "encoder": ("v", "bright_blue"),
    "head": ("h", "blue"),
    "other": ("o", "white"),
    "kv cache": ("K", "yellow"),
    "activations": ("w", "magenta"),
    "graphs": ("g", "red"),
    "engine": ("E", "red"),
}
"""Letter and colour of each part, in the order of a bar."""


def print_bars(result: Estimate) -> None:
    """Draw every precision that has sizes against the device."""
    shown = [entry for entry in result.precisions if entry.parts]
    if not shown:
        return
    largest = max([entry.total for entry in shown] + [result.devices.memory])
    scale = WIDTH / min(largest, 3 * result.devices.memory)
    label = max(len(entry.scheme) for entry in shown)
    coloured = sys.stdout.isatty()
    for entry in shown:
        cells = _cells(entry.segments, scale)
        _print_line(f"{entry.scheme:<{label}} ", cells, f" {human_bytes(entry.total)}", coloured)
    marker = round(result.devices.memory * scale)
    print(" " * (label + 1) + "─" * max(0, marker - 1) + f"┘ {human_bytes(result.devices.memory)} of one device")
    used = [part for part in PARTS if any(part in entry.segments for entry in shown)]
    _print_legend(used, coloured)


def _cells(parts: Mapping[str, int], scale: float) -> list[str]:
    """The part that each cell of a bar shows."""
    cells: list[str] = []
    total = 0.0
    for part, size in parts.items():
        total += size
        cells += [part] * (min(3 * WIDTH, round(total * scale)) - len(cells))
    return cells[: WIDTH + 1]


def _print_line(label: str, cells: list[str], tail: str, coloured: bool) -> None:
    if not coloured:
        print(label + "".join(PARTS[part][0] for part in cells) + tail)
        return
    from rich.console import Console
    from rich.text import Text

    text = Text(label)
    for part in cells:
        text.append("█", style=PARTS[part][1])
    Console(width=len(label) + len(cells) + len(tail) + 1).print(text.append(tail), soft_wrap=True)


def _print_legend(parts: list[str], coloured: bool) -> None:
    if not coloured:
        print("  ".join(f"{PARTS[part][0]} {part}" for part in parts))
        return
    from rich.console import Console
    from rich.text import Text

    text = Text()
    for part in parts:
        text.append("█ ", style=PARTS[part][1]).append(f"{part}  ")
    Console().print(text, soft_wrap=True)
