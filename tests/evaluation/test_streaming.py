"""Streaming block by block against the whole model in one forward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from lowbit.errors import NumericsError
from lowbit.evaluation.metrics import Windows, cut_windows
from lowbit.evaluation.streaming import final_hidden, score
from lowbit.pipeline.progress import Silent


class Whole:
    """A Llama that is in memory whole, seen as a streamed one."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model
        self.block_names: Sequence[str] = [f"layers.{i}" for i in range(len(model.model.layers))]
        self.hidden_size: int = model.config.hidden_size
        self.dtype = torch.float32
        self.longest_logits = 0

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.model.embed_tokens(ids)

    def load_block(self, index: int) -> Any:
        return self.model.model.layers[index]

    @torch.no_grad()
    def run_block(self, block: Any, index: int, hidden: torch.Tensor) -> torch.Tensor:
        rotary: LlamaRotaryEmbedding = self.model.model.rotary_emb
        places = torch.arange(hidden.shape[1])[None]
        return block(hidden, position_embeddings=rotary(hidden, places), position_ids=places)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        self.longest_logits = max(self.longest_logits, hidden.shape[1])
        return self.model.lm_head(self.model.model.norm(hidden))


def tiny(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def naive(model: LlamaForCausalLM, windows: Windows) -> torch.Tensor:
    with torch.no_grad():
        logits = model(windows.ids).logits[:, :-1][windows.counted[:, 1:]]
    return torch.log_softmax(logits.double(), -1)


@pytest.mark.parametrize("workspace", [1, 40_000, 1 << 29])
@pytest.mark.parametrize("stride", [None, 9])
def test_streamed_scores_are_those_of_whole_forwards(tmp_path: Path, workspace: int, stride: int | None) -> None:
    ids = torch.randint(0, 61, (150,), generator=torch.Generator().manual_seed(5))
    windows = cut_windows(ids, 32, stride=stride)
    models = [("first", Whole(tiny(0))), ("second", Whole(tiny(1)))]
    stores = [final_hidden(m, windows, tmp_path / n, n, Silent(), workspace=workspace) for n, m in models]
    first, second = score(
        [(n, m, store) for (n, m), store in zip(models, stores, strict=True)], windows, workspace=workspace
    )
    p, q = naive(models[0][1].model, windows), naive(models[1][1].model, windows)
    targets = windows.ids[windows.counted]
    torch.testing.assert_close(second.nll.double(), -q.gather(1, targets[:, None])[:, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.nll.double(), -p.gather(1, targets[:, None])[:, 0], rtol=1e-4, atol=1e-5)
    assert second.divergence is not None
    torch.testing.assert_close(second.divergence.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=1e-5)
    assert first.choice.tolist() == p.argmax(-1).tolist()
    if workspace == 1:
        assert models[0][1].longest_logits == 1


def test_a_broken_model_is_named(tmp_path: Path) -> None:
    model = tiny(0)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    windows = cut_windows(torch.arange(40), 16)
    store = final_hidden(Whole(model), windows, tmp_path / "h", "broken", Silent())
    with pytest.raises(NumericsError, match="broken"):
        score([("broken", Whole(model), store)], windows)
