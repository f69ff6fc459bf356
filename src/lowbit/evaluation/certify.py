"""Quantize and prove it: the figures of a fresh checkpoint against its source, kept in its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from lowbit.calibration import EvaluationText, ids_hash
from lowbit.checkpoint import update_quality
from lowbit.errors import UsageError
from lowbit.evaluation.evaluate import evaluate
from lowbit.evaluation.results import Evaluation
from lowbit.pipeline.executor import Executor
from lowbit.pipeline.gguf import GGUF_ONLY, is_for_gguf, quantize_gguf
from lowbit.pipeline.progress import Progress
from lowbit.pipeline.quantize import QuantizeResult
from lowbit.pipeline.quantize import quantize as quantize_directory
from lowbit.pipeline.recipe import Recipe

if TYPE_CHECKING:
    from typing_extensions import Unpack

CERTIFY_TOKENS = 4096
"""Tokens that a certificate is measured on unless told otherwise."""

_FLAGS = {"types": "type", "split_bytes": "split-size"}


class QuantizeSettings(TypedDict, total=False):
    """Keyword arguments of :func:`quantize`: the flags of ``lowbit quantize`` under the same names.

    A GGUF file has ``imatrix``, ``types``, ``pure`` and ``split_bytes``, and none of ``method`` to ``skip``. Sizes
    are bytes. Fields and defaults: :class:`lowbit.pipeline.job.Settings`, :class:`lowbit.pipeline.gguf.GgufSettings`.
    """

    scheme: str | None
    method: str | None
    format: str | None
    bits: int | None
    group_size: int | None
    symmetric: bool | None
    ordering: str | None
    transform: str | None
    kv_cache: str | None
    budget: str | None
    rotate: str | None
    sparsity: str | None
    pruner: str | None
    all_experts: bool | None
    recipe: str | Path | Recipe | None
    skip: Sequence[str]
    target: str | None
    imatrix: str | Path | None
    types: Sequence[str]
    pure: bool
    split_bytes: int | None
    calibration: str | Path | None
    samples: int
    seq_len: int
    seed: int
    device: str
    memory: int | None
    revision: str | None
    allow_pickle: bool
    trust_remote_code: bool
    resume: bool
    overwrite: bool
    executor: Executor | None


def quantize(
    source: str | Path,
    out: str | Path,
    *,
    certify_tokens: int = CERTIFY_TOKENS,
    progress: Progress | None = None,
    **settings: Unpack[QuantizeSettings],
) -> QuantizeResult:
    """Quantize ``source`` into ``out`` and certify the result.

    An ``out`` that ends in ``.gguf`` becomes a GGUF file (:func:`lowbit.pipeline.gguf.quantize_gguf`), any other a
    directory (:func:`lowbit.pipeline.quantize.quantize`).

    The certificate is measured on ``certify_tokens`` (0: none) of the calibration data that were kept out of
    calibration, or on the held-out text of the ``demo`` model; without any text there is no certificate.
    """
    given: dict[str, Any] = {**settings}
    result = _run(source, out, progress=progress, held_out_tokens=certify_tokens, **given)
    text = _text(source, result)
    if text is None or certify_tokens <= 0:
        return result
    shared = ("device", "memory", "allow_pickle", "trust_remote_code")
    evaluation = evaluate(
        result.out,
        against=result.source,
        text=text,
        seq_len=None if result.held_out is None else result.held_out.shape[1],
        max_tokens=certify_tokens if text == "demo" else None,
        progress=progress,
        **{name: given[name] for name in shared if name in given},
    )
    return certify(result, evaluation)


def _run(source: str | Path, out: str | Path, **settings: Any) -> QuantizeResult:
    """Quantize to a GGUF file or to a directory; :class:`UsageError` for settings of the other."""
    if is_for_gguf(out, settings.get("scheme"), settings.get("format")):
        if settings.get("format") == "gguf":
            del settings["format"]
        if settings.pop("executor", None) is not None:
            raise UsageError("--ray: a GGUF file is made on this machine: leave --ray out, or write a directory")
        return quantize_gguf(source, out, **settings)
    for name in GGUF_ONLY:
        if settings.pop(name, None):
            flag = _FLAGS.get(name, name)
            raise UsageError(f"--{flag} is for GGUF files: end the output in .gguf, e.g. {Path(out).name}.gguf")
    return quantize_directory(source, out, **settings)


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
