"""Reading documents from files: plain text, JSON, JSON lines, parquet, CSV, and directories of these."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lowbit.calibration.rows import Document, documents
from lowbit.errors import CalibrationError

SEPARATOR = "<|endoftext|>"
"""Divides documents within a plain text file."""


def read_file(path: Path) -> Iterator[Document]:
    """The documents of a file, or of every known file below a directory in name order.

    Raises :class:`CalibrationError` naming the file (and line) that cannot be read.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in READERS)
        if not files:
            raise CalibrationError(f"{path}: no calibration file in this directory ({', '.join(sorted(READERS))})")
        for file in files:
            yield from read_file(file)
        return
    try:
        yield from READERS.get(path.suffix.lower(), _plain_text)(path)
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path}: not UTF-8 text (byte {error.start}): calibration data is text, {', '.join(sorted(READERS))}"
        ) from error
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror or error})") from error


def _plain_text(path: Path) -> Iterator[Document]:
    text = path.read_text(encoding="utf-8-sig")
    if "\0" in text:
        raise CalibrationError(f"{path}: looks binary: calibration data is text, {', '.join(sorted(READERS))}")
    for part in text.split(SEPARATOR):
        if part.strip():
            yield Document(text=part)


def _json_lines(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CalibrationError(f"{path}:{number}: not a JSON row ({error})") from error
            yield from documents(row)


def _json(path: Path) -> Iterator[Document]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except ValueError as error:
        if "Extra data" in str(error):  # JSON lines under the name of JSON
            yield from _json_lines(path)
            return
        raise CalibrationError(f"{path}: not JSON ({error})") from error
    for row in _rows(content):
        yield from documents(row)


def _rows(content: Any) -> list[Any]:
    """The list of rows in a JSON document: itself, one of its lists of objects, or the document as the only row."""
    if isinstance(content, list):
        is_one_chat = bool(content) and all(isinstance(item, dict) and "role" in item for item in content)
        return [content] if is_one_chat else content
    if isinstance(content, dict):
        for name in ("data", "rows", "train", "examples", "instances"):
            if isinstance(content.get(name), list):
                return list(content[name])
    return [content]


def _csv(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        try:
            table = csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            filled = (row for row in table if any(cell.strip() for cell in row))
            names = [name.strip("\ufeff ").lower() for name in next(filled, [])]
            for row in filled:
                yield from documents(dict(zip(names, row, strict=False)))
        except csv.Error as error:
            raise CalibrationError(f"{path}: not a CSV table ({error})") from error


def _parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise CalibrationError(f"{path}: parquet needs pyarrow: pip install 'lowbit[datasets]'") from error
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    yield from documents(row)
    except pyarrow.ArrowException as error:
        raise CalibrationError(f"{path}: not a readable parquet file ({' '.join(str(error).split())[:200]})") from error


READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _json_lines,
    ".md": _plain_text,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".py": _plain_text,
    ".raw": _plain_text,
    ".tsv": _csv,
    ".txt": _plain_text,
}
"""How a file is read, by the end of its name; other names are tried as plain text."""
