"""How a long step looks: a rich bar on a terminal, plain lines elsewhere. Both write to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

import psutil
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from lowbit.cli.output import human_bytes, human_seconds
from lowbit.pipeline.progress import Progress, Silent

Fields = Mapping[str, float | str]

PLAIN_INTERVAL = 5.0
"""Seconds between plain lines of one step; its first and last unit are always shown."""


def create_progress(*, quiet: bool = False, stream: TextIO | None = None) -> Progress:
    """A bar if ``stream`` (stderr) is a terminal, plain lines if not, nothing if ``quiet``."""
    stream = stream or sys.stderr
    if quiet:
        return Silent()
    return RichProgress(stream) if stream.isatty() else PlainProgress(stream)


@contextmanager
def shown_progress(*, quiet: bool = False) -> Iterator[Progress]:
    """:func:`create_progress`, closed at the end."""
    progress = create_progress(quiet=quiet)
    try:
        yield progress
    finally:
        progress.close()


class Pace:
    """Units done and the time that the rest will take at the pace so far."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self.done = 0
        self._clock = clock
        self._started = clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    def time_left(self) -> float | None:
        """Seconds, or None before the first unit is done."""
        if not self.done:
            return None
        return self.elapsed / self.done * max(0, self.total - self.done)


def show_fields(fields: Fields) -> str:
    """``error 0.0031 · 1,234 tok/s``: the fields in their own order, figures to three digits."""
    return " · ".join(_show_field(name, value) for name, value in fields.items())


def _show_field(name: str, value: float | str) -> str:
    if name == "tokens_per_second" and not isinstance(value, str):
        return f"{value:,.0f} tok/s"
    if name == "memory" and not isinstance(value, str):
        return human_bytes(value)
    label = name.replace("_", " ")
    return f"{label} {value}" if isinstance(value, str) else f"{label} {value:.3g}"


def memory_in_use() -> int:
    """Resident bytes of this process now."""
    return int(psutil.Process().memory_info().rss)


class PlainProgress:
    """One line per unit, at most one each few seconds, for logs and pipes."""

    def __init__(
        self, stream: TextIO, clock: Callable[[], float] = time.monotonic, interval: float = PLAIN_INTERVAL
    ) -> None:
        self._stream = stream
        self._clock = clock
        self._interval = interval
        self._pace: Pace | None = None
        self._last = float("-inf")

    def start(self, title: str, total: int) -> None:
        """Announce a step of ``total`` units."""
        self._pace = Pace(total, self._clock)
        self._last = float("-inf")
        self._print(title)

    def at(self, module: str) -> None:
        """Nothing: a log has a line per unit."""

    def advance(self, module: str, **fields: float | str) -> None:
        """Count a unit and print it if it is the last one or the previous line is old enough."""
        pace = self._pace
        if pace is None:
            return
        pace.done += 1
        if pace.done < pace.total and self._clock() - self._last < self._interval:
            return
        self._last = self._clock()
        parts = [f"[{pace.done}/{pace.total}] {module}"]
        parts.append(show_fields({"memory": memory_in_use(), **fields}))
        left = pace.time_left()
        parts.append(f"{human_seconds(left)} left" if left else human_seconds(pace.elapsed))
        self._print("  " + " · ".join(parts))

    def message(self, text: str) -> None:
        """Print a line of its own."""
        self._print(text)

    def close(self) -> None:
        """End the step."""
        self._pace = None

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class _TwoLines(Bar):
    """A bar with a line of figures below it, so that a narrow terminal cuts off neither."""

    detail = Text()

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, then the figures."""
        yield self.make_tasks_table(self.tasks)
        if self.detail:
            yield self.detail


class RichProgress:
    """A live bar: units done, the time taken and left; below it the current module, its figures and memory."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream)
        self._bar: _TwoLines | None = None
        self._task = TaskID(0)
        self._pace = Pace(0)
        self._fields: Fields = {}

    def start(self, title: str, total: int) -> None:
        """Show a new bar; one that is still open is closed first."""
        self.close()
        self._pace = Pace(total)
        self._fields = {}
        self._bar = _TwoLines(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
        )
        self._task = self._bar.add_task(title, total=total, left="")
        self._bar.start()

    def at(self, module: str) -> None:
        """Name the module that is worked on, beside the figures of the last unit."""
        if self._bar is not None:
            shown = show_fields({"memory": memory_in_use(), **self._fields})
            self._bar.detail = Text(f"  {module} · {shown}", overflow="ellipsis")

    def advance(self, module: str, **fields: float | str) -> None:
        """Move the bar by one unit."""
        if self._bar is None:
            return
        self._pace.done += 1
        left = self._pace.time_left()
        self._fields = {name: value for name, value in fields.items() if name != "memory"}
        self.at(module)
        self._bar.update(self._task, advance=1, left=f"{human_seconds(left)} left" if left else "")

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the finished bar on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
