"""Which way to quantize is best for this model: contenders under one calibration set, measured on one text."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lowbit.calibration import EvaluationText, ids_hash
from lowbit.checkpoint import update_quality
from lowbit.errors import NumericsError, UnsupportedError, UsageError
from lowbit.evaluation.evaluate import evaluate_all
from lowbit.evaluation.results import Candidate, Comparison
from lowbit.pipeline.candidates import Contender
from lowbit.pipeline.gguf import quantize_gguf
from lowbit.pipeline.progress import Progress, Silent
from lowbit.pipeline.quantize import QuantizeResult, quantize
from lowbit.planning import reset_peak_memory

__all__ = ["compare"]

DEMO = "demo"


def compare(
    source: str | Path,
    contenders: Sequence[Contender],
    *,
    out: Path | None = None,
    text: str | Path | None = None,
    max_tokens: int = 16384,
    overwrite: bool = False,
    progress: Progress | None = None,
    **shared: Any,
) -> Comparison:
    """Quantize ``source`` in every way of ``contenders`` and measure each against it, the source's blocks run once.

    ``shared`` are settings of :func:`lowbit.quantize` for all of them: calibration text, samples, device, memory.
    Checkpoints are kept in the directory ``out`` where it is given. ``text`` is what is evaluated on; without it that
    is what was kept out of the calibration data (of the ``demo`` model, its own held-out text). A contender that the
    model's shapes or the format rule out is left out with a note. Seconds and peak memory are those of its
    quantization in this process. Raises :class:`UsageError` when there is no text, and :class:`UnsupportedError` when
    no contender is left.
    """
    progress = progress or Silent()
    if str(source) != DEMO and text is None and shared.get("calibration") is None:
        raise UsageError("which text to compare on? Give --calibration FILE (or a preset such as `general`), or --text")
    with ExitStack() as cleanup:
        folder = out or Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="lowbit-compare-")))
        folder.mkdir(parents=True, exist_ok=True)
        done, notes = _quantize_all(source, contenders, folder, max_tokens, overwrite, progress, shared)
        if not done:
            raise UnsupportedError("no contender can be made of this model", notes)
        evaluations = evaluate_all(
            [result.out for _, result in done],
            against=source,
            text=_text(source, text, [result for _, result in done]),
            max_tokens=max_tokens,
            progress=progress,
            **{
                name: shared[name]
                for name in ("device", "memory", "allow_pickle", "trust_remote_code")
                if name in shared
            },
        )
        for (_, result), evaluation in zip(done, evaluations, strict=True):
            if result.out.is_dir():
                update_quality(result.out, evaluation.certificate())
    candidates = tuple(
        Candidate(
            name=contender.name,
            method=contender.method,
            spec=result.scheme,
            evaluation=evaluation,
            seconds=result.seconds,
            peak_memory_bytes=result.peak_memory_bytes,
            module_errors={module.name: module.error for module in result.modules if module.error is not None},
        )
        for (contender, result), evaluation in zip(done, evaluations, strict=True)
    )
    calibrated = next((result.calibration for _, result in done if result.calibration is not None), None)
    if calibrated is not None:
        notes.append(f"Calibrated on {calibrated['name']}, {calibrated['tokens']:,} tokens, the same for all.")
    notes.append("Seconds and peak memory are of the quantization alone, one after the other in one process.")
    return Comparison(f"{Path(source).name}: ways to quantize it", candidates, notes=tuple(notes))


def _quantize_all(
    source: str | Path,
    contenders: Sequence[Contender],
    folder: Path,
    held_out: int,
    overwrite: bool,
    progress: Progress,
    shared: dict[str, Any],
) -> tuple[list[tuple[Contender, QuantizeResult]], list[str]]:
    done: list[tuple[Contender, QuantizeResult]] = []
    notes: list[str] = []
    for contender in contenders:
        settings: dict[str, Any] = {**shared, **contender.settings, "held_out_tokens": held_out}
        run = quantize
        if contender.is_gguf:
            run = quantize_gguf
            del settings["format"]
            if str(source) != DEMO and settings.get("calibration") is None:
                settings["imatrix"] = None
        reset_peak_memory()
        try:
            result = run(source, folder / contender.file_name, overwrite=overwrite, progress=progress, **settings)
        except (UnsupportedError, NumericsError) as error:
            notes.append(f"{contender.name} is left out: {' '.join(str(error).split())}")
            progress.message(notes[-1])
            continue
        done.append((contender, result))
    return done, notes


def _text(
    source: str | Path, text: str | Path | None, results: Sequence[QuantizeResult]
) -> str | Path | EvaluationText:
    if text is not None:
        return text
    if str(source) == DEMO:
        return DEMO
    held_out = next((result.held_out for result in results if result.held_out is not None), None)
    if held_out is None:
        raise UsageError("the calibration text is too short to keep some out for the comparison: give --text FILE")
    ids = held_out.flatten()
    return EvaluationText(ids.long(), "held out of the calibration data", ids_hash(ids), len(held_out))
