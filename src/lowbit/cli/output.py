"""What verbs print: figures for people, JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from lowbit.evaluation.findings import Finding

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def human_bytes(size: float) -> str:
    """``5.4 MiB``: binary units, three digits."""
    for unit in _UNITS[:-1]:
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} {_UNITS[-1]}"


def human_seconds(seconds: float) -> str:
    """``4.2 s``, ``3 min 05 s`` or ``2 h 10 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def plain(value: Any) -> Any:
    """``value`` as JSON can hold it: dataclasses by field, paths as text, a figure that is not finite as null."""
    if hasattr(value, "to_json") and not isinstance(value, type):
        return plain(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(entry) for entry in value]
    return str(value)


def write_json(value: Any, destination: str = "-") -> None:
    """Write ``value`` as indented JSON to a file, or to stdout for ``-``."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    if destination == "-":
        print(text)
    else:
        path = Path(destination)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")


def print_fields(fields: Mapping[str, str]) -> None:
    """Print ``name  value`` lines with the names aligned."""
    width = max((len(name) for name in fields), default=0)
    for name, value in fields.items():
        print(f"{name:<{width}}  {value}")


def print_findings(findings: Sequence[Finding]) -> None:
    """Print ``severity: where: what`` lines, errors first."""
    order = {"error": 0, "warning": 1, "note": 2}
    for finding in sorted(findings, key=lambda finding: order.get(finding.severity, 3)):
        print(f"{finding.severity}: {finding.where}: {finding.message}")


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, emphasis: Sequence[int] = ()) -> None:
    """Print a table, the first column to the left and the others to the right; ``emphasis`` are rows set in bold.

    On a terminal it is drawn with rich, elsewhere as aligned plain text.
    """
    if sys.stdout.isatty():
        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, title in enumerate(header):
            table.add_column(title, justify="left" if index == 0 else "right", no_wrap=True)
        for index, row in enumerate(rows):
            table.add_row(*row, style="bold" if index in emphasis else None)
        Console().print(table)
        return
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())
