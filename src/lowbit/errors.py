"""Every error that lowbit raises for its user.

::

    LowbitError
    ├── UsageError          a flag, recipe key or argument that cannot work
    ├── CheckpointError     a file that is missing, truncated, corrupt or contradictory
    ├── UnsupportedError    a format, architecture or engine that cannot take what is asked; carries the reasons
    ├── CalibrationError    calibration or evaluation text that is empty, too short or unreadable
    ├── NumericsError       weights or statistics that are not finite or cannot be factorised
    └── ResourceError       disk or memory that does not suffice

A message is one line: which file, tensor, field or flag; what was expected; what to do. The command line prints
it and exits with status 2.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "LowbitError",
    "NumericsError",
    "ResourceError",
    "UnsupportedError",
    "UsageError",
]


class LowbitError(Exception):
    """Base of all errors that are the user's to mend."""


class UsageError(LowbitError):
    """A flag, recipe key or argument that cannot work."""


class CheckpointError(LowbitError):
    """A checkpoint file that is missing, truncated, corrupt or contradictory."""


class UnsupportedError(LowbitError):
    """A combination that cannot work, with the reasons."""

    def __init__(self, what: str, reasons: Sequence[str] = ()) -> None:
        self.reasons = tuple(reasons)
        super().__init__(f"{what}: {'; '.join(self.reasons)}" if self.reasons else what)


class CalibrationError(LowbitError):
    """Calibration or evaluation text that is empty, too short or unreadable."""


class NumericsError(LowbitError):
    """Numbers that are not finite or a matrix that cannot be factorised."""


class ResourceError(LowbitError):
    """Not enough disk or memory."""
