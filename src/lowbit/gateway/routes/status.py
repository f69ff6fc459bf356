"""How the gateway is: health, readiness, metrics, and the state that the web page shows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from aiohttp import ClientSession, web

from lowbit import __version__
from lowbit.gateway.engine_metrics import read_figures
from lowbit.gateway.policy import Snapshot
from lowbit.gateway.protocol import ModelInfo, PoolProtocol
from lowbit.gateway.state import STATE

__all__ = ["CLIENT", "ROUTES", "is_ready"]

CLIENT: web.AppKey[ClientSession] = web.AppKey("client", ClientSession)
"""The session that asks engines for their figures."""

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


async def health(request: web.Request) -> web.Response:
    """The gateway itself lives."""
    return web.json_response({"status": "ok"})


async def ready(request: web.Request) -> web.Response:
    """200 once every model can answer, 503 before."""
    if is_ready(request.app[STATE].pool):
        return web.json_response({"status": "ready"})
    return web.json_response({"status": "loading"}, status=503, headers={"Retry-After": "1"})


def is_ready(pool: PoolProtocol) -> bool:
    """Whether each model has a tier that answers, or one that is loaded when it is asked for."""
    snapshot = pool.snapshot()
    return all(_can_answer(model, snapshot) for model in pool.models())


def _can_answer(model: ModelInfo, snapshot: Snapshot) -> bool:
    healths = [snapshot.tiers[tier.id] for tier in model.tiers]
    if any(health.state == "ready" and health.circuit != "open" for health in healths):
        return True
    return all(health.state == "cold" and not health.pinned for health in healths)


async def metrics(request: web.Request) -> web.Response:
    """Figures for Prometheus."""
    state = request.app[STATE]
    figures = await read_figures(state.pool.engines(), request.app[CLIENT])
    return web.Response(body=state.metrics.render(figures), headers={"Content-Type": METRICS_TYPE})


async def status(request: web.Request) -> web.Response:
    """Models, tiers, memory and queues at this moment."""
    state = request.app[STATE]
    snapshot = state.pool.snapshot()
    engines = {engine.tier_id: engine for engine in state.pool.engines()}
    models = []
    for model in state.pool.models():
        queue = state.gate.queues.get(model.name)
        level = snapshot.levels.get(model.name)
        tiers = []
        for tier in model.tiers:
            engine = engines.get(tier.id)
            tiers.append(
                {
                    **dataclasses.asdict(tier),
                    **_finite(dataclasses.asdict(snapshot.tiers[tier.id])),
                    "planned": tier.memory,
                    "gpu_planned": tier.gpu_memory,
                    "resident": (engine.resident_bytes or None) if engine else None,
                    "restarts": engine.restarts if engine else 0,
                }
            )
        models.append(
            {
                "name": model.name,
                "kind": model.kind,
                "level": level.index if level else 0,
                "queued": queue.waiting if queue else 0,
                "tiers": tiers,
            }
        )
    return web.json_response(
        {
            "version": __version__,
            "ready": is_ready(state.pool),
            "memory": snapshot.memory,
            "memory_budget": snapshot.memory_budget,
            "gpus": [
                {"memory": held, "memory_budget": budget}
                for held, budget in zip_longest(snapshot.held[1:], snapshot.gpu_budgets, fillvalue=0)
            ],
            "tokens": state.metrics.total_tokens(),
            "models": models,
        }
    )


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


ROUTES: Mapping[tuple[str, str], Any] = {
    ("GET", "/health"): health,
    ("GET", "/ready"): ready,
    ("GET", "/metrics"): metrics,
    ("GET", "/status"): status,
}
