"""Progress bars and plain lines."""

from __future__ import annotations

import io

from lowbit.cli.progress import Pace, PlainProgress, RichProgress, create_progress, show_fields
from lowbit.pipeline.progress import Progress, Silent


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_choice_of_display() -> None:
    assert isinstance(create_progress(stream=io.StringIO()), PlainProgress)
    assert isinstance(create_progress(stream=Terminal()), RichProgress)
    assert isinstance(create_progress(quiet=True, stream=Terminal()), Silent)


def test_pace_extrapolates() -> None:
    clock = Clock()
    pace = Pace(10, clock)
    assert pace.time_left() is None
    clock.now, pace.done = 6.0, 3
    assert pace.time_left() == 14.0
    pace.done = 12
    assert pace.time_left() == 0.0


def test_plain_lines_have_everything() -> None:
    stream, clock = io.StringIO(), Clock()
    progress: Progress = PlainProgress(stream, clock, interval=5.0)
    progress.start("gptq int4-g128-sym", 3)
    clock.now = 10.0
    progress.advance("model.layers.0", error=0.00312, tokens_per_second=1234.5, memory=float(3 << 29))
    progress.message("a note")
    clock.now = 12.0
    progress.advance("model.layers.1", error=0.01)  # too soon after the last line
    clock.now = 13.0
    progress.advance("model.layers.2", error=0.01)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "gptq int4-g128-sym"
    assert lines[1].startswith("  [1/3] model.layers.0")
    for piece in ("error 0.00312", "1,234 tok/s", "1.5 GiB", "20 s left"):
        assert piece in lines[1]
    assert lines[2] == "a note"
    assert lines[3].startswith("  [3/3] model.layers.2")
    assert len(lines) == 4


def test_plain_lines_outside_a_step_are_harmless() -> None:
    progress = PlainProgress(io.StringIO())
    progress.advance("module")
    progress.close()


def test_bar_on_a_terminal() -> None:
    stream = Terminal()
    progress = RichProgress(stream)
    progress.start("Quantizing", 2)
    progress.at("model.layers.0.self_attn.q_proj")
    progress.advance("model.layers.0", error=0.5)
    progress.message("[not markup] a note")
    progress.start("Evaluating", 1)  # closes the first bar
    progress.advance("model.layers.1")
    progress.close()
    progress.close()
    text = stream.getvalue()
    for piece in ("Quantizing", "Evaluating", "model.layers.1", "[not markup] a note"):
        assert piece in text


def test_fields() -> None:
    assert (
        show_fields({"error": 0.123456, "resumed": "yes", "peak_loss": 2.0})
        == "error 0.123 · resumed yes · peak loss 2"
    )
