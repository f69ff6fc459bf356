"""What quantizing to and converting to a GGUF file have in common: the checks before, the file, and its manifest."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit import __version__
from lowbit.checkpoint import Checkpoint, Manifest, source_hashes, write_manifest
from lowbit.codecs import StoredModule
from lowbit.codecs.gguf.architectures import ExportPlan
from lowbit.codecs.gguf.checkpoint import GgufCheckpoint
from lowbit.codecs.gguf.metadata import MetadataValue, Typed
from lowbit.codecs.gguf.vocabulary import Vocabulary, read_vocabulary
from lowbit.codecs.gguf.writing import TensorHeader, WrittenFile, output_paths, write_gguf
from lowbit.errors import ResourceError, UsageError
from lowbit.pipeline.block import ModuleReport
from lowbit.pipeline.gguf_stream import Tally, Task, encoded
from lowbit.pipeline.progress import Progress
from lowbit.planning import free_disk

__all__ = ["Output", "SourceHashes", "WrittenModel", "check_name", "importance_keys", "is_gguf_name", "named"]

_FLOATS = frozenset(("F32", "F16", "BF16"))


def is_gguf_name(path: str | Path) -> bool:
    """Whether ``path`` is named like a GGUF file."""
    return Path(path).suffix.lower() == ".gguf"


def check_name(out: Path, *, overwrite: bool) -> None:
    """Refuse a name that cannot become a GGUF file, before any work (:class:`UsageError`)."""
    if not is_gguf_name(out):
        raise UsageError(f"{out}: a GGUF file is one file: name it {out.name}.gguf")
    if out.is_dir():
        raise UsageError(f"{out}: is a directory: name a file in it, e.g. {out / 'model.gguf'}")
    if out.exists() and not overwrite:
        raise UsageError(f"{out}: exists already: name another file, or --overwrite")


def named(export: ExportPlan, source: str | Path) -> ExportPlan:
    """The plan with the name that the user gave the model, where that is none of a directory."""
    if Path(source).exists():
        return export
    return replace(export, metadata={**export.metadata, "general.name": str(source).rpartition("/")[2]})


def importance_keys(file: str, dataset: str, entries: int, chunks: int) -> dict[str, MetadataValue]:
    """The keys that say by which importance matrix a file's weights were weighed."""
    return {
        "quantize.imatrix.file": file,
        "quantize.imatrix.dataset": dataset,
        "quantize.imatrix.entries_count": entries,
        "quantize.imatrix.chunks_count": chunks,
    }


class SourceHashes:
    """The sha256 of the files of a source by name, its ``config.json`` among them, computed by a thread of its own.

    It begins with ``with``, so that the disk and a second core work while the first still imports, plans and tries the
    vocabulary, and the encoder then finds the files in memory; leaving early stops it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        config = checkpoint.path / "config.json"
        self._paths = [*([config] if config.is_file() else []), *checkpoint.files]
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(1, "lowbit-source-sha256")

    def __enter__(self) -> SourceHashes:
        self._hashes = self._pool.submit(self._compute)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._pool.shutdown()

    def result(self) -> dict[str, str]:
        """The hashes; waits for them. Raises :class:`CheckpointError` for a file that cannot be read."""
        return self._hashes.result()

    def _compute(self) -> dict[str, str]:
        return source_hashes(self._paths, self._go_on)

    def _go_on(self, count: int) -> None:
        if self._stopped.is_set():
            raise CancelledError


@dataclass(frozen=True, slots=True)
class WrittenModel:
    """What :meth:`Output.write` wrote: the files, the source's hashes, and what became of each tensor."""

    files: tuple[WrittenFile, ...]
    source_hashes: dict[str, str]
    tallies: Mapping[str, Tally]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.record.bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Output:
    """A GGUF file to be: everything but the weights.

    ``file_type`` is llama.cpp's number of the mix; ``extra`` are more keys of the metadata; ``split_bytes`` the size
    that no file exceeds, or None for a single file.
    """

    path: Path
    checkpoint: Checkpoint
    plan: Mapping[str, StoredModule]
    export: ExportPlan
    tasks: Sequence[Task]
    file_type: int
    split_bytes: int | None = None
    overwrite: bool = False
    extra: Mapping[str, MetadataValue] = field(default_factory=dict)

    def headers(self) -> list[TensorHeader]:
        """Headers of all tensors."""
        return [TensorHeader(task.tensor.name, task.type, task.tensor.shape) for task in self.tasks]

    def check(self) -> None:
        """Refuse a file that exists, the source itself, and a disk that is too small, before any work."""
        headers = self.headers()
        paths = output_paths(self.path, headers, self.split_bytes)
        sources = {file.resolve() for file in self.checkpoint.files}
        for path in paths:
            if path.resolve() in sources:
                raise UsageError(f"{path}: is the source itself: choose another name")
            if path.exists() and not self.overwrite:
                raise UsageError(f"{path}: exists already: name another file, or --overwrite")
        needed, free = sum(header.nbytes for header in headers), free_disk(self.path)
        if needed > free:
            raise ResourceError(
                f"{self.path}: needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free: "
                "free some disk space or choose a smaller scheme"
            )

    def vocabulary(self) -> Vocabulary:
        """The keys of the tokenizer: of a GGUF source its own, of others made from the files beside the weights."""
        if isinstance(self.checkpoint, GgufCheckpoint):
            return Vocabulary(_stored_vocabulary(self.checkpoint))
        rows = next(task.tensor.shape[0] for task in self.tasks if task.tensor.name == "token_embd.weight")
        return read_vocabulary(self.checkpoint.path, rows, self.checkpoint.config)

    def write(self, vocabulary: Vocabulary, progress: Progress, title: str, hashes: SourceHashes) -> WrittenModel:
        """Write the file."""
        general: dict[str, MetadataValue] = {"general.file_type": self.file_type, "general.quantization_version": 2}
        metadata = {**self.export.metadata, **general, **vocabulary.metadata, **self.extra}
        tallies: dict[str, Tally] = {}
        progress.start(title, len(self.tasks))

        def pieces() -> Iterator[npt.NDArray[np.uint8]]:
            for task, piece, tally in encoded(self.checkpoint, self.plan, self.tasks):
                if task.tensor.name not in tallies:
                    for name in list(tallies)[-1:]:
                        progress.advance(name)
                    tallies[task.tensor.name] = tally
                yield piece

        files = write_gguf(
            self.path, metadata, self.headers(), pieces(), split_bytes=self.split_bytes, overwrite=self.overwrite
        )
        for name in list(tallies)[-1:]:
            progress.advance(name)
        progress.close()
        return WrittenModel(files, hashes.result(), tallies)

    def reports(self, written: WrittenModel, method: str) -> tuple[ModuleReport, ...]:
        """One report for each quantized matrix, by the name of its module in the source."""
        reports = []
        for task in self.tasks:
            if task.type.name in _FLOATS or not task.tensor.sources:
                continue
            rows, columns = task.tensor.shape[-2:]
            for source in task.tensor.sources:
                reports.append(
                    ModuleReport(
                        name=source.removesuffix(".weight"),
                        spec=str(task.type),
                        method=method,
                        bits_per_weight=task.type.bits,
                        weights=rows * columns,
                        weight_error=written.tallies[task.tensor.name].relative,
                    )
                )
        return tuple(reports)

    def write_manifest(
        self,
        written: WrittenModel,
        source: str | Path,
        recipe: Mapping[str, Any],
        calibration: dict[str, Any] | None,
        reports: Sequence[ModuleReport],
    ) -> None:
        """Put the manifest beside the file."""
        name = self.checkpoint.path.resolve().name if Path(source).exists() else str(source)
        parts = [__version__, written.source_hashes, dict(recipe), calibration]
        write_manifest(
            written.files[0].path,
            Manifest(
                fingerprint=hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest(),
                lowbit_version=__version__,
                source={"name": name, "sha256": written.source_hashes},
                recipe=dict(recipe),
                calibration=calibration,
                modules={report.name: {k: v for k, v in report.to_json().items() if k != "name"} for report in reports},
                files={file.path.name: file.record for file in written.files},
            ),
        )


def _stored_vocabulary(checkpoint: GgufCheckpoint) -> dict[str, MetadataValue]:
    return {
        key: Typed("str", []) if isinstance(value, list) and not value else value
        for key, value in checkpoint.gguf.metadata.items()
        if key.startswith("tokenizer.")
    }
