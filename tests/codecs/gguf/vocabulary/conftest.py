"""Tokenizers of every kind, and llama.cpp's own tokenization of a vocabulary as the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lowbit.codecs.gguf.writing import TensorHeader, write_gguf
from lowbit.formats.ggml.types import GGML_TYPES

SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"}


@pytest.fixture
def save_tokenizer(tmp_path: Path) -> Callable[..., Path]:
    """Save a ``tokenizers`` tokenizer as a Hugging Face directory with the given special tokens."""

    def save(tokenizer: Tokenizer, **special: Any) -> Path:
        directory = tmp_path / "tokenizer"
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(special or SPECIAL)).save_pretrained(directory)
        (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
        return directory

    return save


@pytest.fixture
def llama_cpp_ids(tmp_path: Path) -> Callable[..., list[list[int]]]:
    """Token ids that llama.cpp gives texts with a vocabulary, on a model of a few random numbers."""
    pytest.importorskip("xllamacpp")
    from lowbit.engines.llama_cpp import LlamaCpp

    def ids(metadata: Mapping[str, Any], texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        path = tmp_path / "tiny.gguf"
        tokens = metadata["tokenizer.ggml.tokens"]
        write_tiny_model(path, metadata, len(getattr(tokens, "value", tokens)))
        with LlamaCpp(path, context=256, threads=1) as model:
            return [model.tokenize(text, special=special) for text in texts]

    return ids


def write_tiny_model(path: Path, vocabulary: Mapping[str, Any], rows: int) -> None:
    """A llama of one layer and width 32 around a vocabulary."""
    width = 32
    shapes = {
        "token_embd.weight": (rows, width),
        "output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.ffn_norm.weight": (width,),
        **{f"blk.0.{name}.weight": (width, width) for name in ("attn_q", "attn_k", "attn_v", "attn_output")},
        **{f"blk.0.{name}.weight": (width, width) for name in ("ffn_gate", "ffn_up", "ffn_down")},
    }
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 256,
        "llama.embedding_length": width,
        "llama.block_count": 1,
        "llama.feed_forward_length": width,
        "llama.attention.head_count": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": rows,
        **vocabulary,
    }
    generator = np.random.default_rng(0)
    write_gguf(
        path,
        metadata,
        [TensorHeader(name, GGML_TYPES["F32"], shape) for name, shape in shapes.items()],
        (generator.normal(size=shape).astype(np.float32) for shape in shapes.values()),
        overwrite=True,
    )
