"""A model as its headers tell it: names, dtypes and shapes, block by block, whatever format it is stored in."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lowbit.checkpoint import Checkpoint, ModelDescription
from lowbit.checkpoint.layers import LayerState, layer_states
from lowbit.checkpoint.remote import RemoteCheckpoint, open_headers
from lowbit.codecs import module_plan, stored_format
from lowbit.codecs.gguf.checkpoint import GgufCheckpoint
from lowbit.codecs.gguf.metadata import MetadataValue, Typed
from lowbit.codecs.gguf.remote import RemoteGguf, open_gguf_headers
from lowbit.codecs.opening import open_model
from lowbit.codecs.reading import dense_names
from lowbit.errors import UnsupportedError
from lowbit.evaluation.footprint import kind_of
from lowbit.pipeline.streamed import model_dtype
from lowbit.sizing.config_only import open_config

Header = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""

ENCODER = re.compile(r"(^|\.)(vision\w*|visual|image\w*|audio\w*|multi_modal\w*|mm_projector|embed_vision)\.")
"""Names of the encoders of multimodal models, and of what joins them to the language model."""

_NUMBERED = re.compile(r"(.*?)\.(\d+)\.")
_NO_LINEARS = frozenset({"gpt2"})
"""Families whose matrices are stored the other way round, which lowbit does not quantize."""


@dataclass(frozen=True, slots=True)
class HeaderModel:
    """A model without its weights.

    ``dense``    the tensors of the dense model, by name, in stored order
    ``linears``  modules inside the decoder's blocks that can be quantized, to ``(out_features, in_features)``
    ``blocks``   prefix of the decoder's blocks, such as ``model.layers``
    ``stored``   name of the format it is stored in; ``stored_kinds`` are its bytes by kind of module
    ``dtype``    of the dense weights
    ``vocabulary``  keys of a GGUF file's tokenizer, filled when first needed
    """

    name: str
    checkpoint: Checkpoint
    description: ModelDescription
    layers: tuple[LayerState, ...]
    dense: Mapping[str, Header]
    linears: Mapping[str, tuple[int, int]]
    blocks: str
    stored: str
    stored_kinds: Mapping[str, int]
    dtype: torch.dtype
    vocabulary: dict[str, MetadataValue] = field(default_factory=dict)

    @property
    def file_sizes(self) -> dict[str, int]:
        """Bytes of the weight files by name; of those only that are here or that the hub told about."""
        checkpoint = self.checkpoint
        if isinstance(checkpoint, RemoteCheckpoint | RemoteGguf):
            return {name: size for name, size in checkpoint.sizes.items() if size}
        return {file.name: file.stat().st_size for file in checkpoint.files if file.is_file()}

    @property
    def merges(self) -> int | None:
        """Merges of the vocabulary's byte-pair encoding; None where it has not been looked at."""
        known: Mapping[str, MetadataValue] = self.vocabulary
        if isinstance(self.checkpoint, GgufCheckpoint):
            known = self.checkpoint.gguf.metadata
        if "tokenizer.ggml.model" not in known:
            return None
        stored = known.get("tokenizer.ggml.merges", ())
        merges = stored.value if isinstance(stored, Typed) else stored
        return len(merges) if isinstance(merges, Sequence) else None

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(shape) for _, shape in self.dense.values())

    @property
    def active_parameters(self) -> int:
        """Numbers that one token meets: of the experts, only those that it is routed to."""
        routed = sum(math.prod(shape) for name, (_, shape) in self.dense.items() if ".experts." in name)
        if not (self.description.is_moe and routed):
            return self.parameters
        used = routed * self.description.experts_per_token // self.description.experts
        return self.parameters - routed + used


def open_header_model(source: str | Path, *, revision: str | None = None, like: str | None = None) -> HeaderModel:
    """Open a directory, a GGUF file, ``demo``, a hub id, or a ``config.json`` alone, by its headers.

    A GGUF file on the hub is ``owner/name:Q4_K_M`` or ``owner/name/FILE.gguf``.

    ``like`` names the family by whose rules the cache of an unknown one is counted. Raises :class:`CheckpointError`
    and :class:`UnsupportedError` as opening does, and for an unknown family.
    """
    checkpoint = (
        open_config(source)
        or open_headers(source, revision=revision)
        or open_gguf_headers(source, revision=revision)
        or open_model(source, revision=revision)
    )
    plan = module_plan(checkpoint)
    where = str(checkpoint.path)
    dtype = model_dtype(checkpoint)
    dense: dict[str, Header] = {}
    for name in dense_names(checkpoint, plan):
        module = name.removesuffix(".weight")
        if module != name and module in plan:
            dense[name] = (dtype, plan[module].shape)
        else:
            dense[name] = (checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape)
    description = ModelDescription.from_config(checkpoint.config, dense, where=where)
    kinds: defaultdict[str, int] = defaultdict(int)
    for name, info in checkpoint.tensors.items():
        kinds[tensor_kind(name)] += info.nbytes
    blocks = _block_prefix(dense, description.layers, where)
    return HeaderModel(
        name=str(source),
        checkpoint=checkpoint,
        description=description,
        layers=layer_states(checkpoint.config, description, family=like, where=where),
        dense=dense,
        linears=_linears(dense, blocks, description),
        blocks=blocks,
        stored=stored_format(plan),
        stored_kinds=dict(kinds),
        dtype=dtype,
    )


def tensor_kind(name: str) -> str:
    """The kind of a tensor for a picture: ``encoder`` for eyes and ears, else as :func:`kind_of` says."""
    return "encoder" if ENCODER.search(name) else kind_of(name)


def block_number(name: str, blocks: str, layers: int) -> int:
    """The number of the decoder block that a tensor is part of; -1 outside."""
    rest = name[len(blocks) + 1 :] if name.startswith(f"{blocks}.") else ""
    number = rest.partition(".")[0]
    return int(number) if number.isdigit() and int(number) < layers else -1


def _block_prefix(names: Mapping[str, Header], layers: int, where: str) -> str:
    """What stands before the numbers of the decoder's blocks: the list with as many as the config says."""
    numbers: defaultdict[str, set[int]] = defaultdict(set)
    for name in names:
        if (match := _NUMBERED.match(name)) and not ENCODER.search(name):
            numbers[match[1]].add(int(match[2]))
    found = [prefix for prefix, seen in numbers.items() if len(seen) >= layers]
    if not found:
        most = max(map(len, numbers.values()), default=0)
        raise UnsupportedError(f"{where}: config.json speaks of {layers} blocks, the tensors of {most}")
    return min(found, key=len)


def _linears(dense: Mapping[str, Header], blocks: str, description: ModelDescription) -> dict[str, tuple[int, int]]:
    """Matrices named ``weight`` inside the decoder's blocks: the linears of the model, for every family known here."""
    if description.model_type in _NO_LINEARS:
        return {}
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, (dtype, shape) in dense.items()
        if name.endswith(".weight")
        and len(shape) == 2
        and dtype.is_floating_point
        and block_number(name, blocks, description.layers) >= 0
    }
