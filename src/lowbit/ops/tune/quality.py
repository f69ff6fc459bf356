"""What a quantized KV cache costs: the divergence of next-token distributions of two runs of the same model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lowbit.errors import UnsupportedError
from lowbit.ops.bench.client import session_for
from lowbit.ops.bench.engine import Model, running
from lowbit.ops.bench.prompts import TokenPrompts

if TYPE_CHECKING:
    from aiohttp import ClientSession

    from lowbit.ops.bench.engine import Running

__all__ = ["cache_divergence", "coarse_divergence"]

_TOP = 128
_POSITIONS = 48
_STRIDE = 8


def coarse_divergence(first: Mapping[int, float], second: Mapping[int, float]) -> float:
    """KL divergence in nats of two distributions over the tokens that both name, all others taken together.

    Arguments map token ids to log-probabilities. Merging outcomes never raises a divergence (data processing
    inequality), so this is a lower bound of the divergence over the whole vocabulary.
    """
    shared = first.keys() & second.keys()
    total = sum(math.exp(first[token]) * (first[token] - second[token]) for token in shared)
    rest = [max(0.0, 1.0 - sum(math.exp(each[token]) for token in shared)) for each in (first, second)]
    if rest[0] > 1e-12 and rest[1] > 1e-12:
        total += rest[0] * math.log(rest[0] / rest[1])
    return max(0.0, total)


async def cache_divergence(default: Model, changed: Model, text: str) -> float:
    """Mean divergence of ``changed`` from ``default`` after each of some prefixes of ``text``, in nats, at least.

    Raises :class:`UnsupportedError` where the engine gives no log-probabilities.
    """
    found = []
    for model in (default, changed):
        async with running(model, text) as engine, session_for(keep_alive=False) as session:
            if not isinstance(engine.prompts, TokenPrompts):
                raise UnsupportedError(f"{model.name}: its engine takes no token ids")
            ids = list(engine.prompts.ids[: _POSITIONS * _STRIDE + 1])
            found.append([await _next_token(session, engine, ids[:end]) for end in range(_STRIDE, len(ids), _STRIDE)])
    pairs = list(zip(*found, strict=True))
    return sum(coarse_divergence(first, second) for first, second in pairs) / len(pairs)


async def _next_token(session: ClientSession, engine: Running, ids: Sequence[int]) -> dict[int, float]:
    """Log-probabilities of the likeliest next tokens; the prefix is read from the cache, which is what is measured."""
    body = {
        "prompt": list(ids),
        "n_predict": 1,
        "n_probs": _TOP,
        "temperature": 0.0,
        "cache_prompt": True,
        "stream": False,
    }
    async with session.post(
        f"{engine.target.url}/completion", json=body, headers=dict(engine.target.headers)
    ) as response:
        data = await response.read()
        if response.status != 200:
            raise UnsupportedError(f"{engine.target.model}: no log-probabilities (status {response.status})")
    entry: Mapping[str, Any] = json.loads(data)["completion_probabilities"][0]
    return {int(each["id"]): float(each["logprob"]) for each in entry["top_logprobs"]}
