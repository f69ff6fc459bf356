"""What an alert is, as data, and the words that many of them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

__all__ = ["AT", "HERE", "PERCENT", "PLAIN", "SECONDS", "SEEN", "TIER", "Alert", "Case", "Recorded", "Threshold"]

Severity: TypeAlias = Literal["critical", "warning", "info"]


@dataclass(frozen=True, slots=True)
class Threshold:
    """A number that an expression compares with, and where it comes from."""

    value: float
    origin: str


@dataclass(frozen=True, slots=True)
class Recorded:
    """A series that Prometheus computes once for several alerts and the dashboard."""

    name: str
    expression: str


@dataclass(frozen=True, slots=True)
class Case:
    """For ``promtool test rules``: series (name with labels to values in its notation, one a minute) that must make the
    alert fire at a minute, with these labels and this figure; ``quiet`` are series that must not.
    """

    series: Mapping[str, str]
    minute: int
    labels: Mapping[str, str]
    shown: str
    quiet: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert. ``wait`` is how long the expression must hold; ``figure`` a Prometheus template of its value.

    ``means`` says what users notice and why; ``look`` and ``mend`` are commands or settings, in order.
    """

    name: str
    severity: Severity
    expression: str
    wait: str
    summary: str
    figure: str
    means: str
    look: tuple[str, ...]
    mend: tuple[str, ...]
    case: Case


HERE = 'instance="a:8000", job="lowbit"'
TIER = 'model="chat", tier="int4"'
SEEN = {"model": "chat", "tier": "int4"}
AT = {"instance": "a:8000", "job": "lowbit"}
PERCENT = "{{ $value | humanizePercentage }}"
SECONDS = "{{ $value | humanizeDuration }}"
PLAIN = "{{ $value | humanize }}"
"""Labels of the gateway, and of a tier, in the series of cases; the same as fields; and ways to show a figure."""
