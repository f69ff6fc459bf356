"""The figures that engines publish in their own words, under one name each.

Names as of llama.cpp's server (``llamacpp:``) and vLLM 0.33 (``vllm:``; ``gpu_cache_usage_perc`` in older ones).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from aiohttp import ClientError, ClientSession, ClientTimeout
from prometheus_client.parser import text_string_to_metric_families

from lowbit.gateway.protocol import EngineInfo

__all__ = ["EngineFigures", "parse_figures", "read_figures"]


@dataclass(frozen=True, slots=True)
class EngineFigures:
    """What one engine says of itself; None for what it does not tell."""

    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    prompt_tokens: float | None = None
    generated_tokens: float | None = None


_NAMES = {
    "llamacpp:requests_processing": "running",
    "llamacpp:requests_deferred": "waiting",
    "llamacpp:kv_cache_usage_ratio": "kv_usage",
    "llamacpp:prompt_tokens_total": "prompt_tokens",
    "llamacpp:tokens_predicted_total": "generated_tokens",
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:gpu_cache_usage_perc": "kv_usage",
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generated_tokens",
}
"""An engine's name to the field of :class:`EngineFigures`; several series (one per replica) add up, shares average."""

_TIMEOUT = ClientTimeout(total=2.0)


def parse_figures(text: str) -> EngineFigures:
    """Figures from an engine's ``/metrics``. Raises :class:`ValueError` for text that is no such thing."""
    found: dict[str, list[float]] = {field.name: [] for field in fields(EngineFigures)}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in _NAMES:
                found[_NAMES[sample.name]].append(sample.value)
    values = {name: sum(each) for name, each in found.items() if each}
    if "kv_usage" in values:
        values["kv_usage"] /= len(found["kv_usage"])
    return EngineFigures(**values)


async def read_figures(engines: Sequence[EngineInfo], session: ClientSession) -> Mapping[str, EngineFigures]:
    """Ask all engines at once; one that does not answer in two seconds, or answers nonsense, has no entry."""

    async def read(engine: EngineInfo) -> EngineFigures | None:
        try:
            async with session.get(
                f"{engine.base_url}/metrics", headers=engine.headers, timeout=_TIMEOUT, allow_redirects=False
            ) as response:
                text = await response.read()
                return parse_figures(text.decode()) if response.status == 200 else None
        except (ClientError, asyncio.TimeoutError, OSError, ValueError):
            return None

    answers = await asyncio.gather(*map(read, engines))
    return {engine.tier_id: figures for engine, figures in zip(engines, answers, strict=True) if figures is not None}
