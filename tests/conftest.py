"""Fixtures shared by all tests: tiny random checkpoints of every architecture family, and the optional shared data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()

SHARED = Path(__file__).parents[2] / "shared"

TEXT = "\n".join(
    f"def function_{i}(value, other={i % 7}):\n    '''Return value number {i}.'''\n    return value * {i} + other\n"
    for i in range(400)
)
"""Some 30 kB of code-like text: enough for a few dozen calibration windows of the tiny models."""

_COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GROUPED = _COMMON | {"num_key_value_heads": 1, "head_dim": 64}
_EXPERTS = {"moe_intermediate_size": 128, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED | {"tie_word_embeddings": True},
    "mistral": _GROUPED | {"sliding_window": None},
    "qwen2": _COMMON | {"num_key_value_heads": 1},
    "qwen3": _GROUPED,
    "gemma": _GROUPED,
    "gemma2": _GROUPED | {"sliding_window": 64, "query_pre_attn_scalar": 64},
    "gemma3_text": _GROUPED | {"sliding_window": 64, "query_pre_attn_scalar": 64},
    "phi": _COMMON | {"partial_rotary_factor": 0.5},
    "phi3": _COMMON | {"num_key_value_heads": 1},
    "gpt_neox": _COMMON | {"rotary_pct": 0.25},
    "opt": {k: v for k, v in _COMMON.items() if k != "intermediate_size"}
    | {"ffn_dim": 256, "word_embed_proj_dim": 128},
    "mixtral": _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": _COMMON | {"num_key_value_heads": 1} | _EXPERTS | {"shared_expert_intermediate_size": 128},
    "qwen3_moe": _GROUPED | _EXPERTS,
}
"""``model_type`` to the config fields of its tiny instance: two blocks, hidden 128, head_dim 64."""


def save_tokenizer(directory: Path) -> None:
    """Write a byte-level BPE of 320 tokens with a chat template, trained on :data:`TEXT`, into ``directory``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=_COMMON["vocab_size"],
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    fast.save_pretrained(directory)


def build_checkpoint(
    directory: Path, model_type: str = "llama", *, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Save a seeded random model of ``model_type`` with a tokenizer into ``directory`` and return it.

    ``changes`` override the config; weights are scaled up so that the blocks matter to the output.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(ARCHITECTURES[model_type] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.5)
    model.to(dtype).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(params=list(ARCHITECTURES))
def model_type(request: pytest.FixtureRequest) -> str:
    """Every family in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``checkpoint_of("qwen2")``: a tiny random checkpoint of that model type, built once. Read only."""
    built: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in built:
            built[model_type] = build_checkpoint(tmp_path_factory.mktemp(model_type), model_type)
        return built[model_type]

    return make


@pytest.fixture(scope="session")
def new_checkpoint() -> Callable[..., Path]:
    """:func:`build_checkpoint`, for a test that wants its own copy, another dtype or other config fields."""
    return build_checkpoint


@pytest.fixture(scope="session")
def tiny_llama(checkpoint_of: Callable[[str], Path]) -> Path:
    """A tiny random Llama checkpoint with a tokenizer. Read only: copy it before damaging it."""
    return checkpoint_of("llama")


@pytest.fixture(scope="session")
def calibration_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file that calibrates the tiny models."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """The directory of real models and texts beside the checkout; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip("no shared models and texts beside this checkout")
    return SHARED
