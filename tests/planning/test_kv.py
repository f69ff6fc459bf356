"""Caches: published figures, vLLM's own division into pages, llama.cpp's own buffers, and what must always hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from lowbit.checkpoint import ModelDescription
from lowbit.checkpoint.layers import LayerState, layer_states
from lowbit.errors import UsageError
from lowbit.planning.kv import constant_bytes, llama_cpp_cache, request_bytes, token_bytes, vllm_pool
from lowbit.planning.kv_dtypes import KV_DTYPES, LLAMA_CPP, VLLM, parse_kv_dtype

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
BF16 = KV_DTYPES["bfloat16"]
GIB = 2**30


def states_of(config: dict[str, Any]) -> tuple[LayerState, ...]:
    return layer_states(config, ModelDescription.from_config(config))


def published(name: str) -> tuple[LayerState, ...]:
    return states_of(json.loads((CONFIGS / f"{name}.json").read_text()))


@pytest.mark.parametrize(
    ("name", "thousand", "sixteen", "hundred"),
    [
        ("llama-3.1-8b", 0.125, 1.95, 15.62),
        ("llama-3.1-70b", 0.313, 4.88, 39.06),
        # The figures that went round are of the first release, which held each key-value head twice.
        ("llama-3.1-405b-first-release", 0.984, 15.38, 123.05),
        ("llama-3.1-405b", 0.492, 7.69, 61.52),
    ],
)
def test_published_caches_of_llama(name: str, thousand: float, sixteen: float, hundred: float) -> None:
    layers = published(name)
    assert request_bytes(layers, 1024, BF16) / GIB == pytest.approx(thousand, abs=0.0006)
    assert request_bytes(layers, 16_000, BF16) / GIB == pytest.approx(sixteen, abs=0.006)
    assert request_bytes(layers, 128_000, BF16) / GIB == pytest.approx(hundred, abs=0.006)


@pytest.mark.parametrize(
    ("name", "per_token"),
    [
        ("qwen2.5-7b", 56 * 1024),  # 28 blocks, 4 heads of 128
        ("mistral-7b-v0.3", 128 * 1024),
        ("mixtral-8x7b-v0.1", 128 * 1024),
        ("deepseek-v2", 60 * 576 * 2),  # "69 KB": one latent vector of 512 + 64 numbers in each of 60 blocks
        ("gemma-2-9b", 42 * 2 * 8 * 256 * 2),
        ("gemma-2-27b", 46 * 2 * 16 * 128 * 2),
    ],
)
def test_published_bytes_per_token(name: str, per_token: int) -> None:
    assert sum(token_bytes(layer, BF16) for layer in published(name)) == per_token


def test_windows_stop_growing() -> None:
    mistral, gemma = published("mistral-7b-v0.1"), published("gemma-2-9b")
    assert request_bytes(mistral, 32_768, BF16) == request_bytes(mistral, 4096, BF16) == 4096 * 128 * 1024
    full, windowed = 8192 * 21 * 8192, 4096 * 21 * 8192  # 21 blocks of each kind, 8 KiB a token
    assert request_bytes(gemma, 8192, BF16) == full + windowed


# Bytes of a page over all groups, and pages of one request of 1000, 8192 and 100,000 tokens, as vLLM 0.32 itself gave
# them (tests/engines/vllm_pool_check.py) with 2048 batched tokens and two steps in flight.
VLLM_PAGES = [
    ("llama-3.1-8b", 2097152, (63, 512, 6250)),
    ("deepseek-v2", 1105920, (63, 512, 6250)),
    ("mistral-7b-v0.1", 2097152, (64, 513, 513)),
    ("gemma-2-9b", 2752512, (127, 1025, 6763)),
    ("gemma-2-27b", 3014656, (127, 1025, 6763)),
    ("gemma3_text", 262144, (447, 3590, 9328)),
    ("gpt_oss", 589824, (127, 777, 6515)),
    ("llama4_text", 786432, (252, 2048, 8554)),
    ("cohere2", 5242880, (255, 2051, 7789)),
    ("gemma4_text", 327680, (383, 1957, 7695)),
    ("qwen3_next", 13369344, (8, 22, 190)),
    ("jamba", 1310720, (27, 117, 1264)),
    ("falcon_h1", 18874368, (9, 59, 697)),
    ("kimi_linear", 13049856, (9, 13, 61)),
]


@pytest.mark.parametrize(("name", "page", "pages"), VLLM_PAGES, ids=[row[0] for row in VLLM_PAGES])
def test_pages_are_those_of_vllm(name: str, page: int, pages: tuple[int, ...]) -> None:
    known = (CONFIGS / f"{name}.json").exists()
    layers = published(name) if known else states_of(AutoConfig.for_model(name).to_dict())
    pool = vllm_pool(layers, BF16)
    assert pool.page_bytes == page
    assert tuple(pool.request_pages(context) for context in (1000, 8192, 100_000)) == pages


def test_llama_cpp_caches_as_its_log_says() -> None:
    """Sizes that llama.cpp logged (2026.10) for random models of these shapes."""
    plain = [LayerState(kv_heads=2, key_dim=64, value_dim=64)] * 4
    f16 = KV_DTYPES["float16"]
    assert llama_cpp_cache(plain, f16, 1024, slots=4).bytes == 8 * 2**20
    half = LayerState(kv_heads=2, key_dim=64, value_dim=64, window=1024)
    gemma = [half, LayerState(kv_heads=2, key_dim=64, value_dim=64)] * 3
    found = llama_cpp_cache(gemma, f16, 2048)
    assert (found.cells, found.sliding_cells, found.bytes) == (2048, 1536, int(5.25 * 2**20))
    found = llama_cpp_cache(gemma, f16, 4096, slots=4)
    assert (found.cells, found.sliding_cells, found.bytes) == (4096, 1536, 33 * 2**20)


def test_heads_are_replicated_and_latents_not_divided() -> None:
    grouped = LayerState(kv_heads=4, key_dim=128, value_dim=128)
    assert [token_bytes(grouped, BF16, devices) for devices in (1, 2, 4, 8)] == [2048, 1024, 512, 512]
    latent = LayerState(kv_heads=1, key_dim=576, latent=True)
    assert [token_bytes(latent, BF16, devices) for devices in (1, 8)] == [1152, 1152]


@pytest.mark.parametrize(
    ("name", "dim", "expected"),
    [
        *(("bfloat16", 128, 256), ("fp8", 128, 128), ("int8_per_token_head", 128, 132), ("nvfp4", 128, 72)),
        *(("int4_per_token_head", 128, 68), ("q8_0", 128, 136), ("q4_0", 128, 72), ("q5_1", 64, 48)),
        *(("q8_0", 0, 0), ("int8_per_token_head", 0, 0)),
    ],
)
def test_vectors_with_their_scales(name: str, dim: int, expected: int) -> None:
    assert KV_DTYPES[name].vector_bytes(dim) == expected


def test_names_of_cache_formats() -> None:
    assert parse_kv_dtype("auto", VLLM).name == "bfloat16"
    assert parse_kv_dtype("auto", LLAMA_CPP).name == "float16"
    assert parse_kv_dtype("FP8_E4M3", VLLM).name == "fp8"
    with pytest.raises(UsageError, match="did you mean 'fp8'"):
        parse_kv_dtype("fp9", VLLM)
    with pytest.raises(UsageError, match=r"llama.cpp has no such cache.*q8_0"):
        parse_kv_dtype("fp8", LLAMA_CPP)


layers_strategy = st.lists(
    st.builds(
        LayerState,
        kv_heads=st.sampled_from([0, 1, 2, 8]),
        key_dim=st.sampled_from([64, 128]),
        value_dim=st.sampled_from([64, 128]),
        window=st.sampled_from([0, 128, 4096]),
        conv=st.sampled_from([0, 300]),
        recurrent=st.sampled_from([0, 100_000]),
    ),
    min_size=1,
    max_size=12,
)


@given(layers_strategy, st.integers(1, 20_000), st.integers(1, 20_000))
def test_more_tokens_never_take_less(layers: list[LayerState], first: int, more: int) -> None:
    for kind in (BF16, KV_DTYPES["fp8"]):
        assert request_bytes(layers, first + more, kind) >= request_bytes(layers, first, kind)
        pool = vllm_pool(layers, kind)
        assert pool.request_pages(first + more) >= pool.request_pages(first)
        assert llama_cpp_cache(layers, kind, first + more).bytes >= llama_cpp_cache(layers, kind, first).bytes


@given(layers_strategy, st.integers(1, 20_000))
def test_engines_never_hold_less_than_the_arithmetic(layers: list[LayerState], context: int) -> None:
    exact = request_bytes(layers, context, BF16)
    assert vllm_pool(layers, BF16).bytes(context, 1) >= exact
    padded = sum(layer.tokens(context) * token_bytes(layer, BF16) for layer in layers)
    assert llama_cpp_cache(layers, BF16, context).bytes >= padded


@given(layers_strategy, st.sampled_from([1, 2, 4, 8]))
def test_devices_together_hold_at_least_everything(layers: list[LayerState], devices: int) -> None:
    for layer in layers:
        assert devices * token_bytes(layer, BF16, devices) >= token_bytes(layer, BF16)
        assert devices * constant_bytes(layer, 2, devices) >= constant_bytes(layer, 2)
