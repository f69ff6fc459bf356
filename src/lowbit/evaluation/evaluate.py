"""Perplexity of a checkpoint and its divergence from another, both streamed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from lowbit.calibration import EvaluationText, Tokenizer, load_text, load_tokenizer
from lowbit.checkpoint import locate, read_manifest
from lowbit.codecs import open_model
from lowbit.errors import UsageError
from lowbit.evaluation.footprint import measure
from lowbit.evaluation.metrics import Windows, cut_windows
from lowbit.evaluation.results import Evaluation
from lowbit.evaluation.streaming import WORKSPACE, final_hidden, score
from lowbit.evaluation.summary import Run, summarise
from lowbit.pipeline.cache_hooks import model_cache, parse_cache
from lowbit.pipeline.progress import Progress, Silent
from lowbit.pipeline.streamed import StreamedModel

DEFAULT_SEQ_LEN = 2048
DEMO = "demo"
"""Name of the embedded model and of its held-out text."""


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path | EvaluationText | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    memory: int | None = None,
    kv_dtype: str = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure ``model`` on ``text``, and its divergence from the reference ``against`` where one is given.

    ``text`` is what :func:`lowbit.calibration.load_text` takes, or its result; None is the held-out text of the
    ``demo`` model and an error for others. ``seq_len`` defaults to the model's context, at most 2048. Windows are
    disjoint, or ``stride`` tokens apart. ``memory`` bounds intermediate values in bytes. Both models compute in
    float32, so that what differs is the quantization alone: of weights, of inputs where the checkpoint says so, and of
    the key-value cache, which ``kv_dtype`` names (``auto``: as the checkpoint says; not of the reference).
    """
    return evaluate_all(
        [model], against=against, text=text, seq_len=seq_len, stride=stride, max_tokens=max_tokens, device=device,
        memory=memory, kv_dtype=kv_dtype, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code,
        progress=progress,
    )[0]  # fmt: skip


def evaluate_all(
    models: Sequence[str | Path],
    *,
    against: str | Path | None = None,
    text: str | Path | EvaluationText | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    memory: int | None = None,
    kv_dtype: str = "auto",
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """:func:`evaluate` for several models, with the blocks of the reference run only once."""
    cache = parse_cache(kv_dtype)
    if not models:
        raise UsageError("name at least one model to evaluate")
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    workspace = WORKSPACE if memory is None else max(1 << 20, min(WORKSPACE, memory // 4))
    progress = progress or Silent()

    def opened(source: str | Path, cleanup: ExitStack) -> StreamedModel:
        checkpoint = open_model(source, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        cleanup.callback(checkpoint.close)
        return StreamedModel(checkpoint, device=target, trust_remote_code=trust_remote_code)

    with ExitStack() as cleanup:
        scratch = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="lowbit-eval-")))
        first = opened(models[0] if against is None else against, cleanup)
        tokenizer = _tokenizer(first, models, trust_remote_code)
        sources = [*models, *([] if against is None else [against])]
        evaluation_text = _text(text, sources, tokenizer, max_tokens)
        windows = _windows(evaluation_text, tokenizer, first, seq_len, stride)
        progress.start("Evaluating", len(first.block_names) * len(sources))
        cleanup.callback(progress.close)

        def run(model: StreamedModel, source: str | Path, cleanup: ExitStack, cache: str) -> Run:
            name = Path(source).name or str(source)
            path = Path(tempfile.mkdtemp(dir=scratch)) / "hidden"
            with model_cache(model, cache):
                store = final_hidden(model, windows, path, name, progress, workspace=workspace)
            cleanup.callback(store.close, delete=True)
            return Run(name, model, store, measure(model.checkpoint.tensors, model.plan))

        reference = None if against is None else run(first, against, cleanup, "auto")
        results = []
        for index, source in enumerate(models):
            with ExitStack() as release:
                model = first if reference is None and index == 0 else opened(source, release)
                if reference is not None:
                    _check_comparable(reference, model, source)
                runs = [*([] if reference is None else [reference]), run(model, source, release, cache)]
                scores = score([(one.name, one.model, one.store) for one in runs], windows, workspace=workspace)
                results.append(summarise(runs, scores, windows, evaluation_text, stride, tokenizer))
                progress.message(describe(results[-1]))
        return results


def describe(evaluation: Evaluation) -> str:
    """One line on an evaluation."""
    line = f"{evaluation.model}: perplexity {evaluation.perplexity:.4g} ± {evaluation.perplexity_error:.2g}"
    if evaluation.kl_divergence is not None and evaluation.top1_agreement is not None:
        line += f", KL {evaluation.kl_divergence:.4g} nats, top-1 agreement {evaluation.top1_agreement:.2%}"
    return f"{line}, {evaluation.tokens} tokens"


def _tokenizer(first: StreamedModel, models: Sequence[str | Path], trust_remote_code: bool) -> Tokenizer:
    """The tokenizer of the reference, or where it has none, that of the first model."""
    path = first.checkpoint.path if first.checkpoint.has_tokenizer else locate(models[0])
    return load_tokenizer(path, trust_remote_code=trust_remote_code)


def _text(
    text: str | Path | EvaluationText | None,
    sources: Sequence[str | Path],
    tokenizer: Tokenizer,
    max_tokens: int | None,
) -> EvaluationText:
    if isinstance(text, EvaluationText):
        if max_tokens is None:
            return text
        return EvaluationText(text.ids[:max_tokens], text.name, text.sha256, text.documents)
    if text is None:
        if not any(_is_demo(source) for source in sources):
            raise UsageError("which text to evaluate on? Give --text FILE (or a preset such as `general`)")
        text = DEMO
    return load_text(text, tokenizer, max_tokens=max_tokens)


def _is_demo(source: str | Path) -> bool:
    """Whether a model is the embedded one or was made from it."""
    if str(source) == DEMO:
        return True
    manifest = read_manifest(locate(source))
    return manifest is not None and DEMO in manifest.source.values()


def _windows(
    text: EvaluationText, tokenizer: Tokenizer, model: StreamedModel, seq_len: int | None, stride: int | None
) -> Windows:
    longest = getattr(model.config, "max_position_embeddings", None)
    if seq_len is None:
        seq_len = min(DEFAULT_SEQ_LEN, longest or DEFAULT_SEQ_LEN)
    elif longest is not None and seq_len > longest:
        raise UsageError(f"--seq-len {seq_len} exceeds the model's context of {longest} tokens")
    ids, bos = text.ids, tokenizer.bos_token_id
    if bos is None or int(ids[0]) != bos:
        return cut_windows(ids, seq_len, stride=stride)
    return cut_windows(ids[1:], seq_len, stride=stride, bos=bos)


def _check_comparable(reference: Run, model: StreamedModel, source: str | Path) -> None:
    expected, found = reference.model.config.vocab_size, model.config.vocab_size
    if expected != found:
        raise UsageError(
            f"{source} has a vocabulary of {found} and {reference.name} one of {expected}: "
            "--against must name the model that this one was made from"
        )
