"""Quantize and prove it: the figures of a fresh checkpoint against its source, kept in its manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lowbit.calibration import EvaluationText, ids_hash
from lowbit.checkpoint import update_quality
from lowbit.evaluation.evaluate import evaluate
from lowbit.evaluation.results import Evaluation
from lowbit.pipeline.progress import Progress
from lowbit.pipeline.quantize import QuantizeResult
from lowbit.pipeline.quantize import quantize as run_pipeline

CERTIFY_TOKENS = 4096
"""Tokens that a certificate is measured on unless told otherwise."""


def quantize(
    source: str | Path,
    out: str | Path,
    *,
    certify_tokens: int = CERTIFY_TOKENS,
    progress: Progress | None = None,
    **settings: Any,
) -> QuantizeResult:
    """Quantize ``source`` into ``out`` (:func:`lowbit.pipeline.quantize.quantize`) and certify the result.

    The certificate is measured on ``certify_tokens`` (0: none) of the calibration data that were kept out of
    calibration, or on the held-out text of the ``demo`` model; without any text there is no certificate.
    """
    result = run_pipeline(source, out, progress=progress, held_out_tokens=certify_tokens, **settings)
    text = _text(source, result)
    if text is None or certify_tokens <= 0:
        return result
    shared = ("device", "memory", "allow_pickle", "trust_remote_code")
    evaluation = evaluate(
        out,
        against=result.source,
        text=text,
        seq_len=None if result.held_out is None else result.held_out.shape[1],
        max_tokens=certify_tokens if text == "demo" else None,
        progress=progress,
        **{name: settings[name] for name in shared if name in settings},
    )
    return certify(result, evaluation)


def certify(result: QuantizeResult, evaluation: Evaluation) -> QuantizeResult:
    """Write the figures of ``evaluation`` into the manifest of the checkpoint, and into the result."""
    certificate = evaluation.certificate()
    update_quality(result.out, certificate)
    return replace(result, quality=certificate)


def _text(source: str | Path, result: QuantizeResult) -> EvaluationText | str | None:
    if str(source) == "demo":
        return "demo"
    if result.held_out is None:
        return None
    ids = result.held_out.flatten()
    name = "held out of the calibration data"
    if result.calibration is not None:
        name = f"{name} ({result.calibration['name']})"
    return EvaluationText(ids.to(torch.int64), name, ids_hash(ids), len(result.held_out))
