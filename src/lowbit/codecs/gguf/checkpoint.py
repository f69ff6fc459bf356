"""A GGUF file as a checkpoint: read, measured, verified and converted like any other."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

import torch

from lowbit.checkpoint import Checkpoint, TensorInfo
from lowbit.checkpoint.location import WeightFiles
from lowbit.checkpoint.safetensors import check_rows, read_rows, read_tensor, tensor_bytes
from lowbit.codecs.codec import StoredBlocks
from lowbit.codecs.gguf.blocks import GgufCodec
from lowbit.codecs.gguf.container import GgufFile, open_gguf, read_blocks
from lowbit.codecs.gguf.importing import BlockReader, ImportedTensor, import_plan
from lowbit.codecs.gguf.rebuilding import write_tokenizer

__all__ = ["GgufCheckpoint", "open_gguf_checkpoint"]


def open_gguf_checkpoint(path: Path) -> GgufCheckpoint:
    """Open a GGUF file, or any file of a split one. Reads headers only.

    Raises :class:`CheckpointError` naming file and field, :class:`UnsupportedError` for an architecture that lowbit
    does not know.
    """
    return GgufCheckpoint(open_gguf(path))


class GgufCheckpoint(Checkpoint):
    """An open GGUF file, with the names, row order and config of the same model in Hugging Face's form.

    A quantized weight is one tensor, uint8 ``[out_features, row_bytes]``; :attr:`modules` says what it stands for.

    ``path``      the (first) file
    ``gguf``      its header
    ``modules``   quantized module to how its weight is stored
    """

    def __init__(self, file: GgufFile, read: BlockReader = read_blocks) -> None:
        plan = import_plan(file, read)
        self.gguf = file
        self._imported = plan.tensors
        tensors = {name: _info(tensor) for name, tensor in plan.tensors.items()}
        super().__init__(file.path, plan.config, WeightFiles(MappingProxyType(tensors), file.files))
        codec = GgufCodec()
        self.modules = {
            name.removesuffix(".weight"): StoredBlocks(codec, tensor.source.type, (tensor.shape[0], tensor.shape[1]))
            for name, tensor in plan.tensors.items()
            if tensor.dtype is None
        }
        self._written: tempfile.TemporaryDirectory[str] | None = None

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file holds a vocabulary."""
        return "tokenizer.ggml.tokens" in self.gguf.metadata

    def auxiliary_files(self) -> list[Path]:
        """The vocabulary and chat template as a tokenizer's files, in a temporary directory until :meth:`close`.

        Raises :class:`UnsupportedError` or :class:`CheckpointError` for a vocabulary that cannot be one.
        """
        if not self.has_tokenizer:
            return []
        if self._written is None:
            self._written = tempfile.TemporaryDirectory(prefix="lowbit-tokenizer-")
            write_tokenizer(self.gguf.metadata, Path(self._written.name))
        return sorted(path for path in Path(self._written.name).iterdir() if path.is_file())

    def close(self) -> None:
        """Delete what :meth:`auxiliary_files` wrote."""
        super().close()
        if self._written is not None:
            self._written.cleanup()
            self._written = None

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype (float32 where GGUF stores it shifted); blocks as bytes.

        In memory of its own; :class:`CheckpointError` if absent.
        """
        info = self.info(name)
        tensor = self._imported[name]
        if tensor.rows is None:
            return _shifted(read_tensor(_part(tensor, info)).reshape(info.shape), tensor)
        stored = read_tensor(_part(tensor, info))
        return _shifted(_gathered(stored, torch.from_numpy(tensor.rows)), tensor)

    def read_rows(self, name: str, rows: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Rows of a tensor ``[n, ...]`` in the order asked, without reading the others; see :meth:`read`."""
        info = self.info(name)
        tensor = self._imported[name]
        if tensor.rows is None:
            return _shifted(read_rows(_part(tensor, info), rows), tensor)
        places = torch.from_numpy(tensor.rows)[check_rows(info, rows)]
        stored = read_rows(_part(tensor, info), places.clamp(min=0))
        stored[places < 0] = 0
        return _shifted(stored, tensor)

    def copy_bytes(self, name: str) -> memoryview:
        """The bytes of :meth:`read`, row-major little-endian."""
        return tensor_bytes(self.read(name))


def _info(tensor: ImportedTensor) -> TensorInfo:
    """Place and shape as the checkpoint shows them; of a quantized weight, its bytes."""
    size = tensor.source.nbytes // tensor.parts
    start = tensor.source.start + tensor.part * size
    if tensor.dtype is None:
        shape: tuple[int, ...] = (tensor.shape[0], tensor.source.row_bytes)
        dtype = torch.uint8
    else:
        shape, dtype = tensor.shape, tensor.dtype
    if tensor.offset:
        dtype = torch.float32
    return TensorInfo(tensor.name, dtype, shape, tensor.source.file, start, start + size)


def _part(tensor: ImportedTensor, info: TensorInfo) -> TensorInfo:
    """What to read of the file: stored dtype and number of rows."""
    dtype = tensor.dtype or torch.uint8
    if tensor.rows is None:
        return TensorInfo(info.name, dtype, info.shape, info.file, info.start, info.end)
    rows = int((tensor.rows >= 0).sum())
    return TensorInfo(info.name, dtype, (rows, *info.shape[1:]), info.file, info.start, info.end)


def _gathered(stored: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    found = stored[places.clamp(min=0)]
    found[places < 0] = 0
    return found


def _shifted(values: torch.Tensor, tensor: ImportedTensor) -> torch.Tensor:
    return values.float() + tensor.offset if tensor.offset else values
