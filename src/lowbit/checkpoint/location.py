"""From what the user names (a directory, a hub id, ``demo``) to a directory and the weight files in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from lowbit.checkpoint.files import read_json_object
from lowbit.checkpoint.safetensors import TensorInfo, read_header
from lowbit.errors import CheckpointError

__all__ = ["WeightFiles", "find_weights", "locate"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
_GGUF_PART = re.compile(r".+-(?P<number>\d{5})-of-\d{5}\.gguf")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_NOT_WEIGHTS = frozenset({"training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt"})
_HUB_FILES = (
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_NOT_FROM_HUB = ("*/*", "consolidated*")

DEMO_DIRECTORY = Path(__file__).parents[1] / "demo" / "model"
"""Where the embedded model lies."""


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """The weight files of a directory: ``tensors`` by name where they are safetensors, else the ``pickles``.

    ``problems`` are remarks that do not keep the checkpoint from being read.
    """

    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    pickles: tuple[Path, ...] = ()
    problems: tuple[str, ...] = ()


def locate(
    source: str | Path, *, revision: str | None = None, allow_pickle: bool = False, trust_remote_code: bool = False
) -> Path:
    """The local directory of ``source``: an existing directory, ``"demo"``, or a hub id (downloaded or from the cache).

    A GGUF file is its own place, and so is the one model of a directory with GGUF files and no ``config.json``. Raises
    :class:`CheckpointError` saying what to do when there is no such directory, the hub cannot be reached or refuses.
    """
    text = str(source)
    if text == "demo":
        if not DEMO_DIRECTORY.is_dir():
            raise CheckpointError("the embedded model is missing from this installation: python -m lowbit.demo.train")
        return DEMO_DIRECTORY
    path = Path(source).expanduser()
    if path.is_dir():
        return path if (path / "config.json").exists() else _gguf_model(path)
    if path.suffix == ".gguf" and path.is_file():
        return path
    if path.exists():
        raise CheckpointError(
            f"{path}: is a file; name the directory that holds config.json and the weights, or a .gguf file"
        )
    if isinstance(source, Path) or not is_hub_id(text):
        raise CheckpointError(f"{path}: no such directory (and not a hub id, which reads like organisation/model)")
    return _download(text, revision, allow_pickle, trust_remote_code)


def _gguf_model(path: Path) -> Path:
    """The GGUF model in a directory, the first file of a split one; the directory itself where there is none."""
    files = sorted(path.glob("*.gguf"))
    models = [file for file in files if (part := _GGUF_PART.fullmatch(file.name)) is None or int(part["number"]) == 1]
    if len(models) > 1:
        raise CheckpointError(f"{path}: holds {len(models)} GGUF models: name one of them, such as {models[0].name}")
    return models[0] if models else path


def is_hub_id(text: str) -> bool:
    """Whether ``text`` reads like the id of a hub model."""
    return _HUB_ID.fullmatch(text) is not None and not text.startswith((".", "~"))


def _download(name: str, revision: str | None, allow_pickle: bool, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*_HUB_FILES, *(["*.py"] if trust_remote_code else [])]
    with hub_errors(name, revision):
        path = Path(
            snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=[*_NOT_FROM_HUB])
        )
        if allow_pickle and not any(path.glob("*.safetensors")):
            snapshot_download(name, revision=revision, allow_patterns=["*.bin"], ignore_patterns=[*_NOT_FROM_HUB])
    return path


@contextmanager
def hub_errors(name: str, revision: str | None) -> Iterator[None]:
    """Turn what huggingface_hub raises about the model ``name`` into a :class:`CheckpointError` with the way out."""
    from huggingface_hub import errors
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # the HTTP library below differs between releases of huggingface_hub; all of them name its base error so
    transport_error: type[Exception] = getattr(errors, "HTTPError", ConnectionError)
    what = f"{name!r} is no local directory, and"
    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"{what} the hub model is gated: accept its terms on its page, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{what} the hub has no such public model; if it is private, run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name!r}: the hub model has no revision {revision!r}") from error
    except HFValidationError as error:
        raise CheckpointError(f"{what} it is no valid hub id (organisation/model)") from error
    except (
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        HfHubHTTPError,
        transport_error,
        ConnectionError,
        TimeoutError,
    ) as error:
        raise CheckpointError(
            f"{what} the hub cannot be reached: go online (unset HF_HUB_OFFLINE), or copy the model's files into a "
            "directory and name that"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{name!r}: download failed: {error}") from error


def find_weights(path: Path) -> WeightFiles:
    """Find and merge the weight files of a checkpoint directory.

    Looked for in this order: an index (``model.safetensors.index.json``, or the only ``*.safetensors.index.json``),
    ``model.safetensors``, a complete set of shards, a single other ``*.safetensors``, pickle files. Raises
    :class:`CheckpointError` for an absent or contradictory file.
    """
    try:
        names = sorted(entry.name for entry in path.iterdir() if entry.is_file() or entry.is_symlink())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be listed: {error.strerror or error}") from error
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    shards = [
        name for name in names if name.endswith(".safetensors") and not name.startswith(("adapter_", "consolidated"))
    ]
    if "model.safetensors.index.json" in indexes:
        return _indexed(path, "model.safetensors.index.json")
    if "model.safetensors" in shards:
        return _merged(path, ["model.safetensors"])
    if len(indexes) == 1:
        return _indexed(path, indexes[0])
    if len(shards) == 1 and not _SHARD.fullmatch(shards[0]):
        return _merged(path, shards)
    if shards:
        return _merged(path, _complete_set(path, shards))
    return _without_safetensors(path, names)


def _without_safetensors(path: Path, names: list[str]) -> WeightFiles:
    pickles = [name for name in names if name.endswith(_PICKLES) and name not in _NOT_WEIGHTS]
    whole = [name for name in pickles if name.startswith("pytorch_model")]
    if pickles:
        files = tuple(path / name for name in whole or pickles)
        return WeightFiles(MappingProxyType({}), files, files)
    if any(name.startswith("adapter_") for name in names):
        raise CheckpointError(f"{path}: holds an adapter, not a model: merge it into its base model first")
    if any(name.endswith(".gguf") for name in names):
        raise CheckpointError(f"{path}: GGUF files cannot be read here: name the original safetensors checkpoint")
    raise CheckpointError(f"{path}: no weights found (*.safetensors); is the download complete?")


def _complete_set(path: Path, shards: list[str]) -> list[str]:
    """The shards if they are all of one ``stem-0000i-of-0000n`` set; :class:`CheckpointError` otherwise."""
    matches = [_SHARD.fullmatch(name) for name in shards]
    sets = {(match["stem"], match["total"]) for match in matches if match}
    if len(sets) != 1 or not all(matches):
        raise CheckpointError(
            f"{path}: {len(shards)} safetensors files and no model.safetensors.index.json to say which belong together"
        )
    stem, total = sets.pop()
    for number in range(1, int(total) + 1):
        name = f"{stem}-{number:05d}-of-{total}.safetensors"
        if name not in shards:
            raise CheckpointError(f"{path / name}: shard is missing; download it again")
    return shards


def _merged(path: Path, names: list[str]) -> WeightFiles:
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        for key, info in read_header(path / name)[0].items():
            if key in tensors:
                raise CheckpointError(f"{path}: tensor {key!r} is in both {tensors[key].file.name} and {name}")
            tensors[key] = info
    return WeightFiles(MappingProxyType(tensors), tuple(path / name for name in names))


def _indexed(path: Path, index_name: str) -> WeightFiles:
    index = path / index_name
    weight_map = read_json_object(index, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object of tensor names and file names")
    headers: dict[str, dict[str, TensorInfo]] = {}
    tensors: dict[str, TensorInfo] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: tensor {key!r} is said to be in {name!r}, which is no safetensors file name"
            )
        if name not in headers:
            if not (path / name).is_file():
                raise CheckpointError(f"{path / name}: shard is missing, {index_name} names it; download it again")
            headers[name] = read_header(path / name)[0]
        info = headers[name].get(key)
        if info is None:
            raise CheckpointError(
                f"{path / name}: tensor {key!r} is absent, {index_name} says it is here; download again"
            )
        tensors[key] = info
    problems = []
    for name, header in headers.items():
        if extra := [key for key in header if weight_map.get(key) != name]:
            problems.append(
                f"{name} holds {len(extra)} tensors that {index_name} does not place there ({extra[0]!r}): ignored"
            )
    return WeightFiles(MappingProxyType(tensors), tuple(path / name for name in headers), problems=tuple(problems))
