"""A model of which there is nothing but ``config.json``: tensors as transformers would build them."""

from __future__ import annotations

import math
from pathlib import Path
from types import MappingProxyType

from lowbit.checkpoint import Checkpoint, TensorInfo, read_json_object
from lowbit.checkpoint.location import WeightFiles
from lowbit.pipeline.architectures import family_of
from lowbit.pipeline.experts import unfuse_experts
from lowbit.pipeline.streamed import build_empty, model_dtype

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


def open_config(source: str | Path) -> Checkpoint | None:
    """The model that a ``config.json`` (or a directory with one and no weights) describes; None for anything else.

    Its tensors have names, dtypes and shapes but no data. Raises :class:`UnsupportedError` for an architecture that
    transformers does not know.
    """
    path = Path(source).expanduser()
    file = path if path.suffix == ".json" and path.is_file() else path / "config.json"
    if not file.is_file() or any(next(file.parent.glob(pattern), None) for pattern in _WEIGHTS if file != path):
        return None
    config = read_json_object(file)
    empty = Checkpoint(file.parent, config, WeightFiles(MappingProxyType({}), ()))
    model = build_empty(empty)
    family = family_of(model.config.get_text_config().model_type)
    unfuse_experts(model, family.experts)
    dtype = model_dtype(empty)
    tensors = {}
    for name, parameter in model.named_parameters():
        for old, new in family.renames:
            name = name.replace(old, new)
        shape = tuple(parameter.shape)
        tensors[name] = TensorInfo(name, dtype, shape, file, 0, math.prod(shape) * dtype.itemsize)
    return Checkpoint(file.parent, config, WeightFiles(MappingProxyType(tensors), ()))
