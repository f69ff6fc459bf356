"""What is measured per token, and how per-token numbers become a perplexity or a divergence with an error bar.

Pure arithmetic on chunks of logits: no model, no file. A chunk is ``[tokens, vocabulary]``; only a few scalars per
token are kept, so memory grows by 25 bytes a token and never with the vocabulary.

Losses and divergences are in nats. Standard errors are clustered by window, because tokens of one text are not
independent: ``se² = W/(W-1) · Σ_w (Σ_{t in w} (x_t - mean))² / n²``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lowbit.errors import CalibrationError, NumericsError, UsageError

HISTOGRAM_EDGES = tuple(10.0 ** (k / 4) for k in range(-32, 9))
"""Edges of the histogram of per-token divergence: four bins a decade from 1e-8 to 100 nats."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Text cut into windows that a model reads one by one.

    ``ids``      int64 ``[windows, seq_len]``, padded on the right (harmless to a causal model)
    ``counted``  bool ``[windows, seq_len]``: token ``t`` is scored, from the logits at ``t - 1``
    """

    ids: torch.Tensor
    counted: torch.Tensor

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return int(self.counted.sum())


def cut_windows(
    ids: torch.Tensor, seq_len: int, *, stride: int | None = None, bos: int | None = None, pad: int = 0
) -> Windows:
    """Cut ``ids`` (int64 ``[tokens]``) into windows of ``seq_len``.

    Without ``stride``, windows are disjoint, each led by ``bos`` where given, and everything but a window's first
    token is scored. With ``stride`` it is the sliding window of the Hugging Face perplexity guide: windows begin
    every ``stride`` tokens, each text token is scored once, with up to ``seq_len - 1`` tokens before it; ``bos``
    leads the text and not each window. (The guide then weighs each window by one token too few; here every token
    weighs the same.) A ``bos`` between two documents is context and never scored.

    Raises :class:`UsageError` for lengths that cannot work, :class:`CalibrationError` if nothing could be scored.
    """
    if seq_len < 2:
        raise UsageError(f"--seq-len must be at least 2, not {seq_len}")
    if stride is not None and not 1 <= stride <= seq_len:
        raise UsageError(f"--stride must be between 1 and --seq-len ({seq_len}), not {stride}")
    spans: list[tuple[torch.Tensor, int]] = []  # tokens of a window, its first scored token
    lead = ids.new_tensor([] if bos is None else [bos])
    if stride is None:
        step = seq_len - len(lead)
        spans = [(torch.cat([lead, ids[start : start + step]]), 1) for start in range(0, len(ids), step)]
    else:
        text, scored = torch.cat([lead, ids]), 1
        for start in range(0, len(text), stride):
            piece = text[start : start + seq_len]
            # With stride == seq_len the first token of a window has no context in it and stays unscored.
            spans.append((piece, max(scored - start, 1)))
            scored = start + len(piece)
            if scored == len(text):
                break
    spans = [(piece, first) for piece, first in spans if len(piece) > first]
    if not spans:
        raise CalibrationError(f"the evaluation text has {len(ids)} tokens: at least 2 are needed, give more --text")
    table = torch.full((len(spans), min(seq_len, max(len(piece) for piece, _ in spans))), pad, dtype=torch.int64)
    counted = torch.zeros(table.shape, dtype=torch.bool)
    for row, (piece, first) in enumerate(spans):
        table[row, : len(piece)] = piece
        counted[row, first : len(piece)] = True if bos is None else piece[first:] != bos
    return Windows(table, counted)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one model says about a chunk of tokens: ``log_probs`` float32 ``[tokens, vocabulary]``, normalised."""

    log_probs: torch.Tensor

    @staticmethod
    def of(logits: torch.Tensor, model: str) -> Prediction:
        """Normalise ``logits`` ``[tokens, vocabulary]``; :class:`NumericsError` naming ``model`` if NaN or infinite."""
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        if bool(torch.isnan(log_probs).any()):
            raise NumericsError(f"{model}: the logits are not finite; check the checkpoint with `lowbit verify`")
        return Prediction(log_probs)

    def nll(self, targets: torch.Tensor) -> torch.Tensor:
        """Negative log likelihood in nats of ``targets`` (int64 ``[tokens]``), float32 ``[tokens]``."""
        return -self.log_probs.gather(1, targets[:, None])[:, 0]

    def choice(self) -> torch.Tensor:
        """The most probable token, int64 ``[tokens]``."""
        return self.log_probs.argmax(dim=-1)

    def divergence_of(self, candidate: Prediction) -> torch.Tensor:
        """KL(self || candidate) per token, float32 ``[tokens]``, never negative.

        Summed as ``p·(e^δ - 1 - δ)`` with ``δ = log q - log p``. Σp = Σq makes this the same number, but every term
        is of second order in δ, so float32 keeps its digits where two models almost agree.
        """
        p, delta = self.log_probs.exp(), candidate.log_probs - self.log_probs
        close = p * (torch.expm1(delta) - delta)
        impossible = p == 0  # p·δ is 0 there, but would be computed as 0·inf
        apart = candidate.log_probs.exp() - p - torch.where(impossible, 0.0, p * delta)
        return torch.where((delta.abs() < 1) & ~impossible, close, apart).sum(dim=-1).clamp_min(0)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class Spread:
    """The distribution of per-token divergence, in nats."""

    mean: Estimate
    median: float
    p99: float
    maximum: float


class TokenScores:
    """Per-token scores of one model (and its divergence from a reference), collected chunk by chunk.

    Room for ``windows.tokens`` tokens is made at once; chunks come in reading order of the scored tokens.
    """

    def __init__(self, windows: Windows, *, divergence: bool = False) -> None:
        self.where = windows.counted.nonzero()
        self.targets = windows.ids[windows.counted]
        tokens = len(self.targets)
        self.nll = torch.zeros(tokens)
        self.choice = torch.zeros(tokens, dtype=torch.int32)
        self.divergence = torch.zeros(tokens) if divergence else None
        self._filled = 0

    def add(self, prediction: Prediction, reference: Prediction | None = None) -> None:
        """Take the next ``len(prediction.log_probs)`` scored tokens."""
        part = slice(self._filled, self._filled + len(prediction.log_probs))
        self.nll[part] = prediction.nll(self.targets[part].to(prediction.log_probs.device)).cpu()
        self.choice[part] = prediction.choice().int().cpu()
        if self.divergence is not None and reference is not None:
            self.divergence[part] = reference.divergence_of(prediction).cpu()
        self._filled = part.stop

    @property
    def filled(self) -> int:
        """How many tokens have been scored so far."""
        return self._filled

    def mean(self, values: torch.Tensor) -> Estimate:
        """Mean of ``values`` ``[tokens]`` in float64, with the standard error clustered by window."""
        values = values.double()
        count = len(values)
        value = float(values.mean())
        if count < 2 or not math.isfinite(value):
            return Estimate(value, math.inf if math.isinf(value) else 0.0)
        deviations = values - value
        clusters = torch.zeros(int(self.where[:, 0].max()) + 1, dtype=torch.float64)
        clusters.index_add_(0, self.where[:, 0], deviations)
        if len(clusters) < 2:
            return Estimate(value, float(deviations.square().sum() / (count - 1) / count) ** 0.5)
        correction = len(clusters) / (len(clusters) - 1)
        return Estimate(value, float(correction * clusters.square().sum()) ** 0.5 / count)

    def perplexity(self) -> Estimate:
        """``exp`` of the mean loss; the standard error by the delta method."""
        loss = self.mean(self.nll)
        value = math.exp(min(loss.value, 700.0))
        return Estimate(value, value * loss.standard_error)

    def perplexity_ratio(self, reference: TokenScores) -> Estimate:
        """This model's perplexity over the reference's; paired per token, so much tighter than either alone."""
        difference = self.mean(self.nll.double() - reference.nll.double())
        value = math.exp(min(difference.value, 700.0))
        return Estimate(value, value * difference.standard_error)

    def agreement(self, reference: TokenScores) -> Estimate:
        """Share of tokens where both models rank the same token first."""
        return self.mean((self.choice == reference.choice).double())

    def spread(self) -> Spread:
        """Mean, median, 99th percentile and maximum of the divergence from the reference."""
        values = self._divergence().double().sort().values
        at = (len(values) - 1) * torch.tensor([0.5, 0.99], dtype=torch.float64)
        low, part = at.floor().long(), at.frac()
        high = (low + 1).clamp_max(len(values) - 1)
        median, p99 = torch.lerp(values[low], values[high], part).tolist()
        return Spread(self.mean(self._divergence()), median, p99, float(values[-1]))

    def histogram(self) -> tuple[int, ...]:
        """Tokens per bin of :data:`HISTOGRAM_EDGES`; the first and last bin also hold what lies beyond."""
        edges = torch.tensor(HISTOGRAM_EDGES[1:-1], dtype=torch.float64)
        bins = torch.bucketize(self._divergence().double(), edges, right=True)
        return tuple(torch.bincount(bins, minlength=len(HISTOGRAM_EDGES) - 1).tolist())

    def by_position(self, bins: int = 32) -> tuple[tuple[float, float, int], ...]:
        """Mean divergence along the window: ``(mean position, mean divergence, tokens)`` of up to ``bins`` bins."""
        positions, values = self.where[:, 1], self._divergence().double()
        width = max(1, -(-int(positions.max()) // bins))
        index = (positions - 1).clamp_min(0) // width
        counts = torch.bincount(index)
        places = torch.bincount(index, weights=positions.double())
        sums = torch.bincount(index, weights=values)
        return tuple(
            (float(place / count), float(total / count), int(count))
            for place, total, count in zip(places, sums, counts, strict=True)
            if count
        )

    def worst(self, count: int) -> list[int]:
        """Indices of the ``count`` tokens with the largest divergence, worst first."""
        values = self._divergence()
        order = values.argsort(descending=True, stable=True)
        return [int(index) for index in order[:count]]

    def _divergence(self) -> torch.Tensor:
        if self.divergence is None:
            raise UsageError("no divergence was collected: evaluate against a reference")
        return self.divergence
