"""Which tensors a GGUF file of a checkpoint holds, and where each comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint import Checkpoint, read_json_object
from lowbit.codecs.codec import StoredModule
from lowbit.codecs.gguf.families import FAMILIES, Family, Link
from lowbit.codecs.gguf.hyperparameters import full_config, heads_of, metadata_of, objections
from lowbit.codecs.gguf.metadata import MetadataValue
from lowbit.codecs.gguf.orders import Heads, RowOrder, row_order
from lowbit.codecs.reading import dense_names, module_plan, read_dense
from lowbit.errors import CheckpointError, UnsupportedError

__all__ = ["ExportPlan", "ExportTensor", "export_plan", "load_source", "load_tensor"]

_IGNORED = re.compile(
    r"(^|\.)(rotary_emb\.\w+|attention\.(bias|masked_bias)|embeddings\.(position_ids|token_type_ids)|pooler\.dense\.\w+"
    r"|cls\.(predictions|seq_relationship)\..+|vision_tower\..+|vision_model\..+|multi_modal_projector\..+)$"
)
"""Tensors that no text model needs: buffers, the pooler and heads of encoders, the eyes of multimodal models."""
_ENCODER_HEAD = re.compile(r"(^|\.)lm_head\.")
_GREEK = {".weight": ".gamma", ".bias": ".beta"}
_POOLING = {"pooling_mode_mean_tokens": 1, "pooling_mode_cls_token": 2, "pooling_mode_lasttoken": 3}


@dataclass(frozen=True, slots=True)
class ExportTensor:
    """A tensor of a GGUF file and what it is made of.

    ``shape``      outermost first; ``[experts, out, in]`` for stacked experts
    ``sources``    names of dense tensors of the checkpoint, one per expert; empty for a ``constant``
    ``row_order``  GGUF row ``i`` is row ``row_order[i]`` of the (each) source's matrix, or None
    ``offset``     added to every value
    ``constant``   the float32 values themselves, where no source has them
    ``keep_float`` never quantized: stays F32
    ``score_rows`` so many rows, from the first, make queries and keys, whose products are attention's scores
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    row_order: RowOrder | None = None
    offset: float = 0.0
    constant: torch.Tensor | None = None
    keep_float: bool = False
    score_rows: int = 0

    def shifted(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` with the offset: in float32 if there is one, else as they are."""
        return values.float() + self.offset if self.offset else values


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """All of a GGUF file but its vocabulary and file type.

    ``metadata`` has its keys in full; ``notes`` tell a user where llama.cpp computes something else.
    """

    architecture: str
    metadata: dict[str, MetadataValue]
    tensors: tuple[ExportTensor, ...]
    notes: tuple[str, ...] = ()


def export_plan(checkpoint: Checkpoint, plan: Mapping[str, StoredModule] | None = None) -> ExportPlan:
    """The GGUF form of a checkpoint in any format that lowbit reads; ``plan`` is its module plan if at hand.

    Raises :class:`UnsupportedError` with the reasons for an architecture that llama.cpp computes differently or not at
    all, :class:`CheckpointError` for a tensor that is missing or misshapen.
    """
    plan = module_plan(checkpoint) if plan is None else plan
    where = str(checkpoint.path)
    config = full_config(checkpoint.config, where)
    family = FAMILIES[config["model_type"]]
    if reasons := objections(family, config):
        raise UnsupportedError(f"{where}: cannot be a GGUF file", reasons)
    shapes = {
        name: plan[module].shape if (module := name.removesuffix(".weight")) in plan else checkpoint.tensors[name].shape
        for name in dense_names(checkpoint, plan)
    }
    builder = _Builder(family, config, shapes, where)
    tensors = list(builder.tensors())
    vocabulary = tensors[0].shape[0]
    metadata, rope = metadata_of(family, config, vocabulary)
    for name, values in rope.tensors.items():
        tensors.append(ExportTensor(name, tuple(values.shape), (), constant=values, keep_float=True))
    builder.check_leftovers()
    general: dict[str, MetadataValue] = {
        "general.architecture": family.architecture,
        "general.type": "model",
        "general.name": _name(checkpoint.path),
        "general.size_label": _size_label(tensors),
        "general.quantization_version": 2,
    }
    if family.output == "none":
        metadata["tokenizer.ggml.token_type_count"] = int(config.get("type_vocab_size") or 1)
    if (pooling := _pooling(checkpoint.path)) is not None:
        metadata[f"{family.architecture}.pooling_type"] = pooling
    return ExportPlan(family.architecture, general | metadata, tuple(tensors), tuple(_notes(family, config)))


def load_source(
    checkpoint: Checkpoint, plan: Mapping[str, StoredModule], tensor: ExportTensor, index: int
) -> torch.Tensor:
    """The part of ``tensor`` that comes from its source ``index``, in GGUF's row order and with the offset.

    float32 if it is a quantized weight or has an offset, else in its stored dtype.
    """
    values = read_dense(checkpoint, plan, tensor.sources[index])
    if tensor.row_order is not None:
        values = values[torch.from_numpy(tensor.row_order)]
    return tensor.shifted(values)


def load_tensor(checkpoint: Checkpoint, plan: Mapping[str, StoredModule], tensor: ExportTensor) -> torch.Tensor:
    """The whole ``tensor`` in its shape; see :func:`load_source` for the dtype. ``plan`` is the module plan."""
    if tensor.constant is not None:
        return tensor.constant
    first = load_source(checkpoint, plan, tensor, 0)
    if len(tensor.sources) == 1:
        return first.reshape(tensor.shape)
    stacked = torch.empty(tensor.shape, dtype=first.dtype)
    stacked[0] = first
    for index in range(1, len(tensor.sources)):
        stacked[index] = load_source(checkpoint, plan, tensor, index)
    return stacked


class _Builder:
    """Finds the tensors of a family among the names of a checkpoint."""

    def __init__(
        self, family: Family, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
    ) -> None:
        self._family = family
        self._config = config
        self._shapes = shapes
        self._where = where
        self._used: set[str] = set()
        self._heads: Heads = heads_of(config)
        self._experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)
        self._base = self._find_base()
        self._orders: dict[tuple[str, int], RowOrder] = {}

    def _find_base(self) -> str:
        names = {base: f"{self._family.embedding.hf.format(base=base)}.weight" for base in self._family.bases}
        for base, name in names.items():
            if name in self._shapes:
                return base
        raise self._missing(names[self._family.bases[0]])

    def _missing(self, name: str) -> CheckpointError:
        return CheckpointError(f"{self._where}: tensor {name} is missing; is the download complete?")

    def tensors(self) -> Iterator[ExportTensor]:
        """All tensors, those outside the blocks first."""
        shell = [link for link in self._family.links if "{block}" not in link.gguf]
        yield from (tensor for link in shell[:1] for tensor in self._of(link, 0))
        yield from self._output(f"{shell[0].hf.format(base=self._base)}.weight")
        yield from (tensor for link in shell[1:] for tensor in self._of(link, 0))
        for block in range(self._config["num_hidden_layers"]):
            for link in self._family.links:
                if "{block}" in link.gguf:
                    yield from self._of(link, block)

    def _of(self, link: Link, block: int) -> Iterator[ExportTensor]:
        gguf = link.gguf.format(block=block)
        for suffix in (".weight", ".bias") if link.bias else (".weight",):
            if "{expert}" in link.hf:
                experts = range(self._experts)
                sources = tuple(link.hf.format(base=self._base, block=block, expert=e) + suffix for e in experts)
            else:
                sources = (self._stored(link.hf.format(base=self._base, block=block), suffix),)
            missing = [name for name in sources if name not in self._shapes]
            if missing and len(missing) == len(sources) and (suffix == ".bias" or not link.required):
                continue
            if missing or not sources:
                raise self._missing((*missing, gguf)[0])
            yield self._tensor(link, gguf + suffix, sources)

    def _stored(self, module: str, suffix: str) -> str:
        """The name of a tensor; norms of old BERT checkpoints have theirs in Greek."""
        greek = module + _GREEK[suffix]
        return greek if greek in self._shapes else module + suffix

    def _tensor(self, link: Link, name: str, sources: tuple[str, ...]) -> ExportTensor:
        self._used.update(sources)
        shape = tuple(self._shapes[sources[0]])
        if odd := next((source for source in sources if tuple(self._shapes[source]) != shape), None):
            raise CheckpointError(f"{self._where}: tensor {odd} has not the shape {list(shape)} of {sources[0]}")
        order = None
        if link.order:
            order = self._order(link.order, shape[0], sources[0])
            shape = (len(order), *shape[1:])
        if link.vector:
            shape = shape[-1:]
        if "{expert}" in link.hf:
            shape = (len(sources), *shape)
        return ExportTensor(
            name,
            shape,
            sources,
            row_order=order,
            offset=link.offset if name.endswith(".weight") else 0.0,
            keep_float=link.keep_float or len(shape) == 1,
            score_rows=self._score_rows(name) if len(shape) == 2 else 0,
        )

    def _score_rows(self, name: str) -> int:
        heads = self._heads
        rows = {"attn_q": heads.queries, "attn_k": heads.keys, "attn_qkv": heads.queries + heads.keys}
        return rows.get(name.removesuffix(".weight").rpartition(".")[2], 0) * heads.size

    def _order(self, kind: str, rows: int, name: str) -> RowOrder:
        key = (kind, rows)
        if key not in self._orders:
            try:
                self._orders[key] = row_order(kind, self._heads, rows, name)
            except CheckpointError as error:
                raise CheckpointError(f"{self._where}: {error}: config.json and weights disagree") from error
        return self._orders[key]

    def _output(self, embedding: str) -> Iterator[ExportTensor]:
        """The output head: its own, a copy of the embedding, or none where llama.cpp takes the embedding."""
        if self._family.output == "none":
            return
        prefix = self._base.removesuffix("model.") if self._base.startswith("language_model.") else ""
        weight = f"{prefix}{self._family.head}.weight"
        tied = self._config.get("tie_word_embeddings", False)
        if weight in self._shapes and not tied:
            if self._family.output == "never":
                raise UnsupportedError(
                    f"{self._where}: {weight} is a head of its own",
                    ["llama.cpp takes the embedding for the head of this architecture"],
                )
            yield self._tensor(Link("output", ""), "output.weight", (weight,))
            return
        if not tied and self._family.output != "never":
            raise CheckpointError(f"{self._where}: tensor {weight} is missing and not tied; is the download complete?")
        self._used.add(weight)
        if self._family.output == "required":
            yield self._tensor(Link("output", ""), "output.weight", (embedding,))

    def check_leftovers(self) -> None:
        """Refuse a checkpoint that holds more than GGUF has room for."""
        left = [name for name in self._shapes if name not in self._used and not _IGNORED.search(name)]
        if self._family.output == "none":
            left = [name for name in left if not _ENCODER_HEAD.search(name)]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise UnsupportedError(
                f"{self._where}: tensor {left[0]}{more} has no place in a GGUF file of {self._family.architecture}",
                ["llama.cpp computes this architecture without it"],
            )


def _name(path: Path) -> str:
    """What the model is called: the directory's name, or a hub id's last part for a snapshot in the cache."""
    path = path.resolve()
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.rpartition("--")[2]
    return path.name.removesuffix(".gguf")


def _size_label(tensors: list[ExportTensor]) -> str:
    """Parameters in words, ``1.1B`` or ``8x7B``, by the naming convention of ggml's ``docs/gguf.md``."""
    total = expert = experts = 0
    for tensor in tensors:
        size = 1
        for extent in tensor.shape:
            size *= extent
        total += size
        if len(tensor.shape) == 3:
            experts = tensor.shape[0]
            expert += size
    count = total - expert + expert // experts if experts else total
    scale, unit = next((s, u) for s, u in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"), (1, "")) if count >= s)
    number = count / scale
    text = f"{number:.1f}" if number < 10 else f"{number:.0f}"
    label = text.removesuffix(".0") + unit
    return f"{experts}x{label}" if experts else label


def _pooling(path: Path) -> int | None:
    """How sentence-transformers turns token states into a vector, by llama.cpp's number, or None if unknown."""
    file = path / "1_Pooling" / "config.json"
    if not file.is_file():
        return None
    config = read_json_object(file)
    return next((number for key, number in _POOLING.items() if config.get(key) is True), None)


def _notes(family: Family, config: Mapping[str, Any]) -> Iterator[str]:
    window = config.get("sliding_window")
    local = "sliding_attention" in (config.get("layer_types") or []) or family.model_type in (
        "mistral",
        "mixtral",
        "phi3",
    )
    if window and local and not family.sliding and window < config["max_position_embeddings"]:
        yield f"llama.cpp attends to the whole context in this architecture: beyond {window} tokens results differ"
