"""A checkpoint seen through a rotation of its residual stream: the same model, with other weights.

With ``Q`` orthogonal and ``x`` the residual stream, ``x Q`` has the same root mean square as ``x``. So where every norm
is an RMSNorm, its gain can go into the weights that read it, and every weight that reads the stream can be multiplied
by ``Q``, every one that writes it by ``Qᵀ``: the model computes what it did. Each head's values can be rotated, too, as
long as the output projection turns them back. Only exact rotations are made; families for which one would not be are
refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType

import torch

from lowbit.checkpoint import Checkpoint
from lowbit.checkpoint.location import WeightFiles
from lowbit.errors import UnsupportedError, UsageError
from lowbit.quant.rotation import random_rotation

__all__ = ["ROTATABLE", "ROTATIONS", "RotatedCheckpoint"]

ROTATIONS = ("hadamard",)
"""What ``--rotate`` takes."""

ROTATABLE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "mixtral", "qwen2_moe", "qwen3_moe")
"""Families whose residual stream is read through RMSNorms alone, and written by plain linears."""
_UNIT_OFFSET = ("gemma",)
"""Families whose norms multiply by one more than their weight."""

_BLOCK = r"(?P<block>.*layers\.\d+)\."
_ATTENTION = re.compile(_BLOCK + r"self_attn\.(?:q|k|v|qkv)_proj\.weight")
_FEED_FORWARD = re.compile(
    _BLOCK
    + r"(?:mlp|block_sparse_moe)\.(?:.*\.)?(?:gate_proj|up_proj|gate_up_proj|w1|w3|gate|shared_expert_gate)\.weight"
)
_WRITERS = re.compile(
    _BLOCK + r"(?:self_attn\.o_proj|(?:mlp|block_sparse_moe)\.(?:.*\.)?(?:down_proj|w2))\.(?:weight|bias)"
)
_VALUES = re.compile(_BLOCK + r"self_attn\.v_proj\.(?:weight|bias)")
_OUTPUTS = re.compile(_BLOCK + r"self_attn\.o_proj\.weight")
_GAINS = re.compile(r"(?:.*\.)?(?:input_layernorm|post_attention_layernorm|norm)\.weight")


class RotatedCheckpoint(Checkpoint):
    """``source`` with its residual stream and the values of its heads rotated; tied embeddings become two.

    Weights inside blocks are float32, to be rounded once. Raises :class:`UnsupportedError` with the reason where the
    rotation would not be exact, and :class:`UsageError` for another ``kind``.
    """

    def __init__(self, source: Checkpoint, kind: str, seed: int) -> None:
        if kind not in ROTATIONS:
            raise UsageError(f"unknown rotation {kind!r}: use {', '.join(ROTATIONS)}")
        family = source.config.get("model_type")
        if family not in ROTATABLE:
            reason = f"exact only for {', '.join(ROTATABLE)}: others normalise differently or write through norms"
            raise UnsupportedError(f"{source.path}: --rotate {kind} of {family}", [reason])
        if source.quantization_config is not None:
            raise UnsupportedError(f"{source.path}: --rotate {kind}", ["the checkpoint is quantized: use the original"])
        files = WeightFiles(source.tensors, source.files, problems=source.problems)
        super().__init__(source.path, dict(source.config), files, trust_remote_code=source.trust_remote_code)
        self._source = source
        self._names = {name.removeprefix("model."): name for name in source.tensors}
        self._offset = 1.0 if family in _UNIT_OFFSET else 0.0
        self._embedding = self._names["embed_tokens.weight"]
        self._final = self._names["norm.weight"]
        if "lm_head.weight" not in source.tensors:
            head = replace(source.tensors[self._embedding], name="lm_head.weight")
            self.tensors = MappingProxyType(dict(source.tensors) | {"lm_head.weight": head})
            self.config["tie_word_embeddings"] = False
        self._rotation = random_rotation(source.tensors[self._embedding].shape[1], seed)
        head_dim = source.description.head_dim
        separate = any(_VALUES.fullmatch(name) for name in source.tensors)
        self._head = random_rotation(head_dim, seed + 1) if separate else None

    def read(self, name: str) -> torch.Tensor:
        """The tensor ``name`` as rotated; float32 inside blocks, in its stored dtype elsewhere."""
        dtype = self.info(name).dtype
        if name == "lm_head.weight":
            stored = name if name in self._source.tensors else self._embedding
            return self._read_stream(self._source.read(stored).float(), self._final).to(dtype)
        if name == self._embedding:
            return (self._source.read(name).float() @ self._rotation).to(dtype)
        tensor = self._source.read(name)
        if _GAINS.fullmatch(name):
            return torch.full_like(tensor, 1.0 - self._offset)
        for pattern, norm in ((_ATTENTION, "input_layernorm"), (_FEED_FORWARD, "post_attention_layernorm")):
            if match := pattern.fullmatch(name):
                tensor = self._read_stream(tensor.float(), f"{match['block']}.{norm}.weight")
        if self._head is not None and _VALUES.fullmatch(name):
            heads = tensor.float().reshape(-1, len(self._head), *tensor.shape[1:])
            tensor = torch.einsum("ij,hi...->hj...", self._head, heads).reshape(tensor.shape)
        if self._head is not None and _OUTPUTS.fullmatch(name):
            tensor = (tensor.float().reshape(tensor.shape[0], -1, len(self._head)) @ self._head).reshape(tensor.shape)
        if _WRITERS.fullmatch(name):
            tensor = self._rotation.T @ tensor.float()
        return tensor

    def read_rows(self, name: str, rows: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Rows of a tensor as rotated; only those of the embedding without reading the others."""
        if name == self._embedding:
            picked = self._source.read_rows(name, rows)
            return (picked.float() @ self._rotation).to(picked.dtype)
        return self.read(name)[torch.as_tensor(rows, dtype=torch.long)]

    def _read_stream(self, weight: torch.Tensor, norm: str) -> torch.Tensor:
        """A weight that reads the stream through ``norm``: its gain folded in, then rotated."""
        return (weight * (self._source.read(norm).float() + self._offset)) @ self._rotation
