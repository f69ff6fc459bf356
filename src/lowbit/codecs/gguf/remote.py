"""A GGUF file on the hub by its header: some megabytes of vocabulary and names, none of the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lowbit.checkpoint.location import hub_errors, is_hub_id
from lowbit.checkpoint.remote import hub_files, is_elsewhere
from lowbit.codecs.gguf.checkpoint import GgufCheckpoint, open_gguf_checkpoint
from lowbit.codecs.gguf.container import GgufFile, GgufTensor, open_gguf, read_gguf_stream
from lowbit.errors import CheckpointError

__all__ = ["RemoteGguf", "open_gguf_headers"]

PIECE_BYTES = 1 << 20
"""What is fetched at a time."""

_FILE = re.compile(r"(?P<repo>[^/:]+/[^/:]+)(?::(?P<tag>[\w.\-]+)|/(?P<file>[^:]+\.gguf))?")
_PART = re.compile(r"-(?P<number>\d{5})-of-\d{5}(?=\.gguf$)")


class RemoteGguf(GgufCheckpoint):
    """A GGUF file on the hub of which only the header is at hand: reading a tensor raises CheckpointError.

    ``sizes`` are bytes by file name.
    """

    def __init__(self, file: GgufFile, hub: _Hub) -> None:
        super().__init__(file, hub.blocks)
        self.sizes = {path.name: hub.sizes[path] for path in file.files}

    def read(self, name: str) -> torch.Tensor:
        """Always raises: the data is on the hub."""
        self.info(name)
        raise CheckpointError(f"{self.path}: tensor {name} was not fetched, only headers: download the file first")

    def read_rows(self, name: str, rows: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Always raises, as :meth:`read` does."""
        return self.read(name)


def open_gguf_headers(source: str | Path, *, revision: str | None = None) -> GgufCheckpoint | None:
    """A GGUF file on the hub by its header: ``owner/name/FILE.gguf``, ``owner/name:Q4_K_M``, or ``owner/name`` where
    that has one model in this format and no other; a copy in the local cache is opened instead.

    None where ``source`` is no such name or exists here. Raises :class:`CheckpointError` where the hub cannot be
    reached, refuses, or has no such file or several, and for a header that is not valid.
    """
    match = _FILE.fullmatch(str(source)) if is_elsewhere(source) else None
    if match is None or not is_hub_id(match["repo"]):
        return None
    from huggingface_hub import try_to_load_from_cache

    repo = match["repo"]
    if match["file"]:
        cached = try_to_load_from_cache(repo, match["file"], revision=revision)
        if isinstance(cached, str):
            return open_gguf_checkpoint(Path(cached))
    with hub_errors(repo, revision):
        listed = hub_files(repo, revision)
        name = match["file"] or _chosen(repo, match["tag"], listed)
        if name is None:
            return None
        if name not in listed:
            raise CheckpointError(f"{repo}: the hub model has no file {name}: {_offered(listed)}")
        hub = _Hub(repo, revision, listed)
        return RemoteGguf(open_gguf(Path(repo) / name, read=hub.header, exists=hub.has), hub)


class _Hub:
    """Ranges of files of one hub model, which go by ``owner/name/FILE``."""

    def __init__(self, repo: str, revision: str | None, listed: Mapping[str, int | None]) -> None:
        from huggingface_hub import HfFileSystem

        self._files: Any = HfFileSystem(skip_instance_cache=True)
        self._repo, self._revision, self._listed = repo, revision, listed
        self.sizes: dict[Path, int] = {}

    def has(self, path: Path) -> bool:
        """Whether the model has this file."""
        return self._name(path) in self._listed

    def header(self, path: Path) -> GgufFile:
        """The header of a file."""
        with self._open(path) as file:
            self.sizes[path] = int(file.size)
            return read_gguf_stream(file, int(file.size), path)

    def blocks(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """A tensor's bytes as stored, uint8 ``[rows, row_bytes]``; for small ones."""
        with self._open(tensor.file) as file:
            file.seek(tensor.start)
            data = file.read(tensor.nbytes)
        if len(data) != tensor.nbytes:
            raise CheckpointError(f"{tensor.file}: truncated while reading tensor {tensor.name!r}")
        return np.frombuffer(data, np.uint8).reshape(tensor.rows, tensor.row_bytes).copy()

    def _name(self, path: Path) -> str:
        return path.relative_to(self._repo).as_posix()

    def _open(self, path: Path) -> Any:
        # A size that is known saves a listing of the folder.
        known = {"size": size} if (size := self._listed[self._name(path)]) else {}
        return self._files.open(
            path.as_posix(), "rb", revision=self._revision, block_size=PIECE_BYTES, cache_type="readahead", **known
        )


def _chosen(repo: str, tag: str | None, listed: Mapping[str, object]) -> str | None:
    """The file (of a split model the first) that ``tag`` names, or the only one; None where there is none at all."""
    models = _models(listed)
    if tag is not None:
        ending = re.compile(rf"(?:^|.*[-._/]){re.escape(tag)}\.gguf", re.IGNORECASE)
        found = [name for plain, name in models.items() if ending.fullmatch(plain)]
        if not found:
            raise CheckpointError(f"{repo}:{tag}: the hub model has no GGUF file of that name: {_offered(listed)}")
        if len(found) > 1:
            raise CheckpointError(f"{repo}:{tag}: {len(found)} files have that name: say which, as {repo}/{found[0]}")
        return found[0]
    if len(models) > 1:
        raise CheckpointError(f"{repo}: has {len(models)} GGUF models: name one, such as {repo}/{min(models.values())}")
    return next(iter(models.values()), None)


def _models(listed: Mapping[str, object]) -> dict[str, str]:
    """GGUF models by file name without the number of a part, to the (first) file; image encoders are left out."""
    found = {}
    for name in sorted(listed):
        part = _PART.search(name)
        is_encoder = name.rpartition("/")[2].lower().startswith("mmproj")
        if name.endswith(".gguf") and not is_encoder and (part is None or int(part["number"]) == 1):
            found[_PART.sub("", name)] = name
    return found


def _offered(listed: Mapping[str, object]) -> str:
    names = list(_models(listed).values())
    return f"it has {', '.join(names[:6])}{' …' if len(names) > 6 else ''}" if names else "it has no GGUF files"
