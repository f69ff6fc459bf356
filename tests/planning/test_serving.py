"""Engine formulas: llama.cpp's own log lines, searches, shared memory, rules of thumb, and the choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.checkpoint import ModelDescription
from lowbit.checkpoint.layers import LayerState
from lowbit.planning.choice import Candidate, Measured, choose, expected_loss
from lowbit.planning.kv_dtypes import KV_DTYPES
from lowbit.planning.serving import (
    GIB,
    MIB,
    Load,
    Served,
    largest,
    largest_concurrency,
    largest_context,
    llama_cpp_memory,
    shared_memory,
    shm_advice,
    vllm_memory,
)
from lowbit.planning.thumb import select_bits, thumb_weights

F16 = KV_DTYPES["float16"]


def model(
    hidden: int = 512,
    ffn: int = 1024,
    heads: int = 8,
    head_dim: int = 64,
    vocab: int = 2000,
    experts: int = 0,
    used: int = 0,
) -> Served:
    shape = ModelDescription(
        architecture="LlamaForCausalLM",
        model_type="llama",
        hidden=hidden,
        layers=6,
        heads=heads,
        kv_heads=2,
        head_dim=head_dim,
        vocab=vocab,
        ffn=ffn,
        tied=True,
        max_positions=32768,
        dtype="float16",
        experts=experts,
        experts_per_token=used,
        expert_ffn=ffn if experts else 0,
    )
    return Served(shape, (LayerState(kv_heads=2, key_dim=head_dim, value_dim=head_dim),) * 6, weights=100 * MIB)


# (shape, context, slots, MiB): compute buffers that llama.cpp 2026.10 logged for random models, 512 tokens a batch.
COMPUTE = [
    ({"ffn": 1024}, 512, 1, 11.52),
    ({"ffn": 2048}, 512, 1, 17.52),
    ({"ffn": 4096}, 512, 1, 29.52),
    ({"hidden": 256, "ffn": 4096}, 512, 1, 27.02),
    ({"hidden": 1024, "ffn": 4096}, 512, 1, 34.52),
    ({"hidden": 2048, "ffn": 4096}, 512, 1, 44.52),
    ({"heads": 16, "ffn": 4096}, 512, 1, 29.52),
    ({"ffn": 1024, "experts": 8, "used": 2}, 512, 1, 17.52),
    ({"ffn": 1024, "experts": 8, "used": 4}, 512, 1, 29.52),
    ({"ffn": 256, "experts": 64, "used": 8}, 512, 1, 17.52),
    ({"ffn": 512, "vocab": 100_000}, 256, 64, 29.68),
    ({"ffn": 512, "vocab": 100_000}, 256, 256, 102.92),
    ({"hidden": 1024, "ffn": 4096, "vocab": 32_000}, 8192, 1, 42.02),
    ({"hidden": 2048, "ffn": 8192, "vocab": 32_000}, 2048, 4, 70.02),
]


@pytest.mark.parametrize(("shape", "context", "slots", "logged"), COMPUTE)
def test_llama_cpp_compute_buffers(shape: dict[str, int], context: int, slots: int, logged: float) -> None:
    served = model(**shape)
    found = llama_cpp_memory(served, Load(context, slots, F16, 512, gpu=False)).parts["activations"]
    output = 4 * slots * served.shape.vocab
    assert (found - output) / MIB == pytest.approx(logged, abs=0.03)


SMALL = {"hidden": 256, "ffn": 512, "heads": 4}
WIDE = {"hidden": 2048, "ffn": 5632, "heads": 32, "vocab": 32_000}
# Resident MiB of a process of `lowbit serve` after prompts in every slot (benchmarks/memory.py): MiB of weights with
# their copies, shape, blocks, KV heads, merges of the vocabulary, context, slots.
RESIDENT = [
    (1.7, SMALL | {"vocab": 2048}, 2, 2, 44, 512, 1, 40.3),
    (1.7, SMALL | {"vocab": 2048}, 2, 2, 44, 512, 16, 54.0),
    (1.7, SMALL | {"vocab": 2048}, 2, 2, 44, 512, 32, 65.5),
    (9.5, SMALL | {"vocab": 32_000}, 2, 2, 44, 512, 16, 73.6),
    (34.5, SMALL | {"vocab": 128_256}, 2, 2, 44, 512, 1, 92.9),
    (34.5, SMALL | {"vocab": 128_256}, 2, 2, 44, 512, 16, 140.2),
    (34.5, SMALL | {"vocab": 128_256}, 2, 2, 44, 512, 32, 183.2),
    (3.3, SMALL | {"vocab": 8000}, 2, 2, 7742, 512, 4, 48.3),
    (17.8, SMALL | {"vocab": 64_000}, 2, 2, 63_742, 512, 1, 80.7),
    (17.8, SMALL | {"vocab": 64_000}, 2, 2, 63_742, 512, 4, 85.8),
    (9.5, SMALL | {"vocab": 32_000}, 2, 2, 0, 512, 4, 57.7),
    (1114.9, WIDE, 22, 4, 44, 2048, 4, 1382.9),
    (1114.9, WIDE, 22, 4, 44, 8192, 16, 4036.9),
    (1091.3, WIDE, 22, 4, 44, 512, 16, 1367.5),
]


@pytest.mark.parametrize(("file", "shape", "blocks", "kv_heads", "merges", "context", "slots", "resident"), RESIDENT)
def test_llama_cpp_resident_memory_within_5_percent(
    file: float,
    shape: dict[str, int],
    blocks: int,
    kv_heads: int,
    merges: int,
    context: int,
    slots: int,
    resident: float,
) -> None:
    layers = (LayerState(kv_heads=kv_heads, key_dim=64, value_dim=64),) * blocks
    served = Served(model(**shape).shape, layers, weights=int(file * MIB), merges=merges)
    found = llama_cpp_memory(served, Load(context, slots, F16, 512, gpu=False)).total / MIB
    assert found == pytest.approx(resident, rel=0.05)


def test_merges_that_are_not_known_count_as_many_as_tokens() -> None:
    load = Load(512, 1, F16, 512, gpu=False)
    known, unknown = (
        llama_cpp_memory(Served(model().shape, (), 0, merges=merges), load).total for merges in (2000, None)
    )
    assert known == unknown


def test_vllm_activations_of_published_logs() -> None:
    """Llama 3 8B with 2048 batched tokens: the log said 0.22 GiB."""
    served = model(hidden=4096, ffn=14336, heads=32, head_dim=128, vocab=128_256)
    parts = vllm_memory(served, Load(8192, 8, F16, 2048)).parts
    assert parts["activations"] / GIB == pytest.approx(0.22, rel=0.15)


# Resident MiB of vLLM's four CPU processes (0.32, PSS) with a prompt of three quarters of the context in every slot:
# (weights, embedding, tied), shape, blocks, KV heads, context, requests.
VLLM_CPU = [
    ((7.6, 1.0, True), {"hidden": 256, "ffn": 512, "heads": 4, "vocab": 2048}, 5, 2, 512, 1, 1487.6),
    ((203.8, 16.0, False), {"hidden": 1024, "ffn": 2816, "heads": 16, "vocab": 8192}, 8, 4, 2048, 4, 1942.3),
    ((203.8, 16.0, False), {"hidden": 1024, "ffn": 2816, "heads": 16, "vocab": 8192}, 8, 4, 512, 1, 1755.1),
    ((2098.2, 125.0, False), {"hidden": 2048, "ffn": 5632, "heads": 32, "vocab": 32_000}, 22, 4, 512, 1, 4042.9),
]


@pytest.mark.parametrize(("weights", "shape", "blocks", "kv_heads", "context", "requests", "resident"), VLLM_CPU)
def test_vllm_cpu_resident_memory_within_5_percent(
    weights: tuple[float, float, bool],
    shape: dict[str, int],
    blocks: int,
    kv_heads: int,
    context: int,
    requests: int,
    resident: float,
) -> None:
    size, embedding, tied = weights
    layers = (LayerState(kv_heads=kv_heads, key_dim=64, value_dim=64),) * blocks
    described = replace(model(**shape).shape, tied=tied)
    served = Served(described, layers, weights=int(size * MIB), embedding=int(embedding * MIB))
    load = Load(context, requests, KV_DTYPES["bfloat16"], 2048, gpu=False)
    assert vllm_memory(served, load).total / MIB == pytest.approx(resident, rel=0.05)


def test_what_two_devices_share() -> None:
    served = model()
    one, two = (vllm_memory(served, Load(4096, 8, F16, 2048, devices=devices)) for devices in (1, 2))
    assert two.parts["kv cache"] * 2 == pytest.approx(one.parts["kv cache"], rel=0.01)
    assert two.parts["engine"] > one.parts["engine"]


def test_the_token_table_stays_on_the_host() -> None:
    untied = model()
    load = Load(1024, 1, F16, 512)
    gpu = llama_cpp_memory(Served(untied.shape, untied.layers, 100 * MIB, embedding=10 * MIB), load)
    assert gpu.parts["weights"] == 100 * MIB  # tied: the copy that serves as output
    assert gpu.host > 10 * MIB


@given(st.integers(0, 500), st.integers(1, 600), st.sampled_from([1, 7, 64]))
def test_the_largest_that_fits(threshold: int, limit: int, step: int) -> None:
    expected = max((n for n in range(0, limit + 1, step) if n <= threshold), default=0)
    assert largest(lambda n: n <= threshold, limit, step) == expected


@pytest.mark.parametrize("engine", ["vllm", "llama.cpp"])
def test_largest_requests_and_context_fit_and_one_more_does_not(engine: str) -> None:
    served, load, budget = model(), Load(4096, 4, F16, 512), 2 * GIB
    formula = {"vllm": vllm_memory, "llama.cpp": llama_cpp_memory}[engine]
    most = largest_concurrency(engine, served, load, budget)
    assert formula(served, Load(4096, most, F16, 512)).total <= budget
    assert formula(served, Load(4096, most + 1, F16, 512)).total > budget
    longest = largest_context(engine, served, load, budget, 1 << 20)
    assert formula(served, Load(longest, 4, F16, 512)).total <= budget
    assert formula(served, Load(longest + 256, 4, F16, 512)).total > budget
    assert largest_concurrency(engine, served, load, 0) == 0


def test_shared_memory_grows_with_pairs_of_gpus() -> None:
    sizes = [shared_memory(gpus) for gpus in (1, 2, 4, 8)]
    assert sizes == sorted(sizes)
    assert [shm_advice(gpus) for gpus in (1, 2, 4, 8)] == [1, 1, 4, 16]


def test_rules_of_thumb() -> None:
    assert thumb_weights(70_000_000_000, 16) == 168_000_000_000
    assert select_bits(8, 4, 10, critical=False)[0] == 4
    assert select_bits(8, 4, 10, critical=True)[0] == 8
    assert select_bits(8, 4, 5, critical=True)[0] is None
    assert select_bits(8, 4, 3, critical=False)[0] is None


def candidate(scheme: str, bits: float, total: int, kv_bits: float = 16, measured: Measured | None = None) -> Candidate:
    return Candidate(scheme, bits, f"kv{kv_bits:.0f}", kv_bits, total, 100, measured)


BF16, INT8, INT4 = (
    candidate(name, bits, total) for name, bits, total in (("bf16", 16, 90), ("int8", 8, 60), ("int4", 4, 40))
)
LARGE = 8_000_000_000


def test_quality_decides() -> None:
    entries = [BF16, INT8, INT4]
    assert choose(entries, "high", LARGE).chosen is BF16
    assert choose(entries, "balanced", LARGE).chosen is INT4
    assert choose(entries, "balanced", LARGE).runner_up is INT8
    assert "not measured" in choose(entries, "balanced", LARGE).reasons["precision"]


def test_small_models_keep_more_bits() -> None:
    assert choose([BF16, INT8, INT4], "balanced", 1_000_000_000).chosen is INT8
    assert expected_loss(4, 1_000_000_000) > expected_loss(4, LARGE) > expected_loss(8, LARGE)


def test_measurements_count_before_expectations() -> None:
    bad = candidate("int4", 4, 40, measured=Measured("copy", "gptq", 0.2, 0.3))
    assert choose([BF16, INT8, bad], "balanced", LARGE).chosen is INT8
    good = candidate("int4", 4, 40, measured=Measured("copy", "gptq", 0.01, 0.01))
    chosen = choose([BF16, INT8, good], "balanced", 1_000_000_000)
    assert chosen.chosen is good
    assert "copy" in chosen.reasons["precision"]


def test_a_smaller_cache_only_where_it_must_be() -> None:
    full, small = candidate("int4", 4, 120), candidate("int4", 4, 70, kv_bits=8)
    choice = choose([full, small], "balanced", LARGE)
    assert choice.chosen is small
    assert "lack" in choice.reasons["kv cache"]
    assert choose([candidate("int4", 4, 80), small], "balanced", LARGE).chosen == candidate("int4", 4, 80)


def test_critical_use_that_only_4_bits_fit_is_told() -> None:
    choice = choose([candidate("bf16", 16, 200), candidate("int8", 8, 120), INT4], "high", LARGE)
    assert choice.chosen is INT4
    assert "costs more than the 2%" in choice.warnings[0]


def test_nothing_fits() -> None:
    choice = choose([candidate("bf16", 16, 200), candidate("int4", 4, 120)], "balanced", LARGE)
    assert choice.chosen is None
    assert choice.runner_up is not None
    assert choice.runner_up.missing == 20
