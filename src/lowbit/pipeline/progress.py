"""How a long step tells what it is doing; the command line implements it with rich or plain lines."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one long step."""

    def start(self, title: str, total: int) -> None:
        """A step of ``total`` units (blocks, usually) begins."""

    def at(self, module: str) -> None:
        """Work on ``module``, a part of the present unit, begins."""

    def advance(self, module: str, **fields: float | str) -> None:
        """One unit is done; ``module`` names it, ``fields`` are shown beside it (error, tokens_per_second …)."""

    def message(self, text: str) -> None:
        """A line for the user that is not tied to a unit."""

    def close(self) -> None:
        """The step is over."""


class Silent:
    """Discards all progress."""

    def start(self, title: str, total: int) -> None:
        """Do nothing."""

    def at(self, module: str) -> None:
        """Do nothing."""

    def advance(self, module: str, **fields: float | str) -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
