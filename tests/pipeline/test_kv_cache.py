"""Caches of few bits: rounding against the reference encoders of their formats, attention that sees what is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from transformers import AutoModelForCausalLM

from lowbit.checkpoint import open_checkpoint
from lowbit.checkpoint.layers import LayerState, layer_states
from lowbit.errors import UnsupportedError
from lowbit.pipeline.kv_cache import SIMULATED, CacheFormat, _q4_0, _q8_0, measure_cache, simulated_cache
from lowbit.pipeline.streamed import StreamedModel

VECTORS = arrays.arrays(np.float32, (2, 3, 64), elements=st.floats(-300, 300, width=32))


@pytest.mark.parametrize(("name", "rounding"), [("Q8_0", _q8_0), ("Q4_0", _q4_0)])
@given(VECTORS)
def test_blocks_are_those_of_ggml(name: str, rounding: Callable[[torch.Tensor], torch.Tensor], values: object) -> None:
    vectors = np.asarray(values, np.float32)
    kind = gguf.GGMLQuantizationType[name]
    expected = gguf.dequantize(gguf.quantize(vectors, kind), kind)
    found = rounding(torch.from_numpy(vectors)).numpy()
    # The two may fall on either side of a tie, which is one step of that block's scale.
    step = np.abs(vectors.reshape(2, 3, 2, 32)).max(-1) / (127 if name == "Q8_0" else 8)
    allowed = np.repeat(step, 32, -1).reshape(vectors.shape) * 1.01 + 1e-7
    assert (np.abs(found - expected) <= allowed).all()
    assert np.mean(np.abs(found - expected) > 1e-6) < 0.02


@pytest.mark.parametrize(("length", "sizes"), [(64, (64, 64)), (128, (128, 64)), (192, (64, 64)), (96, (0, 0))])
def test_llama_cpp_rotates_around_its_rounding(length: int, sizes: tuple[int, int]) -> None:
    """Keys by the largest power of two in their length, values by 64; not at all where 64 does not divide it."""
    vectors = torch.randn(4, length, generator=torch.Generator().manual_seed(0))
    vectors[:, 3] *= 50  # an outlier, which the rotation spreads
    for rounding, size in zip((SIMULATED["q4_0"].key, SIMULATED["q4_0"].value), sizes, strict=True):
        expected = _q4_0(vectors)
        if size:
            signs = [[(-1) ** (row & column).bit_count() for column in range(size)] for row in range(size)]
            turn = torch.tensor(signs) / size**0.5
            turned = (vectors.reshape(4, -1, size) @ turn).reshape(4, length)
            expected = (_q4_0(turned).reshape(4, -1, size) @ turn.T).reshape(4, length)
        torch.testing.assert_close(rounding(vectors), expected, rtol=0, atol=2e-3)


def test_fp8_saturates() -> None:
    found = SIMULATED["fp8"].key(torch.tensor([0.0, 1.0, 1.06, 500.0, -1e9, 2.0**-9]))
    assert found.tolist() == [0.0, 1.0, 1.0, 448.0, -448.0, 2.0**-9]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3", "gpt_neox", "phi3", "opt"])
def test_attention_sees_what_the_cache_gives_back(model_type: str, checkpoint_of: Callable[[str], Path]) -> None:
    """A format that forgets values makes attention add nothing; one that keeps all changes nothing."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint_of(model_type), dtype=torch.float32).eval()
    ids = torch.arange(3, 19)[None]
    heads: list[torch.Tensor] = []

    def same(vectors: torch.Tensor) -> torch.Tensor:
        heads.append(vectors)
        return vectors

    with torch.no_grad():
        plain = model(ids).logits
        with simulated_cache(CacheFormat("all", same, same)) as calls:
            torch.testing.assert_close(model(ids).logits, plain)
        with simulated_cache(CacheFormat("none", same, torch.zeros_like)):
            assert not torch.allclose(model(ids).logits, plain, atol=1e-3)
        torch.testing.assert_close(model(ids).logits, plain)
    assert calls == [2]
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    assert {tuple(one.shape) for one in heads} == {(1, kv_heads, 16, dim)}


def test_fewer_bits_cost_more(tiny_llama: Path) -> None:
    ids = torch.arange(3, 259).reshape(4, 64) % 320
    with open_checkpoint(tiny_llama) as checkpoint:
        model = StreamedModel(checkpoint)
        layers = layer_states(checkpoint.config, checkpoint.description)
        found = measure_cache(model, ids, ("fp8", "q8_0", "q4_0"), layers)
        again = measure_cache(model, ids[:2], ("fp8",), layers)
        odd = measure_cache(model, ids, ("fp8", "q8_0"), [LayerState(1, 40, 40)] * 2)
    whole = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    with torch.no_grad(), simulated_cache(SIMULATED["q4_0"]):
        rounded = whole(ids).logits.double().log_softmax(-1)
    with torch.no_grad():
        own = whole(ids).logits.double().log_softmax(-1)
    assert found["q4_0"] == pytest.approx(float((own.exp() * (own - rounded)).sum(-1).mean()), rel=0.02)
    assert 0 <= found["q8_0"] < found["fp8"] < found["q4_0"]
    assert again["fp8"] > 0
    assert list(odd) == ["fp8"]


def test_what_cannot_be_simulated_is_said(tiny_llama: Path) -> None:
    with open_checkpoint(tiny_llama) as checkpoint:
        model = StreamedModel(checkpoint)
        latent = [LayerState(1, 64, latent=True)] * 2
        with pytest.raises(UnsupportedError, match=r"latent attention \(MLA\) cannot be simulated"):
            measure_cache(model, torch.zeros(1, 8, dtype=torch.long), ("fp8",), latent)
