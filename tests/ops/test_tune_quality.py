"""What a quantized KV cache costs, measured on the real engine: nothing for the same cache, more for fewer bits."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lowbit.ops.bench.engine import prepare_models
from lowbit.ops.bench.prompts import source_text
from lowbit.ops.tune.quality import cache_divergence

pytest.importorskip("xllamacpp")


@pytest.mark.slow
def test_fewer_bits_of_cache_cost_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))

    async def scenario() -> list[float]:
        (default,), (coarse,) = [
            await prepare_models([("demo", None)], context=512, concurrency=1, threads=1, kv_dtype=kv_dtype, quiet=True)
            for kv_dtype in (None, "q4_0")
        ]
        text = source_text()
        return [await cache_divergence(default, other, text) for other in (default, coarse)]

    same, coarse = asyncio.run(scenario())
    assert same == pytest.approx(0.0, abs=1e-6)
    assert coarse > 1e-4
