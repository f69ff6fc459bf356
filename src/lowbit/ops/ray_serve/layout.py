"""What each tier asks of the cluster, as data: replicas, processors, GPUs and how they have to lie together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.engines.process import EngineSpec
from lowbit.errors import UsageError
from lowbit.gateway.config import ReplicasConfig, ServeConfig, TierConfig
from lowbit.gateway.launch import TierPlan

__all__ = ["Deployed", "bridged_config", "deployments", "options_of"]


@dataclass(frozen=True, slots=True)
class Deployed:
    """A tier as a deployment: how its engine is started, how many of it, and what each needs.

    ``bundles`` are the parts of a placement group, one for each GPU of a tensor- or pipeline-parallel engine; tensor
    parallelism wants them on one node (``STRICT_PACK``), pipelines of several stages may span nodes (``PACK``).
    """

    tier_id: str
    spec: EngineSpec
    replicas: ReplicasConfig
    concurrency: int
    cpus: float
    gpus: int = 0
    bundles: tuple[Mapping[str, float], ...] = ()
    strategy: str = "STRICT_PACK"

    @property
    def name(self) -> str:
        """The deployment's name: Ray takes no ``@`` or ``/``."""
        return self.tier_id.replace("@", "--").replace("/", "__")


def deployments(config: ServeConfig, plans: Mapping[str, TierPlan]) -> list[Deployed]:
    """The tiers that the cluster runs, in the configuration's order; tiers with a ``url`` stay where they are."""
    found = []
    for name, model in config.models.items():
        for tier in model.tiers:
            plan = plans[f"{name}@{tier.name}"]
            if tier.nodes:
                reason = "Ray places parallel engines itself"
                raise UsageError(f"{name}@{tier.name}: nodes are for machines without Ray: {reason}, leave nodes out")
            if plan.spec is not None:
                found.append(_deployed(tier, plan, plan.spec))
    if not found:
        raise UsageError("--ray: every tier has a url, so there is nothing for the cluster to run: leave --ray out")
    return found


def _deployed(tier: TierConfig, plan: TierPlan, spec: EngineSpec) -> Deployed:
    tensor, pipeline = tier.flags.tensor_parallel or 1, tier.flags.pipeline_parallel or 1
    given = tier.flags.tensor_parallel or tier.flags.pipeline_parallel or tier.gpus
    on_processor = plan.facts.engine in ("llama.cpp", "encoder") or (tier.command is not None and not given)
    gpus = 0 if on_processor else tensor * pipeline
    threads = float(_threads(spec))
    bundles: tuple[Mapping[str, float], ...] = ()
    if gpus > 1:
        bundles = ({"CPU": 1.0, "GPU": 1.0},) * gpus
    return Deployed(
        plan.policy.id,
        spec,
        tier.replicas,
        tier.concurrency,
        cpus=1.0 if gpus else threads,
        gpus=gpus,
        bundles=bundles,
        strategy="PACK" if pipeline > 1 else "STRICT_PACK",
    )


def _threads(spec: EngineSpec) -> int:
    command = list(spec.command)
    for flag in ("--threads", "-t"):
        if flag in command[:-1]:
            return max(1, int(command[command.index(flag) + 1]))
    return 1


def options_of(deployed: Deployed) -> dict[str, Any]:
    """The options of Ray Serve's ``deployment``: scaling on the requests that each replica has under way."""
    replicas = deployed.replicas
    actor: dict[str, Any] = {"num_cpus": deployed.cpus}
    options: dict[str, Any] = {
        "name": deployed.name,
        "max_ongoing_requests": max(deployed.concurrency, 1) * 2,
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 10.0,
        "graceful_shutdown_timeout_s": 30.0,
        "ray_actor_options": actor,
    }
    if deployed.bundles:
        options["placement_group_bundles"] = [dict(bundle) for bundle in deployed.bundles]
        options["placement_group_strategy"] = deployed.strategy
    elif deployed.gpus:
        actor["num_gpus"] = deployed.gpus
    if replicas.max > replicas.min:
        options["autoscaling_config"] = {
            "min_replicas": replicas.min,
            "max_replicas": replicas.max,
            "target_ongoing_requests": replicas.target or deployed.concurrency,
            "upscale_delay_s": 5.0,
            "downscale_delay_s": 120.0,
        }
    else:
        options["num_replicas"] = replicas.min
    return options


def bridged_config(config: ServeConfig, tiers: list[Deployed], bridge: str) -> ServeConfig:
    """The configuration as the gateway in the cluster sees it: what runs there is reached through ``bridge``."""
    deployed = {tier.tier_id: tier for tier in tiers}
    models = {}
    for name, model in config.models.items():
        moved = []
        for tier in model.tiers:
            here = deployed.get(f"{name}@{tier.name}")
            if here is None:
                moved.append(tier)
                continue
            moved.append(
                tier.model_copy(
                    update={
                        "path": None,
                        "command": None,
                        "quantize": None,
                        "engine": "openai",
                        "url": f"{bridge}/{here.name}",
                        "concurrency": tier.concurrency * here.replicas.max,
                    }
                )
            )
        # One lost replica cuts off as many streams as it had: that must not look like a whole deployment failing.
        failures = max(model.policy.failures, 1 + max(tier.concurrency for tier in moved))
        policy = model.policy.model_copy(update={"failures": failures})
        models[name] = model.model_copy(update={"tiers": moved, "policy": policy})
    return config.model_copy(update={"models": models})
