"""The tensors of a GGUF file under the names of Hugging Face's files: the way back of ``architectures``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lowbit.codecs.gguf.container import GgufFile, GgufTensor, read_blocks
from lowbit.codecs.gguf.families import FAMILIES, Family, Link, families_of
from lowbit.codecs.gguf.hyperparameters import config_from_metadata, heads_of
from lowbit.codecs.gguf.orders import RowOrder, inverse, row_order
from lowbit.errors import CheckpointError, UnsupportedError

__all__ = ["BlockReader", "ImportPlan", "ImportedTensor", "import_plan"]

BlockReader = Callable[[GgufTensor], npt.NDArray[np.uint8]]
"""Gives a tensor's bytes as stored."""

_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BRAIN_FLOAT = frozenset({"gemma", "gemma2", "gemma3_text"})


@dataclass(frozen=True, slots=True)
class ImportedTensor:
    """A tensor of the checkpoint and where it lies.

    ``shape``    as the checkpoint has it
    ``source``   the GGUF tensor, of which this is part ``part`` (an expert) of ``parts``
    ``rows``     the checkpoint's row ``i`` is row ``rows[i]`` of the part, -1 for a row of zeros; None for all in order
    ``offset``   added to every value
    """

    name: str
    shape: tuple[int, ...]
    source: GgufTensor
    part: int = 0
    parts: int = 1
    rows: RowOrder | None = None
    offset: float = 0.0

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the values, None for blocks."""
        return _FLOATS.get(self.source.type.name)


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """A GGUF file as a checkpoint: ``config.json`` and tensors by name."""

    config: dict[str, Any]
    tensors: dict[str, ImportedTensor]


def import_plan(file: GgufFile, read: BlockReader = read_blocks) -> ImportPlan:
    """Names, config and places of a GGUF model's tensors; reads no tensor but rotary frequencies, with ``read``.

    Raises :class:`UnsupportedError` for an architecture that lowbit does not know, :class:`CheckpointError` for a
    tensor or key that is missing or contradicts the others.
    """
    family = _family(file)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path}: tensor token_embd.weight is missing; is this a model?")
    blocks = file.metadata.get(f"{family.architecture}.block_count")
    if type(blocks) is not int or not 0 < blocks <= len(file.tensors):
        raise CheckpointError(f"{file.path}: block_count {blocks!r:.80} contradicts its {len(file.tensors)} tensors")
    config = config_from_metadata(
        family, file.metadata, _rope_tensors(file, read), vocabulary=embedding.shape[0], where=str(file.path)
    )
    reader = _Reader(family, config, file)
    tensors = {tensor.name: tensor for tensor in reader.tensors()}
    reader.check_leftovers()
    _complete(config, family, file, tensors)
    return ImportPlan(config, tensors)


def _family(file: GgufFile) -> Family:
    architecture = file.metadata.get("general.architecture")
    found = families_of(architecture) if isinstance(architecture, str) else []
    if not found:
        known = dict.fromkeys(family.architecture for family in FAMILIES.values())
        raise UnsupportedError(
            f"{file.path}: GGUF files of the architecture {architecture!r:.80} cannot be read as a checkpoint",
            [f"lowbit reads {', '.join(known)}"],
        )
    by_type = {family.model_type: family for family in found}
    if architecture == "llama":
        return by_type["mixtral" if file.metadata.get("llama.expert_count") else "llama"]
    if architecture == "bert":
        model = file.metadata.get("tokenizer.ggml.model")
        return by_type[{"t5": "xlm-roberta", "gpt2": "roberta"}.get(str(model), "bert")]
    return found[0]


def _rope_tensors(file: GgufFile, read: BlockReader) -> dict[str, torch.Tensor]:
    found = {}
    for name in _ROPE_TENSORS:
        tensor = file.tensors.get(name)
        if tensor is None:
            continue
        if tensor.type.name != "F32" or len(tensor.shape) != 1:
            raise CheckpointError(f"{file.path}: tensor {name} must be a vector of F32")
        found[name] = torch.from_numpy(read(tensor).view(np.float32).reshape(-1))
    return found


class _Reader:
    """Finds the tensors of a family in a GGUF file."""

    def __init__(self, family: Family, config: Mapping[str, Any], file: GgufFile) -> None:
        self._family = family
        self._config = config
        self._file = file
        self._used = set(_ROPE_TENSORS)
        self._heads = heads_of(config)
        self._experts = int(config.get("num_experts") or config.get("num_local_experts") or 0)

    def tensors(self) -> Iterator[ImportedTensor]:
        """All tensors under their names in the checkpoint."""
        for link in self._family.links:
            blocks = range(self._config["num_hidden_layers"]) if "{block}" in link.gguf else (0,)
            for block in blocks:
                yield from self._of(link, block)
        head = Link("output", self._family.head, required=False)
        if self._family.output in ("optional", "required"):
            yield from self._of(head, 0)

    def _of(self, link: Link, block: int) -> Iterator[ImportedTensor]:
        for suffix in (".weight", ".bias") if link.bias else (".weight",):
            name = link.gguf.format(block=block) + suffix
            source = self._file.tensors.get(name)
            if source is None:
                if suffix == ".bias" or not link.required:
                    continue
                raise CheckpointError(f"{self._file.path}: tensor {name} is missing; download it again")
            self._used.add(name)
            hf = link.hf + suffix
            values = {"base": self._family.bases[0], "block": block}
            if "{expert}" not in hf:
                yield self._tensor(link, hf.format(**values), source, source.shape, 0, 1)
                continue
            if len(source.shape) != 3 or source.shape[0] != self._experts:
                raise CheckpointError(f"{self._file.path}: tensor {name} must hold {self._experts} matrices")
            for expert in range(self._experts):
                yield self._tensor(
                    link, hf.format(**values, expert=expert), source, source.shape[1:], expert, self._experts
                )

    def _tensor(
        self, link: Link, name: str, source: GgufTensor, shape: tuple[int, ...], part: int, parts: int
    ) -> ImportedTensor:
        if (len(shape) == 1 and source.type.name not in _FLOATS) or not 1 <= len(shape) <= 2:
            raise CheckpointError(f"{self._file.path}: tensor {source.name} of shape {list(source.shape)} is misplaced")
        if link.offset and source.type.name not in _FLOATS:
            raise CheckpointError(f"{self._file.path}: tensor {source.name} must not be quantized")
        rows = None
        if link.order:
            count = shape[0] + (self._heads.first_position if link.order == "after_padding" else 0)
            try:
                rows = inverse(row_order(link.order, self._heads, count, source.name), count)
            except CheckpointError as error:
                raise CheckpointError(f"{self._file.path}: {error}") from error
            shape = (count, *shape[1:])
            if source.type.name not in _FLOATS and bool((rows < 0).any()):
                raise CheckpointError(f"{self._file.path}: tensor {source.name} must not be quantized")
        offset = -link.offset if name.endswith(".weight") else 0.0
        return ImportedTensor(name, (1, *shape) if link.vector else shape, source, part, parts, rows, offset)

    def check_leftovers(self) -> None:
        """Refuse a file that holds more than the checkpoint has room for."""
        left = [name for name in self._file.tensors if name not in self._used]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise UnsupportedError(
                f"{self._file.path}: tensor {left[0]!r}{more} has no place in a {self._family.model_type} checkpoint"
            )


def _complete(config: dict[str, Any], family: Family, file: GgufFile, tensors: Mapping[str, ImportedTensor]) -> None:
    """The fields of ``config`` that the tensors decide."""
    config["tie_word_embeddings"] = f"{family.head}.weight" not in tensors
    if family.model_type in ("llama", "mistral", "qwen3", "qwen3_moe"):
        biases = [f"blk.0.{name}.bias" in file.tensors for name in ("attn_q", "attn_k", "attn_v", "attn_output")]
        if any(biases) != all(biases):
            raise UnsupportedError(f"{file.path}: {family.model_type} has biases on all of attention or none of it")
        config["attention_bias"] = all(biases)
    if family.model_type == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if family.model_type == "qwen2_moe":
        config["qkv_bias"] = "blk.0.attn_q.bias" in file.tensors
    if family.output == "none":
        types = tensors.get("embeddings.token_type_embeddings.weight")
        config["type_vocab_size"] = 1 if types is None else types.shape[0]
    matrices = {tensor.source.type.name for tensor in tensors.values() if len(tensor.shape) == 2}
    if "BF16" in matrices or family.model_type in _BRAIN_FLOAT:
        config["dtype"] = "bfloat16"
    else:
        config["dtype"] = "float32" if matrices == {"F32"} else "float16"
