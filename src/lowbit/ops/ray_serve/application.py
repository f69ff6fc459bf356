"""The application: engines as deployments, and the gateway as one more that finds them through the bridge."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping
from typing import Any

from aiohttp import web

from lowbit.gateway.config import ServeConfig
from lowbit.gateway.launch import TierFacts, TierPlan
from lowbit.ops.ray_cluster import NAMESPACE
from lowbit.ops.ray_serve.bridge import Ask, Bridge, ReplicaLostError
from lowbit.ops.ray_serve.layout import Deployed, bridged_config, deployments, options_of
from lowbit.ops.ray_serve.replica import EngineAwayError, EngineReplica, Head

__all__ = ["APPLICATION", "GatewayReplica", "run_application"]

APPLICATION = NAMESPACE
"""Name of the application in Ray Serve."""

_GATEWAY = "gateway"
_ROUTER = "lowbit.ops.ray_serve.router.PrefixRouter"


class GatewayReplica:
    """The gateway in the cluster: a Ray Serve replica that listens at the configuration's own address."""

    def __init__(
        self, config: dict[str, Any], tiers: list[Deployed], facts: dict[str, TierFacts], handles: dict[str, Any]
    ) -> None:
        self._config, self._tiers, self._facts, self._handles = config, tiers, facts, handles
        self._serving: asyncio.Task[None] | None = None
        self._address: asyncio.Future[tuple[str, int]] | None = None
        self._bridge: Bridge | None = None

    async def check_health(self) -> None:
        """Raise when the gateway has ended, so that Ray starts another."""
        if self._serving is None:
            self._address = asyncio.get_running_loop().create_future()
            self._serving = asyncio.create_task(self._serve(self._address))
        if self._serving.done():
            raise RuntimeError(f"the gateway ended: {self._serving.exception()}")

    async def address(self) -> tuple[str, int]:
        """Where it listens, once it does."""
        await self.check_health()
        assert self._address is not None
        return await self._address

    async def retried(self) -> int:
        """Requests that went to a second replica because the first was lost before it answered."""
        return 0 if self._bridge is None else self._bridge.retried

    async def _serve(self, address: asyncio.Future[tuple[str, int]]) -> None:
        from lowbit.gateway.app import make_app, serve
        from lowbit.gateway.launch import plan_tiers
        from lowbit.gateway.pool import Pool

        self._bridge = Bridge({tier.name: _asking(self._handles[tier.name]) for tier in self._tiers})
        runner = web.AppRunner(self._bridge.app, access_log=None)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
            host, port = runner.addresses[0][:2]
            config = bridged_config(ServeConfig.model_validate(self._config), self._tiers, f"http://{host}:{port}")
            pool = Pool(config, plan_tiers(config, self._facts), memory_budget=0)
            app = make_app(pool, config)
            await serve(app, listening=lambda where, number: address.set_result((where, number)))
        except Exception as error:
            if not address.done():
                address.set_exception(error)
            raise
        finally:
            await runner.cleanup()


def _asking(handle: Any) -> Ask:
    """How the bridge asks the replicas behind ``handle``."""
    from ray.exceptions import RayError, RayTaskError

    stream = handle.options(method_name="answer", stream=True)

    async def ask(
        method: str, path: str, body: bytes, headers: Mapping[str, str], affinity: str, avoid: Collection[str]
    ) -> AsyncIterator[Head | bytes]:
        answer = stream.remote(method, path, body, dict(headers), affinity, tuple(avoid))
        try:
            async for part in answer:
                yield part
        except RayTaskError as error:
            if isinstance(error.cause, EngineAwayError):
                replica, reason = error.cause.args
                raise ReplicaLostError(f"an engine was lost: {reason}", replica) from error
            raise
        except RayError as error:
            # the actor, its worker, its node, or the object that held a piece of the answer
            raise ReplicaLostError(f"a replica was lost: {str(error).splitlines()[0]}") from error
        finally:
            answer.cancel()  # the client may have left in mid-answer

    return ask


def run_application(
    config: ServeConfig, plans: Mapping[str, TierPlan], facts: Mapping[str, TierFacts]
) -> tuple[str, int]:
    """Deploy and wait until the gateway listens; returns its address. The cluster must be joined already."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig
    from ray.serve.handle import DeploymentHandle

    tiers = deployments(config, plans)
    engine = serve.deployment(EngineReplica)
    bound = {
        tier.name: engine.options(
            request_router_config=RequestRouterConfig(request_router_class=_ROUTER), **options_of(tier)
        ).bind(tier.spec)
        for tier in tiers
    }
    gateway = serve.deployment(GatewayReplica).options(
        name=_GATEWAY,
        num_replicas=1,
        health_check_period_s=2.0,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
    )
    handle: DeploymentHandle = serve.run(
        gateway.bind(config.model_dump(), tiers, dict(facts), bound), name=APPLICATION, route_prefix=None
    )
    host, port = handle.address.remote().result(timeout_s=120)
    return str(host), int(port)
