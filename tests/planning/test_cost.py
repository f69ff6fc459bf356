"""Cost: hand-worked counts, and how the prediction moves with the work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lowbit.formats import IntSpec
from lowbit.planning import PlannedModule, Workload, predict
from lowbit.planning.cost import BASE_BYTES, disk_bytes, output_bytes

WORK = Workload(samples=32, seq_len=512, hidden=2048, heads=32, head_dim=64)
RATE = 1e11


def llama(
    layers: int = 1, method: str = "gptq", hidden: int = 2048, ffn: int = 5632, kv: int = 256
) -> list[PlannedModule]:
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    return [
        PlannedModule(f"model.layers.{i}.{name}", shape, IntSpec(4), method)
        for i in range(layers)
        for name, shape in shapes.items()
    ]


def groups(layers: int = 1) -> list[tuple[str, ...]]:
    shards = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
    return [tuple(f"model.layers.{i}.{name}" for name in names) for i in range(layers) for names in shards]


def test_statistics_are_counted_once_per_input() -> None:
    seconds = predict(llama(), groups(), WORK, RATE).seconds
    tokens = 32 * 512
    assert seconds["statistics"] == pytest.approx(tokens * (3 * 2048**2 + 5632**2) / RATE)
    assert seconds["factorise"] == pytest.approx((3 * 2048**3 + 5632**3) / (0.4 * RATE))
    apart = predict(llama(), [], WORK, RATE).seconds
    assert apart["statistics"] == pytest.approx(tokens * (6 * 2048**2 + 5632**2) / RATE)


def test_time_grows_with_blocks_and_shrinks_with_the_rate() -> None:
    one = predict(llama(1), groups(1), WORK, RATE)
    many = predict(llama(22), groups(22), WORK, RATE)
    for part, value in one.seconds.items():
        assert many.seconds[part] == pytest.approx(value if part == "start" else 22 * value)
    assert many.memory == one.memory
    assert predict(llama(1), groups(1), WORK, 2 * RATE).total_seconds < one.total_seconds


def test_methods_differ_as_they_should() -> None:
    rtn, gptq, awq = (predict(llama(method=m), groups(), WORK, RATE) for m in ("rtn", "gptq", "awq"))
    assert rtn.total_seconds < gptq.total_seconds < awq.total_seconds
    assert rtn.scratch == 0
    assert rtn.seconds["forward"] == rtn.seconds["statistics"] == 0
    assert "activations" not in rtn.memory
    assert gptq.scratch == 2 * 32 * 512 * 2048 * 4
    unknown = predict(llama(method="new"), groups(), WORK, RATE)
    assert unknown.total_seconds >= awq.total_seconds


def test_memory_of_the_1b_and_8b_shapes_is_bounded() -> None:
    small = predict(llama(22), groups(22), WORK, RATE)
    assert BASE_BYTES < small.peak_bytes < 3 * 2**30
    assert small.memory["statistics"] == int(2.5 * 4 * 5632**2)
    large = Workload(32, 512, 4096, heads=32, head_dim=128, keep_states=False)
    prediction = predict(llama(32, hidden=4096, ffn=14336, kv=1024), groups(32), large, RATE)
    assert prediction.peak_bytes < 6 * 2**30


# Highest resident MiB of `lowbit quantize` with 32 x 512 tokens (benchmarks/memory.py, benchmarks/quantize.py): method,
# hidden, ffn, key-value width, blocks, whether states were kept.
PEAKS = [
    ("rtn", 256, 512, 128, 5, True, 548),
    ("gptq", 256, 512, 128, 5, True, 702),
    ("awq", 256, 512, 128, 5, True, 613),
    ("rtn", 2048, 5632, 256, 1, True, 922),
    ("gptq", 2048, 5632, 256, 1, True, 2533),
    ("gptq", 2048, 5632, 256, 3, True, 2578),
    ("awq", 2048, 5632, 256, 1, True, 2268),
    ("gptq", 4096, 14336, 1024, 1, True, 6726),
    ("gptq", 4096, 14336, 1024, 1, False, 5102),
]


@pytest.mark.parametrize(("method", "hidden", "ffn", "kv", "blocks", "kept", "measured"), PEAKS)
def test_peaks_that_were_measured(
    method: str, hidden: int, ffn: int, kv: int, blocks: int, kept: bool, measured: int
) -> None:
    work = Workload(32, 512, hidden, heads=hidden // 64, head_dim=64, keep_states=kept)
    modules = llama(blocks, method, hidden, ffn, kv)
    assert predict(modules, groups(blocks), work, RATE).peak_bytes / 2**20 == pytest.approx(measured, rel=0.1)


def test_keeping_states_costs_memory_and_saves_time() -> None:
    kept = predict(llama(), groups(), WORK, RATE)
    again = predict(llama(), groups(), replace(WORK, keep_states=False), RATE)
    assert kept.peak_bytes > again.peak_bytes
    assert kept.seconds["forward"] < again.seconds["forward"]


def test_experts_see_their_share_of_tokens() -> None:
    expert = PlannedModule("model.layers.0.mlp.experts.0.down_proj", (64, 128), IntSpec(4, 32), "gptq")
    dense = PlannedModule("model.layers.0.mlp.down_proj", (64, 128), IntSpec(4, 32), "gptq")
    work = replace(WORK, experts=8, experts_per_token=2)
    ratio = (
        predict([expert], [], work, RATE).seconds["statistics"] / predict([dense], [], work, RATE).seconds["statistics"]
    )
    assert ratio == pytest.approx(2 / 8)


def test_disk() -> None:
    modules = [*llama(), PlannedModule("lm_head", (100, 64))]
    size = output_bytes(modules, dense_bytes=10, dense_itemsize=2)
    assert size == int(sum(m.weights for m in llama()) * 4.125 / 8) + 12800 + 10
    assert disk_bytes(size, predict(llama(), groups(), WORK, RATE)) == 2 * size + 2 * 32 * 512 * 2048 * 4
