"""A model on disk, read lazily: config, tensors by name over all shards, and the files that go with them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch

from lowbit.checkpoint import safetensors
from lowbit.checkpoint.description import ModelDescription
from lowbit.checkpoint.files import read_json_object
from lowbit.checkpoint.location import WeightFiles, find_weights, locate
from lowbit.checkpoint.safetensors import TensorInfo
from lowbit.errors import CheckpointError

__all__ = ["Checkpoint", "open_checkpoint"]

_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
)
_AUXILIARY = (
    *_TOKENIZERS,
    "tokenizer*",
    "*.model",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json")


def open_checkpoint(
    source: str | Path, *, revision: str | None = None, allow_pickle: bool = False, trust_remote_code: bool = False
) -> Checkpoint:
    """Open a checkpoint: a directory, a hub id (downloaded, or from the cache) or ``"demo"``.

    Reads ``config.json`` and the headers of all weight files, no weights. Raises :class:`CheckpointError` naming the
    file and the way out; pickle files are refused unless ``allow_pickle`` (then loaded with ``weights_only``).
    """
    path = locate(source, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    if path.is_file():
        raise CheckpointError(
            f"{path}: is a GGUF file: write it out first, lowbit convert {path.name} OUT --format dense"
        )
    if (path / "journal.jsonl").exists() and not (path / "config.json").exists():
        raise CheckpointError(f"{path}: an unfinished run, not a checkpoint: finish it with --resume")
    config = read_json_object(path / "config.json")
    weights = find_weights(path)
    if weights.pickles and not allow_pickle:
        raise CheckpointError(
            f"{weights.pickles[0]}: a pickle file can run any code when loaded: use a safetensors copy of the model, "
            "or --allow-pickle to load it with weights_only"
        )
    return Checkpoint(path, config, weights, trust_remote_code=trust_remote_code)


class Checkpoint:
    """An open checkpoint directory. Reading is thread-safe and leaves nothing mapped or cached.

    ``path``      the directory
    ``config``    ``config.json``
    ``tensors``   tensor name to :class:`TensorInfo`, over all shards
    ``files``     the weight files
    ``problems``  remarks on the files that do not keep them from being read
    """

    def __init__(
        self, path: Path, config: dict[str, Any], weights: WeightFiles, *, trust_remote_code: bool = False
    ) -> None:
        self.path = path
        self.config = config
        self.files = weights.files
        self.problems = weights.problems
        self.trust_remote_code = trust_remote_code
        self._legacy: dict[Path, dict[str, torch.Tensor]] = {}
        self._pickled = bool(weights.pickles)
        self.tensors: Mapping[str, TensorInfo] = weights.tensors
        if self._pickled:
            self.tensors = MappingProxyType(self._pickled_tensors(weights.pickles))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self.tensors)} tensors)"

    def close(self) -> None:
        """Let go of pickle files kept in memory; safetensors files need no closing."""
        self._legacy.clear()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @cached_property
    def description(self) -> ModelDescription:
        """The shape of the model as ``config.json`` tells it (:class:`CheckpointError` if it does not)."""
        return ModelDescription.from_config(self.config, self.tensors, where=str(self.path / "config.json"))

    @cached_property
    def quantization_config(self) -> dict[str, Any] | None:
        """How the weights are quantized, in the words of the tool that did it, or None for a dense checkpoint.

        Looked for in ``config.json`` (also ``compression_config``, also inside ``text_config``), then in
        ``quantize_config.json`` and ``quant_config.json``.
        """
        nested = self.config.get("text_config")
        for config in (self.config, nested if isinstance(nested, dict) else {}):
            for key in ("quantization_config", "compression_config"):
                if (value := config.get(key)) is None:
                    continue
                if not isinstance(value, dict):
                    raise CheckpointError(f"{self.path / 'config.json'}: {key} must be an object")
                return value
        for name in _QUANTIZATION_FILES:
            if (self.path / name).is_file():
                return read_json_object(self.path / name)
        return None

    @property
    def has_tokenizer(self) -> bool:
        """Whether the directory holds a tokenizer."""
        return any(any(self.path.glob(pattern)) for pattern in _TOKENIZERS)

    def auxiliary_files(self) -> list[Path]:
        """The files to carry over to a derived checkpoint: tokenizer, templates, generation config, licence.

        The model's own Python code only where ``trust_remote_code`` was given.
        """
        patterns = (*_AUXILIARY, "*.py") if self.trust_remote_code else _AUXILIARY
        found = {path for pattern in patterns for path in self.path.glob(pattern) if path.is_file()}
        return sorted(path for path in found if path.suffix != ".safetensors")

    def info(self, name: str) -> TensorInfo:
        """Where the tensor lies; :class:`CheckpointError` if there is none of that name."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing; is the download complete?")
        return info

    def read(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype and shape, in memory of its own; :class:`CheckpointError` if absent."""
        info = self.info(name)
        if self._pickled:
            return self._load(info.file)[name].detach().clone(memory_format=torch.contiguous_format)
        return safetensors.read_tensor(info)

    def read_rows(self, name: str, rows: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Rows of a tensor ``[n, ...]`` in the order asked, without reading the others: ``[len(rows), ...]``.

        ``rows`` may repeat; ``range(a, b)`` is one read. Raises :class:`CheckpointError` for a row that does not exist.
        """
        info = self.info(name)
        if self._pickled:
            return self._load(info.file)[name].detach()[safetensors.check_rows(info, rows)]
        return safetensors.read_rows(info, rows)

    def copy_bytes(self, name: str) -> memoryview:
        """The tensor's bytes as stored, row-major little-endian, in memory of their own."""
        info = self.info(name)
        if self._pickled:
            return safetensors.tensor_bytes(self.read(name))
        return safetensors.read_bytes(info)

    def _pickled_tensors(self, files: Sequence[Path]) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, tensor in self._load(file).items():
                if name in tensors:
                    raise CheckpointError(
                        f"{self.path}: tensor {name!r} is in both {tensors[name].file.name} and {file.name}"
                    )
                size = tensor.numel() * tensor.element_size()
                tensors[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape), file, 0, size)
        return tensors

    def _load(self, file: Path) -> dict[str, torch.Tensor]:
        """The tensors of a pickle file, mapped while the caller holds them (an old-style file is kept in memory)."""
        if file in self._legacy:
            return self._legacy[file]
        try:
            with file.open("rb") as opened:
                mapped = opened.read(4) == b"PK\x03\x04"
            value = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{file}: holds more than tensors, or is corrupt, and is not loaded: convert it to safetensors"
            ) from error
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file}: corrupt or truncated ({type(error).__name__})") from error
        tensors = (
            {key: item for key, item in value.items() if isinstance(item, torch.Tensor)}
            if isinstance(value, dict)
            else {}
        )
        if not tensors:
            raise CheckpointError(f"{file}: holds no dictionary of tensors")
        if not mapped:
            self._legacy[file] = tensors
        return tensors
