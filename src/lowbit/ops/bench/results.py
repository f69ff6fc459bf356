"""What ``lowbit bench`` writes: one JSON document per run, and the same figures as CSV.

::

    {"schema": "lowbit-bench/1", "kind": "offline" | "serving", "date", "lowbit_version",
     "machine": {"cpu", "cpus", "memory", "gpus": [name], "load": load average over a minute when it began},
     "settings": {what was asked for},
     "runs": [{"name", "facts": {…}, "failures": {kind: count},
               "figures": {name: {"unit", "better", "median", "q1", "q3", "values": [one per repeat]}},
               "requests": [[repeat, due, sent, first, finished, prompt tokens, output tokens, failure], …]}]}

A figure that could not be measured (no request was answered) is null. ``requests`` is there for serving only.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lowbit.errors import CheckpointError, ResourceError, UsageError
from lowbit.ops.bench.load import Outcome
from lowbit.ops.bench.stats import Figure

__all__ = ["SCHEMA", "Bench", "Run", "machine_facts", "read_bench", "to_csv", "write_file"]

SCHEMA = "lowbit-bench/1"


@dataclass(frozen=True, slots=True)
class Run:
    """One model, or one level of load: what it was, its figures, and for serving every request with its repeat."""

    name: str
    facts: Mapping[str, Any]
    figures: Mapping[str, Figure]
    failures: Mapping[str, int] = field(default_factory=dict)
    requests: tuple[tuple[int, Outcome], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; see the module."""
        found: dict[str, Any] = {
            "name": self.name,
            "facts": dict(self.facts),
            "failures": dict(self.failures),
            "figures": {name: figure.to_json() for name, figure in self.figures.items()},
        }
        if self.requests:
            found["requests"] = [
                [repeat, each.due, each.sent, each.first, each.finished, each.prompt_tokens, each.output_tokens,
                 each.failure]
                for repeat, each in self.requests
            ]  # fmt: skip
        return found


@dataclass(frozen=True, slots=True)
class Bench:
    """A whole benchmark."""

    kind: str
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    runs: tuple[Run, ...]
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    lowbit_version: str = ""

    def to_json(self) -> dict[str, Any]:
        """The document that the module describes."""
        found = {
            "schema": SCHEMA,
            "kind": self.kind,
            "date": self.date,
            "lowbit_version": self.lowbit_version,
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            "runs": [run.to_json() for run in self.runs],
        }
        plain: dict[str, Any] = _finite(found)
        return plain


def machine_facts() -> dict[str, Any]:
    """Processor, memory and GPUs of this machine, and how busy it was."""
    from lowbit.planning.hardware import probe

    hardware = probe()
    return {
        "cpu": hardware.cpu_name,
        "cpus": hardware.cpus,
        "memory": hardware.memory,
        "gpus": [gpu.name for gpu in hardware.gpus],
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def read_bench(path: Path) -> Bench:
    """Read a JSON document of :func:`write_file`.

    Raises :class:`CheckpointError` where it cannot be read and :class:`UsageError` where it is something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not JSON; name a file that lowbit bench --json wrote") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise UsageError(f"{path}: not a {SCHEMA} document; name a file that lowbit bench --json wrote")
    try:
        runs = tuple(_run(entry) for entry in content["runs"])
        return Bench(
            str(content["kind"]),
            dict(content["settings"]),
            dict(content["machine"]),
            runs,
            str(content["date"]),
            str(content["lowbit_version"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: damaged {SCHEMA} document ({type(error).__name__}: {error})") from error


def _run(entry: Mapping[str, Any]) -> Run:
    figures = {
        str(name): Figure(str(each["unit"]), each["better"], tuple(_number(value) for value in each["values"]))
        for name, each in entry["figures"].items()
    }
    requests = []
    for repeat, due, sent, first, finished, prompt, output, failure in entry.get("requests", ()):
        gaps = () if first is None or output < 2 else ((finished - first) / (output - 1),) * (output - 1)
        requests.append((int(repeat), Outcome(due, sent, finished, first, prompt, output, gaps, failure)))
    return Run(str(entry["name"]), dict(entry["facts"]), figures, dict(entry["failures"]), tuple(requests))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _finite(value: Any) -> Any:
    """The same with numbers that are not finite as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def to_csv(bench: Bench) -> str:
    """A line for each figure of each run: ``run,figure,unit,median,q1,q3,repeats``."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("run", "figure", "unit", "median", "q1", "q3", "repeats"))
    for run in bench.runs:
        for name, figure in run.figures.items():
            low, high = figure.spread
            writer.writerow((run.name, name, figure.unit, figure.median, low, high, len(figure.values)))
        for kind, count in run.failures.items():
            writer.writerow((run.name, f"failed: {kind}", "requests", count, count, count, 1))
    return buffer.getvalue()


def write_file(path: Path, data: bytes) -> None:
    """Write atomically, making directories. Raises :class:`ResourceError` where that cannot be."""
    from lowbit.checkpoint.files import write_atomically

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{path.parent}: cannot be made: {error.strerror or error}") from error
    write_atomically(path, [data], len(data), "free some space or write it elsewhere")


def check_writable(paths: Sequence[Path]) -> None:
    """Raise :class:`UsageError` for a file that could not be written after a long run."""
    for path in paths:
        if path.is_dir():
            raise UsageError(f"{path}: is a directory; name a file")
        existing = path.absolute().parent
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UsageError(f"{path}: {existing} cannot be written to")
