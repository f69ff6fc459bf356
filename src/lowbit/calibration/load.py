"""Calibration and evaluation text by name: files, presets, hub data sets, the standard library, the model itself."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from lowbit.calibration.chat import TemplateRefusalError, has_template, render
from lowbit.calibration.files import READERS, read_file
from lowbit.calibration.hub import PRESETS, hub_reachable, parse_source, read_sources
from lowbit.calibration.packing import cut, gather, ids_hash, pack
from lowbit.calibration.rows import Document
from lowbit.calibration.standard_library import held_out_text, sources
from lowbit.calibration.tokenizer import Tokenizer, encode
from lowbit.errors import CalibrationError, UsageError

SELF = "self"
DEMO = "demo"
_MAX_CHARACTERS = 256_000_000
_HUB_CHARACTERS_PER_TOKEN = 8

Generate = Callable[[int, int, int], torch.Tensor]
"""``generate(samples, seq_len, seed)``: int64 ``[samples, seq_len]`` sampled from the model that is to be quantized."""


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Token sequences to calibrate with.

    ``ids`` int64 ``[samples, seq_len]``; ``sha256`` of them; ``documents`` read; ``tokens`` in ``ids``; ``notes`` say
    what was dropped or fell short.
    """

    ids: torch.Tensor
    name: str
    sha256: str
    documents: int
    tokens: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """A text to evaluate on: ``ids`` int64 ``[tokens]`` in the text's own order, and their ``sha256``."""

    ids: torch.Tensor
    name: str
    sha256: str
    documents: int


def load_calibration(
    source: str | Path | None,
    tokenizer: Tokenizer,
    *,
    samples: int = 128,
    seq_len: int = 2048,
    seed: int = 42,
    generate: Generate | None = None,
) -> CalibrationSet:
    """Calibration sequences from ``source``.

    ``source`` is a file or directory, a preset (``general``, ``code``, ``medical``, ``legal``, ``chinese``), ``self``
    (sampled by ``generate``), ``demo`` (the standard library, the demo model's training half) or a hub data set
    ``owner/name[:config[:split[:field]]]``. None takes ``general`` where the hub answers, else ``self``. The same
    arguments give the same ids. Fewer full sequences than asked for are said in ``notes``; none at all raises
    :class:`CalibrationError` with the tokens found and needed.
    """
    if samples < 1 or seq_len < 2:
        raise UsageError(f"--samples {samples} --seq-len {seq_len}: at least 1 sample of 2 tokens is needed")
    if source is None:
        source = "general" if generate is None or hub_reachable() else SELF
    if str(source) == SELF:
        return _sampled(generate, tokenizer, samples, seq_len, seed)
    name, documents = _documents(source, held_out=False)
    limit = _MAX_CHARACTERS
    if _is_remote(source):
        limit = max(1_000_000, samples * seq_len * _HUB_CHARACTERS_PER_TOKEN)
    gathered = gather(documents, tokenizer, max_characters=limit)
    if not gathered.texts:
        raise CalibrationError("; ".join((f"calibration data {name!r} is empty: no text found in it", *gathered.notes)))
    ids, found = pack(gathered.texts, tokenizer, samples=samples, seq_len=seq_len, seed=seed)
    notes = list(gathered.notes)
    if len(ids) == 0:
        raise CalibrationError(
            f"calibration data {name!r} is too short: {found} tokens found, {seq_len} needed for one sequence "
            f"({samples * seq_len} for all): give more text or a smaller --seq-len"
        )
    if len(ids) < samples:
        notes.append(f"{found} tokens give {len(ids)} full sequences of {seq_len}, not the {samples} asked for")
    _check_ids(ids, tokenizer, name)
    return CalibrationSet(ids, name, ids_hash(ids), gathered.documents, ids.numel(), tuple(notes))


def load_text(source: str | Path, tokenizer: Tokenizer, *, max_tokens: int | None = None) -> EvaluationText:
    """The whole text of ``source`` in its own order, for evaluation; ``demo`` is the held-out half.

    At most ``max_tokens`` ids. Raises :class:`CalibrationError` when there is no text.
    """
    name, documents = _documents(source, held_out=True)
    return _whole(documents, name, tokenizer, max_tokens)


def encode_text(text: str, name: str, tokenizer: Tokenizer, *, max_tokens: int | None = None) -> EvaluationText:
    """A text at hand in the form of :func:`load_text`."""
    return _whole(iter([Document(text=text)]), name, tokenizer, max_tokens)


def _whole(documents: Iterable[Document], name: str, tokenizer: Tokenizer, max_tokens: int | None) -> EvaluationText:
    ids: list[int] = []
    count = 0
    for document in documents:
        if document.messages:
            try:
                text, special = render(document, tokenizer), not has_template(tokenizer)
            except TemplateRefusalError:
                continue
        else:
            text, special = document.text, True
        ids += _head(text, special, tokenizer, None if max_tokens is None else max_tokens - len(ids))
        count += 1
        if max_tokens is not None and len(ids) >= max_tokens:
            break
    if len(ids) < 2:
        raise CalibrationError(f"text {name!r} is empty: {len(ids)} tokens found, at least 2 needed")
    tokens = torch.tensor(ids[:max_tokens], dtype=torch.int64)
    _check_ids(tokens, tokenizer, name)
    return EvaluationText(tokens, name, ids_hash(tokens), count)


def _head(text: str, special: bool, tokenizer: Tokenizer, tokens: int | None) -> list[int]:
    """At least the first ``tokens`` ids of ``text`` (all for None), without encoding much more of a long one."""
    if tokens is not None:
        head = "".join(islice(cut(text), 1 + tokens // 1024))
        ids = encode(tokenizer, [head], special=special)[0]
        if len(head) == len(text) or len(ids) > tokens:
            return ids
    return encode(tokenizer, [text], special=special)[0]


def _is_remote(source: str | Path) -> bool:
    return str(source) in PRESETS or not (str(source) == DEMO or Path(source).exists())


def _documents(source: str | Path, *, held_out: bool) -> tuple[str, Iterator[Document]]:
    """The name of a source for the manifest, free of directories, and its documents."""
    text = str(source)
    if text == DEMO:
        return DEMO, _standard_library(held_out)
    if text in PRESETS:
        return text, read_sources(PRESETS[text])
    path = Path(source)
    if path.exists():
        return path.resolve().name, read_file(path)
    if not isinstance(source, Path) and path.suffix.lower() not in READERS and (hub := parse_source(text)):
        return text, read_sources((hub,))
    names = [*PRESETS, SELF, DEMO]
    close = difflib.get_close_matches(text, names, n=1)
    hint = (
        f"did you mean {close[0]!r}?"
        if close
        else f"give an existing file, {', '.join(names)} or a hub data set owner/name"
    )
    raise CalibrationError(f"no calibration or evaluation text {text!r}: {hint}")


def _standard_library(held_out: bool) -> Iterator[Document]:
    if held_out:
        yield Document(text=held_out_text())
        return
    for _, text in sources(held_out=False):
        yield Document(text=text)


def _sampled(generate: Generate | None, tokenizer: Tokenizer, samples: int, seq_len: int, seed: int) -> CalibrationSet:
    if generate is None:
        raise CalibrationError(
            "calibration 'self' samples text from a model, and none was given: name a file or a preset"
        )
    ids = generate(samples, seq_len, seed).to("cpu", torch.int64)
    if ids.ndim != 2 or ids.shape[1] != seq_len or len(ids) == 0:
        raise CalibrationError(
            f"calibration 'self': the model gave ids of shape {tuple(ids.shape)}, not [{samples}, {seq_len}]"
        )
    distinct, first = _distinct_rows(ids)
    notes = () if distinct == len(ids) else (f"{len(ids) - distinct} duplicate sequences dropped",)
    ids = ids[first]
    _check_ids(ids, tokenizer, SELF)
    return CalibrationSet(ids, SELF, ids_hash(ids), len(ids), ids.numel(), notes)


def _distinct_rows(ids: torch.Tensor) -> tuple[int, list[int]]:
    """How many rows differ, and the index of the first of each, in order."""
    first: dict[bytes, int] = {}
    for index, row in enumerate(ids):
        first.setdefault(row.numpy().tobytes(), index)
    return len(first), sorted(first.values())


def _check_ids(ids: torch.Tensor, tokenizer: Tokenizer, name: str) -> None:
    """Raise :class:`CalibrationError` for an id outside the vocabulary."""
    if int(ids.min()) < 0 or int(ids.max()) >= len(tokenizer):
        raise CalibrationError(f"{name}: token id {int(ids.max())} lies outside the tokenizer's {len(tokenizer)} ids")
