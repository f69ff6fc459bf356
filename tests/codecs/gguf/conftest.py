"""Tiny models of every family that GGUF holds, with every parameter random, and GGUF files of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from lowbit.checkpoint import open_checkpoint
from lowbit.codecs import module_plan
from lowbit.codecs.gguf.architectures import ExportPlan, export_plan, load_tensor
from lowbit.codecs.gguf.container import TensorHeader, write_gguf
from lowbit.formats.ggml import GGML_TYPES

VOCABULARY = 320
THETA = {"rope_theta": 10000.0}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
ENCODER = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 130,
}

DECODERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": (
        "llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
        },
    ),
    "llama-llama3": (
        "llama",
        {
            "rope_parameters": THETA
            | {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-linear": ("llama", {"rope_parameters": THETA | {"rope_type": "linear", "factor": 4.0}}),
    "qwen2-yarn": (
        "qwen2",
        {"rope_parameters": THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "llama-yarn-attention": (
        "llama",
        {
            "rope_parameters": THETA
            | {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "attention_factor": 1.3,
            }
        },
    ),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen2_moe-tied": ("qwen2_moe", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"num_hidden_layers": 3, "sliding_window": 32}),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 7,
            "sliding_window": 32,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": LOCAL,
            },
        },
    ),
    "gemma3-pattern": (
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "sliding_window": 32,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "phi3": ("phi3", {}),
    "phi3-partial": (
        "phi3",
        {"rope_parameters": THETA | {"rope_type": "default", "partial_rotary_factor": 0.75}},
    ),
    "phi3-longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": THETA
            | {
                "rope_type": "longrope",
                "short_factor": [1.0 + 0.05 * i for i in range(32)],
                "long_factor": [1.0 + 0.2 * i for i in range(32)],
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-serial": ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 0.5, "tie_word_embeddings": True}),
}
"""Name of a test case to model type and changes to its config."""

ENCODERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"pad_token_id": 0}),
    "roberta": ("roberta", {"pad_token_id": 1, "type_vocab_size": 1}),
    "xlm-roberta": ("xlm-roberta", {"pad_token_id": 1, "type_vocab_size": 1}),
}


def randomize(directory: Path) -> None:
    """Make norms and biases matter, and attention sharp enough that the order of its rows does."""
    generator = torch.Generator().manual_seed(0)
    for file in directory.glob("*.safetensors"):
        tensors = load_file(file)
        for name, value in tensors.items():
            if value.dim() == 1:
                value += 0.2 * torch.randn(value.shape, generator=generator)
            elif any(part in name for part in ("q_proj", "k_proj", "qkv", "query", "key")):
                value *= 1.6
        save_file(tensors, file, {"format": "pt"})


def build_encoder(directory: Path, model_type: str, changes: Mapping[str, Any]) -> Path:
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(model_type, **ENCODER, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(directory)
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return directory


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory, new_checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    """``model_of("qwen2_moe-tied")``: the checkpoint of a test case, built once. Read only."""
    built: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in built:
            directory = tmp_path_factory.mktemp(name)
            if name in ENCODERS:
                build_encoder(directory, *ENCODERS[name])
            else:
                model_type, changes = DECODERS[name]
                new_checkpoint(directory, model_type, **changes)
            randomize(directory)
            built[name] = directory
        return built[name]

    return make


def vocabulary(size: int, encoder: bool) -> dict[str, Any]:
    """A vocabulary that llama.cpp loads; texts go in and out as ids."""
    model = {"tokenizer.ggml.model": "bert", "tokenizer.ggml.pre": "default", "tokenizer.ggml.cls_token_id": 0}
    if not encoder:
        model = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": ["t 3"]}
    return model | {
        "tokenizer.ggml.tokens": ["t0", "t1", "t2", "t", "3", "t3", *(f"t{index}" for index in range(6, size))],
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (size - 3),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def export(directory: Path, out: Path, kind: str = "F32", **options: Any) -> ExportPlan:
    """Write ``out`` with every matrix as ``kind``, blocks made by the gguf package."""
    checkpoint = open_checkpoint(directory)
    modules = module_plan(checkpoint)
    plan = export_plan(checkpoint, modules)
    kinds = [GGML_TYPES["F32" if tensor.keep_float else kind] for tensor in plan.tensors]

    def data() -> Any:
        for tensor, chosen in zip(plan.tensors, kinds, strict=True):
            values = load_tensor(checkpoint, modules, tensor).float().numpy()
            blocks = gguf.quants.quantize(np.ascontiguousarray(values), gguf.GGMLQuantizationType(chosen.id))
            yield values if chosen.name == "F32" else blocks

    metadata = plan.metadata | vocabulary(plan.tensors[0].shape[0], plan.architecture == "bert")
    headers = [TensorHeader(t.name, k, t.shape) for t, k in zip(plan.tensors, kinds, strict=True)]
    # by the word phi3 in the name, llama.cpp expects that family's special tokens
    general = {"general.file_type": 0, "general.name": "tiny"}
    write_gguf(out, metadata | general, headers, data(), **options)
    return plan


@pytest.fixture(scope="session")
def write_model() -> Callable[..., ExportPlan]:
    """:func:`export`."""
    return export
