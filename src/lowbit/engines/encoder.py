"""Text encoders on transformers: sentence embeddings and cross-encoder scores, in float32 or with int8 linears.

Reads what sentence-transformers writes (``modules.json`` with pooling, dense and normalisation layers) without that
package. A checkpoint without it is pooled by the mean and normalised.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lowbit.errors import CheckpointError, UnsupportedError

__all__ = ["Encoder", "Encoding"]

_POOLING = ("cls_token", "mean_tokens", "max_tokens")


@dataclass(frozen=True, slots=True)
class Encoding:
    """One text, or pair of texts, as token ids and segment ids."""

    ids: tuple[int, ...]
    segments: tuple[int, ...] = ()


class Encoder:
    """An encoder in memory. ``kind`` ``embedding`` gives unit vectors, ``rerank`` a score between 0 and 1 for a pair.

    ``int8`` quantizes the linears when loading (weights per tensor, activations as they come). Raises
    :class:`CheckpointError` and :class:`UnsupportedError` for a checkpoint that cannot serve.
    """

    def __init__(self, path: Path, kind: Literal["embedding", "rerank"], *, int8: bool = False) -> None:
        from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

        loader = AutoModel if kind == "embedding" else AutoModelForSequenceClassification
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
            model, report = loader.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: no encoder that transformers loads ({error})") from error
        if kind == "rerank" and (report["missing_keys"] or model.config.num_labels != 1):
            raise UnsupportedError(f"{path} cannot rerank", ["it is no cross-encoder with one score"])
        self.kind = kind
        self._model: nn.Module = _with_int8(model) if int8 else model
        self._model.eval()
        self._steps = _steps(path) if kind == "embedding" else ()
        self._vocabulary = int(model.config.vocab_size)
        self._pad = int(self._tokenizer.pad_token_id or 0)
        self.limit = _limit(path, self._tokenizer, model.config)
        """Tokens that a text (or pair) may have."""

    def tokenize(self, text: str, second: str | None = None) -> Encoding:
        """A text or pair as token ids, special tokens included; nothing is cut."""
        found = self._tokenizer(text, second, truncation=False, verbose=False)
        return Encoding(tuple(found["input_ids"]), tuple(found.get("token_type_ids", ())))

    def wrap(self, ids: Sequence[int]) -> Encoding:
        """Token ids that the client made itself, special tokens around them. ValueError for one that does not exist."""
        if any(not 0 <= each < self._vocabulary for each in ids):
            raise ValueError(f"token ids must be between 0 and {self._vocabulary - 1}")
        probe = self._tokenizer("a", return_special_tokens_mask=True)
        special = probe["special_tokens_mask"]
        before = special.index(0) if 0 in special else len(special) // 2
        after = special[::-1].index(0) if 0 in special else len(special) - before
        found = probe["input_ids"]
        whole = (*found[:before], *ids, *found[len(found) - after :])
        return Encoding(whole, (0,) * len(whole) if "token_type_ids" in probe else ())

    @torch.inference_mode()
    def run(self, batch: Sequence[Encoding]) -> npt.NDArray[np.float32]:
        """``[batch, dimension]`` unit vectors, or ``[batch, 1]`` scores."""
        longest = max(len(each.ids) for each in batch)
        ids = torch.full((len(batch), longest), self._pad)
        mask = torch.zeros((len(batch), longest), dtype=torch.int64)
        segments = torch.zeros((len(batch), longest), dtype=torch.int64)
        for row, each in enumerate(batch):
            ids[row, : len(each.ids)] = torch.tensor(each.ids)
            mask[row, : len(each.ids)] = 1
            if each.segments:
                segments[row, : len(each.segments)] = torch.tensor(each.segments)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if any(each.segments for each in batch):
            inputs["token_type_ids"] = segments
        output = self._model(**inputs)
        if self.kind == "rerank":
            return _array(torch.sigmoid(output.logits.float()))
        states = output.last_hidden_state.float()
        vectors = states
        for step in self._steps:
            vectors = step(vectors, mask)
        return _array(vectors)


def _array(values: torch.Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = values.numpy()
    return array


class _Pool:
    """``[batch, tokens, width]`` to ``[batch, width]``; several modes stand side by side."""

    def __init__(self, modes: Sequence[str]) -> None:
        self._modes = modes

    def __call__(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weights = mask.unsqueeze(-1).to(states.dtype)
        parts = []
        for mode in self._modes:
            if mode == "cls_token":
                parts.append(states[:, 0])
            elif mode == "mean_tokens":
                parts.append((states * weights).sum(1) / weights.sum(1).clamp(min=1))
            else:
                parts.append(states.masked_fill(weights == 0, -torch.inf).amax(1))
        return torch.cat(parts, 1)


class _Dense:
    """A linear layer with its activation, from ``N_Dense``."""

    def __init__(self, path: Path) -> None:
        from safetensors.torch import load_file

        config = _read(path / "config.json")
        tensors = load_file(path / "model.safetensors")
        self._weight, self._bias = tensors["linear.weight"].float(), tensors.get("linear.bias")
        activations = {"Tanh": torch.tanh, "Identity": lambda value: value, "ReLU": torch.relu}
        name = str(config.get("activation_function", "Identity")).rpartition(".")[2]
        if name not in activations:
            raise UnsupportedError(f"{path}: activation {name}", [f"known are {', '.join(activations)}"])
        self._activation: Any = activations[name]

    def __call__(self, vectors: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        bias = None if self._bias is None else self._bias.float()
        result: torch.Tensor = self._activation(nn.functional.linear(vectors, self._weight, bias))
        return result


def _normalise(vectors: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return nn.functional.normalize(vectors, dim=1)


def _steps(path: Path) -> tuple[Any, ...]:
    """What comes after the transformer, in order."""
    index = path / "modules.json"
    if not index.is_file():
        return (_Pool(["mean_tokens"]), _normalise)
    steps: list[Any] = []
    modules = json.loads(index.read_text(encoding="utf-8"))
    for module in modules if isinstance(modules, list) else []:
        name = str(module.get("type", "")).rpartition(".")[2]
        directory = path / Path(str(module.get("path", ""))).name
        if name == "Pooling":
            config = _read(directory / "config.json")
            modes = [mode for mode in _POOLING if config.get(f"pooling_mode_{mode}")]
            if not modes or any(config.get(f"pooling_mode_{mode}") for mode in ("weightedmean_tokens", "lasttoken")):
                raise UnsupportedError(f"{directory}: pooling", [f"known are {', '.join(_POOLING)}"])
            steps.append(_Pool(modes))
        elif name == "Dense":
            steps.append(_Dense(directory))
        elif name == "Normalize":
            steps.append(_normalise)
        elif name != "Transformer":
            raise UnsupportedError(f"{index}: module {name}", ["known are Transformer, Pooling, Dense and Normalize"])
    return tuple(steps) or (_Pool(["mean_tokens"]), _normalise)


def _limit(path: Path, tokenizer: Any, config: Any) -> int:
    """The least of what the checkpoint's files say about length."""
    sentence = path / "sentence_bert_config.json"
    limits = [int(tokenizer.model_max_length)]
    if isinstance(positions := getattr(config, "max_position_embeddings", None), int):
        # RoBERTa's positions begin after the padding token's
        limits.append(positions - (config.pad_token_id + 1 if "roberta" in config.model_type else 0))
    if sentence.is_file() and isinstance(length := _read(sentence).get("max_seq_length"), int):
        limits.append(length)
    return min(limits)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must be an object")
    return content


def _with_int8(model: nn.Module) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces a successor, which its stable release does not have yet
        from torch.ao.quantization import quantize_dynamic

        quantized: nn.Module = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)  # type: ignore[no-untyped-call]
    return quantized
