"""The streamed model computes what transformers computes, for every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.pipeline.sampling import sample_from
from lowbit.pipeline.streamed import StreamedModel, build_empty


def _streamed_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    with open_checkpoint(path) as checkpoint:
        model = StreamedModel(checkpoint)
        hidden = model.embed(ids)
        for index in range(len(model.block_names)):
            hidden = model.run_block(model.load_block(index), index, hidden)
        return model.logits(hidden)


def test_logits_equal_transformers(model_type: str, checkpoint_of: Callable[[str], Path]) -> None:
    path = checkpoint_of(model_type)
    ids = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(input_ids=ids).logits
    got = _streamed_logits(path, ids)
    assert expected.std() > 0.01
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def test_sliding_window_masks_are_the_models_own(new_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = new_checkpoint(tmp_path, "mistral", sliding_window=8)
    ids = torch.randint(3, 320, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(input_ids=ids).logits
    torch.testing.assert_close(_streamed_logits(path, ids), expected, rtol=1e-4, atol=1e-4)


def test_half_precision_weights_are_computed_in_float32(new_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = new_checkpoint(tmp_path, "llama", dtype=torch.bfloat16)
    ids = torch.randint(3, 320, (1, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(input_ids=ids).logits
    torch.testing.assert_close(_streamed_logits(path, ids), expected, rtol=1e-4, atol=1e-4)


def test_sampling_draws_from_the_model(tiny_llama: Path) -> None:
    """The sampled text follows the model's distribution: teacher-forced, each token is one the model could draw."""
    with open_checkpoint(tiny_llama) as checkpoint:
        generate = sample_from(StreamedModel(checkpoint), memory=2**32)
        ids = generate(3, 20, 7)
        assert torch.equal(ids, generate(3, 20, 7))
        assert not torch.equal(ids, generate(3, 20, 8))
    assert ids.shape == (3, 20)
    assert bool((ids[:, 0] == 0).all())
    logits = _streamed_logits(tiny_llama, ids)
    chances = torch.softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])
    assert float(chances.mean()) > 1 / 320


def test_unknown_architecture_is_named(tiny_llama: Path) -> None:
    with open_checkpoint(tiny_llama) as checkpoint:
        checkpoint.config["model_type"] = "not_a_model"
        with pytest.raises(UnsupportedError, match="not_a_model"):
            build_empty(checkpoint)


def test_shape_that_contradicts_the_config_is_named(tiny_llama: Path) -> None:
    with open_checkpoint(tiny_llama) as checkpoint:
        checkpoint.config["intermediate_size"] = 512
        model = StreamedModel(checkpoint)
        with pytest.raises(CheckpointError, match=r"gate_proj.*config\.json asks for"):
            model.load_block(0)
