"""Tensor-parallel degrees against hand-worked cases and a plain simulation of the split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.formats import IntSpec
from lowbit.planning import PlannedModule, tensor_parallel


def modules(ffn: int, hidden: int, kv: int, spec: IntSpec) -> list[PlannedModule]:
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    return [PlannedModule(f"model.layers.0.{name}", shape, spec) for name, shape in shapes.items()]


@pytest.mark.parametrize(
    ("ffn", "hidden", "heads", "kv_heads", "spec", "workable", "obstacle"),
    [
        # Llama 3.1 8B: 14336 / 16 = 896 = 7 groups of 128
        (14336, 4096, 32, 8, IntSpec(4, 128), (1, 2, 4, 8, 16), None),
        # Qwen2.5 7B: 28 heads; 18944 = 148 * 128, so 4 shards hold 37 groups each
        (18944, 3584, 28, 4, IntSpec(4, 128), (1, 2, 4), "28 attention heads are not divisible by 8"),
        # 1.1B Llama: 5632 = 44 * 128 stops at 4, with groups of 64 at 8
        (5632, 2048, 32, 4, IntSpec(4, 128), (1, 2, 4), "model.layers.0.mlp.down_proj: a shard of 704 input"),
        (5632, 2048, 32, 4, IntSpec(4, 64), (1, 2, 4, 8), "model.layers.0.mlp.down_proj: a shard of 352 input"),
        (5632, 2048, 32, 4, IntSpec(4, -1), (1, 2, 4, 8, 16), None),
        (1024, 512, 6, 6, IntSpec(4, 64), (1, 2), "6 attention heads are not divisible by 4"),
        (1024, 512, 16, 6, IntSpec(4, 64), (1, 2), "6 key-value heads neither divide 4"),
        (40, 512, 16, 16, IntSpec(4, -1), (1,), "gate_proj: a shard of 20 output features holds no whole 32-bit words"),
    ],
)
def test_known_models(
    ffn: int, hidden: int, heads: int, kv_heads: int, spec: IntSpec, workable: tuple[int, ...], obstacle: str | None
) -> None:
    plan = tensor_parallel(modules(ffn, hidden, hidden * kv_heads // heads, spec), heads, kv_heads)
    assert plan.workable == workable
    assert plan.largest == workable[-1]
    if obstacle is None:
        assert not plan.obstacles
    else:
        assert obstacle in plan.obstacles[min(plan.obstacles)]


def test_dense_modules_and_no_modules_do_not_limit() -> None:
    assert tensor_parallel([PlannedModule("a.down_proj", (3, 7))], 16, 16).largest == 16


@given(st.integers(1, 40), st.sampled_from([32, 64, 128]), st.sampled_from([2, 4, 8, 16]))
def test_groups_stay_whole_exactly_where_a_split_cuts_none(groups: int, size: int, degree: int) -> None:
    columns = list(range(groups * size))
    plan = tensor_parallel([PlannedModule("b.0.down_proj", (64, len(columns)), IntSpec(4, size))], 16, 16, (degree,))
    width = len(columns) / degree
    edges = [width * rank for rank in range(1, degree)]
    assert (degree in plan.workable) == all(edge % size == 0 for edge in edges)
