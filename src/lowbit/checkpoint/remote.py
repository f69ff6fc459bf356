"""A hub model without its weights: ``config.json`` and the headers of its safetensors files, some kilobytes in all."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from lowbit.checkpoint.checkpoint import Checkpoint
from lowbit.checkpoint.files import read_json_object
from lowbit.checkpoint.location import WeightFiles, find_weights, is_hub_id
from lowbit.checkpoint.safetensors import DTYPES, TensorInfo
from lowbit.errors import CheckpointError

__all__ = ["RemoteCheckpoint", "hub_files", "is_elsewhere", "open_headers"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json")
_CONNECTIONS = 8


class RemoteCheckpoint(Checkpoint):
    """A hub model of which only headers are at hand. ``path`` is its id; reading a tensor raises CheckpointError.

    ``sizes`` are bytes of weight files by name, as far as the hub tells them.
    """

    def __init__(
        self,
        name: str,
        config: dict[str, Any],
        weights: WeightFiles,
        quantization: dict[str, Any] | None,
        sizes: Mapping[str, int],
    ) -> None:
        super().__init__(Path(name), config, weights)
        self._quantization = quantization
        self.sizes = sizes

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """How the weights are quantized, from ``config.json`` or the file beside it; see :class:`Checkpoint`."""
        return super().quantization_config or self._quantization

    def read(self, name: str) -> torch.Tensor:
        """Always raises: the data is on the hub."""
        self.info(name)
        raise CheckpointError(f"{self.path}: tensor {name} was not fetched, only headers: download the model first")


def open_headers(source: str | Path, *, revision: str | None = None) -> Checkpoint | None:
    """The hub model ``source`` by its headers; a complete copy in the local cache is opened instead.

    None where ``source`` is no hub id, a directory of that name exists, or the hub model has nothing but GGUF files.
    Raises :class:`CheckpointError` where the hub cannot be reached, refuses, or has no safetensors files of that name.
    """
    if not is_elsewhere(source) or not is_hub_id(str(source)):
        return None
    source = str(source)
    if (cached := _cached(source, revision)) is not None:
        return cached
    from huggingface_hub import HfApi

    from lowbit.checkpoint.location import hub_errors

    api = HfApi()
    with hub_errors(source, revision), _no_bars():
        names = hub_files(source, revision)
        if not any(name.endswith(".safetensors") for name in names) and any(name.endswith(".gguf") for name in names):
            return None
        config = read_json_object(Path(api.hf_hub_download(source, "config.json", revision=revision)))
        files = _weight_files(source, names, lambda: api.hf_hub_download(source, _INDEX, revision=revision))
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            headers = list(pool.map(lambda file: _header(api, source, file, revision), files))
        beside = next((name for name in _QUANTIZATION_FILES if name in names), None)
        quantization = None
        if beside is not None:
            quantization = read_json_object(Path(api.hf_hub_download(source, beside, revision=revision)))
    tensors = {
        info.name: info
        for file, header in zip(files, headers, strict=True)
        for info in _tensors(Path(source) / file, header.tensors)
    }
    weights = WeightFiles(MappingProxyType(tensors), tuple(Path(source) / file for file in files))
    return RemoteCheckpoint(source, config, weights, quantization, {file: names[file] or 0 for file in files})


def is_elsewhere(source: str | Path) -> bool:
    """Whether ``source`` is a name that nothing here has."""
    return not (isinstance(source, Path) or source == "demo" or Path(source).expanduser().exists())


def hub_files(name: str, revision: str | None) -> dict[str, int | None]:
    """The files of the hub model ``name`` and their bytes, None where the hub does not tell."""
    from huggingface_hub import HfApi

    found = HfApi().model_info(name, revision=revision, files_metadata=True)
    return {sibling.rfilename: sibling.size for sibling in found.siblings or ()}


def _cached(source: str, revision: str | None) -> Checkpoint | None:
    """The model from the hub's local cache, if all of it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(source, revision=revision, local_files_only=True))
        weights = find_weights(path)
        config = read_json_object(path / "config.json")
    except (LocalEntryNotFoundError, HFValidationError, CheckpointError):
        return None
    return None if weights.pickles else Checkpoint(path, config, weights)


def _weight_files(source: str, names: Collection[str], download_index: Any) -> list[str]:
    if _INDEX in names:
        weight_map = read_json_object(Path(download_index()), unique=True).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{source}: {_INDEX}: weight_map must be an object of tensor names and file names")
        return sorted(set(weight_map.values()))
    if _SINGLE in names:
        return [_SINGLE]
    single = [name for name in names if name.endswith(".safetensors") and not name.startswith(("adapter_", "consol"))]
    if len(single) == 1:
        return single
    raise CheckpointError(f"{source}: the hub model has no {_SINGLE} and no {_INDEX}: name one that has safetensors")


def _header(api: Any, source: str, file: str, revision: str | None) -> Any:
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        return api.parse_safetensors_file_metadata(source, file, revision=revision)
    except SafetensorsParsingError as error:
        raise CheckpointError(f"{source}/{file}: its header on the hub cannot be read: {error}") from error


def _tensors(file: Path, found: Any) -> Iterator[TensorInfo]:
    for name, info in found.items():
        dtype = DTYPES.get(info.dtype)
        if dtype is None:
            raise CheckpointError(f"{file}: tensor {name!r}: dtype {info.dtype!r} is not one of {', '.join(DTYPES)}")
        yield TensorInfo(name, dtype, tuple(info.shape), file, *info.data_offsets)


@contextmanager
def _no_bars() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not quiet:
            enable_progress_bars()
