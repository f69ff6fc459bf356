"""What an evaluation found, as frozen values.

Their JSON is what the command line, the report and the certificate in ``lowbit.json`` write.

Perplexity and divergence are over natural logarithms (nats); sizes are bytes, times seconds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from lowbit.errors import CheckpointError, UsageError

Level = Literal["good", "acceptable", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judgement of one figure against the range that is usual for its precision."""

    level: Level
    message: str


@dataclass(frozen=True, slots=True)
class WorstToken:
    """A token where the candidate is furthest from its reference; probabilities are of the token in the text."""

    window: int
    position: int
    divergence: float
    before: str
    token: str
    after: str
    reference_probability: float
    probability: float
    reference_choice: str
    choice: str


@dataclass(frozen=True, slots=True)
class PositionBin:
    """Mean divergence of the tokens around one place in the window."""

    position: float
    divergence: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts between ``edges`` (one more edge than counts); the outer bins also hold what lies beyond them."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The figures of one model over one text, and against a reference where one was given (else None)."""

    model: str
    text: str
    text_sha256: str
    tokens: int
    windows: int
    seq_len: int
    stride: int | None
    perplexity: float
    perplexity_error: float
    bits_per_weight: float
    linear_bits_per_weight: float
    size_bytes: int
    reference: str | None = None
    reference_bits_per_weight: float | None = None
    reference_size_bytes: int | None = None
    reference_perplexity: float | None = None
    reference_perplexity_error: float | None = None
    perplexity_ratio: float | None = None
    perplexity_ratio_error: float | None = None
    kl_divergence: float | None = None
    kl_divergence_error: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None
    top1_agreement_error: float | None = None
    kl_by_position: tuple[PositionBin, ...] = ()
    kl_histogram: Histogram | None = None
    worst_tokens: tuple[WorstToken, ...] = ()
    verdicts: tuple[Verdict, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields under their own names, as plain JSON values; an infinite figure becomes null."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    def certificate(self) -> dict[str, Any]:
        """The figures worth carrying in ``lowbit.json``: no distributions, no text."""
        left_out = {"kl_by_position", "kl_histogram", "worst_tokens"}
        return {name: value for name, value in self.to_json().items() if name not in left_out}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Evaluation:
        """The inverse of :meth:`to_json`; TypeError for unknown or missing fields."""
        fields = dict(values)
        fields["kl_by_position"] = tuple(PositionBin(**entry) for entry in fields.get("kl_by_position", ()))
        if fields.get("kl_histogram") is not None:
            histogram = fields["kl_histogram"]
            fields["kl_histogram"] = Histogram(tuple(histogram["edges"]), tuple(histogram["counts"]))
        fields["worst_tokens"] = tuple(WorstToken(**entry) for entry in fields.get("worst_tokens", ()))
        fields["verdicts"] = tuple(Verdict(**entry) for entry in fields.get("verdicts", ()))
        return Evaluation(**fields)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One quantized model of a comparison.

    ``name`` is what tables and legends show; ``method`` and ``spec`` group candidates (``gptq``, ``int4-g128-sym``);
    ``module_errors`` are relative output errors ``tr(ΔGΔᵀ)/tr(WGWᵀ)`` by module name, in the model's order.
    """

    name: str
    method: str
    spec: str
    evaluation: Evaluation
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    module_errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sample:
    """Continuations of one prompt by model name; the reference goes under its own name."""

    prompt: str
    continuations: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Candidates measured on the same text against the same reference.

    Raises :class:`UsageError` when there are none, or when they were measured on different things.
    """

    title: str
    candidates: tuple[Candidate, ...]
    samples: tuple[Sample, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.candidates:
            raise UsageError("a comparison needs at least one evaluated model")
        basis = {(one.reference, one.text_sha256, one.tokens) for one in (e.evaluation for e in self.candidates)}
        if len(basis) > 1:
            raise UsageError("candidates of a comparison must be evaluated on the same text against the same reference")

    @property
    def reference(self) -> str | None:
        """Name of the reference, or None without one."""
        return self.candidates[0].evaluation.reference

    @property
    def reference_bits_per_weight(self) -> float:
        """Stored bits per parameter of the reference, 0 without one."""
        return self.candidates[0].evaluation.reference_bits_per_weight or 0.0

    @property
    def reference_size_bytes(self) -> int:
        """Size of the reference's tensors, 0 without one."""
        return self.candidates[0].evaluation.reference_size_bytes or 0

    def to_json(self) -> dict[str, Any]:
        """The whole comparison as plain JSON values; an infinite figure becomes null."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Comparison:
        """The inverse of :meth:`to_json`; TypeError for unknown or missing fields."""
        fields = dict(values)
        fields["candidates"] = tuple(
            Candidate(**{**entry, "evaluation": Evaluation.from_json(entry["evaluation"])})
            for entry in fields["candidates"]
        )
        fields["samples"] = tuple(Sample(**entry) for entry in fields.get("samples", ()))
        fields["notes"] = tuple(fields.get("notes", ()))
        return Comparison(**fields)


def read_comparison(path: Path) -> Comparison:
    """Read a ``report.json``; :class:`CheckpointError` if it is missing or not one."""
    try:
        return Comparison.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: not a lowbit report ({error})") from error


def judge_perplexity(ratio: float, standard_error: float, bits: float) -> Verdict:
    """Judge a perplexity ratio by what is usual: 8 bits cost 1-2 %, 4 bits 3-5 %; there is no usual figure below 4."""
    usual, limit = (0.01, 0.02) if bits >= 8 else (0.03, 0.05)
    rise = ratio - 1
    figure = f"perplexity {rise:+.2%} ± {standard_error:.2%}"
    precision = "8 bits" if bits >= 8 else "4 bits"
    if not math.isfinite(rise) or rise > limit:
        return Verdict("warning", f"{figure}: beyond the {limit:.0%} usual for {precision}")
    if rise > usual:
        return Verdict("acceptable", f"{figure}: within the {usual:.0%} to {limit:.0%} usual for {precision}")
    return Verdict("good", f"{figure}: under the {usual:.0%} usual for {precision}")


def judge_weight_error(mean_error: float) -> Verdict:
    """Judge a mean absolute weight error: below 0.01 is good, below 0.05 acceptable."""
    figure = f"mean weight error {mean_error:.4f}"
    if mean_error < 0.01:
        return Verdict("good", f"{figure}: below 0.01")
    if mean_error < 0.05:
        return Verdict("acceptable", f"{figure}: below 0.05")
    return Verdict("warning", f"{figure}: 0.05 or more; use more bits or smaller groups")


def judge_output_error(relative_error: float) -> Verdict:
    """Judge a relative output error: below 0.05 is normal, above 0.1 alarming."""
    figure = f"relative output error {relative_error:.4f}"
    if relative_error < 0.05:
        return Verdict("good", f"{figure}: below 0.05")
    if relative_error <= 0.1:
        return Verdict("acceptable", f"{figure}: between 0.05 and 0.1")
    return Verdict("warning", f"{figure}: above 0.1; use more bits, smaller groups or calibration text like the task")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
