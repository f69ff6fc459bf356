"""From per-token scores to the figures of an :class:`Evaluation`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowbit.calibration import EvaluationText, Tokenizer
from lowbit.evaluation.footprint import Footprint
from lowbit.evaluation.metrics import HISTOGRAM_EDGES, TokenScores, Windows
from lowbit.evaluation.results import Evaluation, Histogram, PositionBin, Verdict, WorstToken, judge_perplexity
from lowbit.pipeline.store import ActivationStore
from lowbit.pipeline.streamed import StreamedModel

WORST_KEPT = 20
"""Tokens with the largest divergence that an evaluation keeps."""
_BEFORE, _AFTER = 32, 12  # tokens of context around such a token


@dataclass(frozen=True, slots=True)
class Run:
    """One model whose last hidden states are in a store."""

    name: str
    model: StreamedModel
    store: ActivationStore
    size: Footprint


def summarise(
    runs: Sequence[Run],
    scores: Sequence[TokenScores],
    windows: Windows,
    text: EvaluationText,
    stride: int | None,
    tokenizer: Tokenizer,
) -> Evaluation:
    """The evaluation of the last of ``runs`` (and ``scores``), against the first where there are two."""
    run, own = runs[-1], scores[-1]
    perplexity = own.perplexity()
    result = Evaluation(
        model=run.name,
        text=text.name,
        text_sha256=text.sha256,
        tokens=windows.tokens,
        windows=windows.ids.shape[0],
        seq_len=windows.ids.shape[1],
        stride=stride,
        perplexity=perplexity.value,
        perplexity_error=perplexity.standard_error,
        bits_per_weight=run.size.total.bits_per_weight,
        linear_bits_per_weight=run.size.linear.bits_per_weight,
        size_bytes=run.size.total.bytes,
    )
    if len(runs) == 1:
        return result
    reference, base = runs[0], scores[0]
    spread, ratio, agreement = own.spread(), own.perplexity_ratio(base), own.agreement(base)
    base_perplexity = base.perplexity()
    return replace(
        result,
        reference=reference.name,
        reference_bits_per_weight=reference.size.total.bits_per_weight,
        reference_size_bytes=reference.size.total.bytes,
        reference_perplexity=base_perplexity.value,
        reference_perplexity_error=base_perplexity.standard_error,
        perplexity_ratio=ratio.value,
        perplexity_ratio_error=ratio.standard_error,
        kl_divergence=spread.mean.value,
        kl_divergence_error=spread.mean.standard_error,
        kl_median=spread.median,
        kl_p99=spread.p99,
        kl_max=spread.maximum,
        top1_agreement=agreement.value,
        top1_agreement_error=agreement.standard_error,
        kl_by_position=tuple(PositionBin(*one) for one in own.by_position()),
        kl_histogram=Histogram(HISTOGRAM_EDGES, own.histogram()),
        worst_tokens=tuple(_worst(index, own, base, windows, tokenizer) for index in own.worst(WORST_KEPT)),
        verdicts=_verdicts(run, ratio.value, ratio.standard_error),
    )


def _verdicts(run: Run, ratio: float, standard_error: float) -> tuple[Verdict, ...]:
    """Judge a quantized model by the mean width of its codes; a dense one has no usual cost."""
    weights = sum(stored.shape[0] * stored.shape[1] for stored in run.model.plan.values())
    if not weights:
        return ()
    bits = sum(stored.spec.bits * stored.shape[0] * stored.shape[1] for stored in run.model.plan.values()) / weights
    return (judge_perplexity(ratio, standard_error, bits),)


def _worst(index: int, own: TokenScores, base: TokenScores, windows: Windows, tokenizer: Tokenizer) -> WorstToken:
    window, position = (int(value) for value in own.where[index])
    ids = windows.ids[window].tolist()
    length = int(windows.counted[window].nonzero().max()) + 1
    before = ids[max(0, position - _BEFORE) : position]
    after = ids[position + 1 : min(length, position + 1 + _AFTER)]
    return WorstToken(
        window=window,
        position=position,
        divergence=float(own.divergence[index]) if own.divergence is not None else 0.0,
        before=tokenizer.decode(before),
        token=continuation(tokenizer, before, [ids[position]]),
        after=continuation(tokenizer, [*before, ids[position]], after),
        reference_probability=math.exp(-float(base.nll[index])),
        probability=math.exp(-float(own.nll[index])),
        reference_choice=continuation(tokenizer, before, [int(base.choice[index])]),
        choice=continuation(tokenizer, before, [int(own.choice[index])]),
    )


def continuation(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text that ``ids`` add to ``before``: decoded alone, a token would lose the space in front of a word."""
    head, whole = tokenizer.decode(before), tokenizer.decode([*before, *ids])
    return whole[len(head) :] if whole.startswith(head) and len(whole) > len(head) else tokenizer.decode(ids)
