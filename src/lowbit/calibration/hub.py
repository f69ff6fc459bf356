"""Data sets of the hub: the domain presets as data, and how they are read."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlparse

from lowbit.calibration.rows import Document, documents
from lowbit.errors import CalibrationError

_ID = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]*){0,3}")


@dataclass(frozen=True, slots=True)
class HubSource:
    """A data set of the hub; ``field`` None recognises the fields as in a local file."""

    dataset: str
    config: str | None = None
    split: str = "train"
    field: str | None = None


PRESETS: dict[str, tuple[HubSource, ...]] = {
    "general": (
        HubSource("allenai/c4", "en", "validation", "text"),
        HubSource("Salesforce/wikitext", "wikitext-103-raw-v1", "train", "text"),
        HubSource("HuggingFaceH4/ultrachat_200k", None, "train_sft", "messages"),
    ),
    "code": (
        HubSource("codeparrot/codeparrot-clean-valid", None, "train", "content"),
        HubSource("ise-uiuc/Magicoder-OSS-Instruct-75K", None, "train"),
    ),
    "medical": (
        HubSource("qiaojin/PubMedQA", "pqa_artificial", "train"),
        HubSource("medalpaca/medical_meadow_medical_flashcards", None, "train"),
    ),
    "legal": (
        HubSource("coastalcph/lex_glue", "scotus", "train", "text"),
        HubSource("coastalcph/lex_glue", "ledgar", "train", "text"),
    ),
    "chinese": (
        HubSource("wikimedia/wikipedia", "20231101.zh", "train", "text"),
        HubSource("shibing624/alpaca-zh", None, "train"),
    ),
}
"""Calibration data by domain; the sources of a preset take turns, document by document."""


def parse_source(name: str) -> HubSource | None:
    """``owner/name[:config[:split[:field]]]`` as a source, or None when ``name`` is not of that form."""
    if not _ID.fullmatch(name):
        return None
    dataset, config, split, field = (*name.split(":"), "", "", "")[:4]
    return HubSource(dataset, config or None, split or "train", field or None)


def read_sources(sources: tuple[HubSource, ...]) -> Iterator[Document]:
    """Stream the documents of several sources in turn.

    Raises :class:`CalibrationError` without the ``datasets`` extra, offline, or for a data set that is not there.
    """
    streams = [_stream(source) for source in sources]
    while streams:
        alive = []
        for stream in streams:
            try:
                document = next(stream)
            except StopIteration:
                continue
            alive.append(stream)
            yield document
        streams = alive


def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether hub data can be read: extra installed, not switched offline, and the host answers in ``timeout`` s."""
    try:
        import datasets  # noqa: F401
    except ImportError:
        return False
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = urlparse(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=timeout).close()
    except OSError:
        return False
    return True


def _stream(source: HubSource) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(
            f"hub data set {source.dataset!r} needs a package: pip install 'lowbit[datasets]', or name a file"
        ) from error
    try:
        rows = iter(datasets.load_dataset(source.dataset, source.config, split=source.split, streaming=True))
        for row in rows:
            yield from documents(row, source.field)
    except Exception as error:  # datasets and the http client beneath it share no base class of their errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CalibrationError(
            f"data set {source.dataset!r} cannot be read from the hub ({reason}): "
            "check the name and the network, or give --calibration FILE or self"
        ) from error
