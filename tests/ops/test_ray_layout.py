"""What a cluster is asked for, and where a prompt belongs: the parts that need no Ray."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import UsageError
from lowbit.gateway.config import ServeConfig, parse_config
from lowbit.gateway.launch import TierFacts, plan_tiers
from lowbit.ops.ray_serve.affinity import affinity_of, home_of, order
from lowbit.ops.ray_serve.bridge import Bridge, ReplicaLostError
from lowbit.ops.ray_serve.layout import bridged_config, deployments, options_of
from lowbit.ops.ray_serve.replica import Head


def config(**tier: object) -> ServeConfig:
    tiers = [{"name": "int4", "path": "m.gguf", **tier}, {"name": "far", "url": "http://elsewhere:1"}]
    return parse_config({"models": {"m": {"tiers": tiers}}})


def facts(engine: str = "llama.cpp") -> dict[str, TierFacts]:
    return {"m@int4": TierFacts(engine, "m.gguf", 1 << 30, kl=0.02), "m@far": TierFacts("openai")}


def test_a_tier_becomes_a_deployment_with_its_threads_as_processors() -> None:
    serving = config(replicas={"min": 1, "max": 4}, concurrency=8, flags={"threads": 6})
    (tier,) = deployments(serving, plan_tiers(serving, facts()))
    options = options_of(tier)
    assert (tier.name, tier.cpus, tier.gpus) == ("m--int4", 6.0, 0)
    scaling = options["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (1, 4, 8)
    assert "num_replicas" not in options


@pytest.mark.parametrize(("tensor", "pipeline", "strategy"), [(4, None, "STRICT_PACK"), (2, 2, "PACK")])
def test_a_parallel_engine_gets_a_placement_group(tensor: int, pipeline: int | None, strategy: str) -> None:
    flags = {"tensor_parallel": tensor, "pipeline_parallel": pipeline}
    serving = config(engine="vllm", flags=flags, replicas=2)
    (tier,) = deployments(serving, plan_tiers(serving, facts("vllm")))
    options = options_of(tier)
    assert options["placement_group_bundles"] == [{"CPU": 1.0, "GPU": 1.0}] * 4
    assert options["placement_group_strategy"] == strategy
    assert options["num_replicas"] == 2
    assert "num_gpus" not in options["ray_actor_options"]


def test_a_command_asks_for_gpus_only_where_it_says_so() -> None:
    tier = {"name": "own", "command": ["engine", "--port", "{port}"], "engine": "openai"}
    for flags, gpus in (({}, 0), ({"tensor_parallel": 2}, 2)):
        serving = parse_config({"models": {"m": {"tiers": [{**tier, "flags": flags}]}}})
        (deployed,) = deployments(serving, plan_tiers(serving, {"m@own": TierFacts("openai")}))
        assert (deployed.gpus, deployed.cpus) == (gpus, 1.0)


def test_machines_without_ray_are_no_cluster_of_it() -> None:
    serving = config(engine="vllm", flags={"tensor_parallel": 2}, nodes=["10.0.0.1", "10.0.0.2"])
    with pytest.raises(UsageError, match="leave nodes out"):
        deployments(serving, plan_tiers(serving, facts("vllm")))


def test_the_gateway_sees_the_cluster_as_an_engine_with_the_certificate_kept() -> None:
    serving = config(replicas={"min": 1, "max": 3}, concurrency=4)
    tiers = deployments(serving, plan_tiers(serving, facts()))
    seen = bridged_config(serving, tiers, "http://127.0.0.1:9")
    inside, outside = seen.models["m"].tiers
    assert (inside.url, inside.path, inside.concurrency) == ("http://127.0.0.1:9/m--int4", None, 12)
    assert seen.models["m"].policy.failures == 13, "one lost replica's streams do not open the circuit"
    assert outside.url == "http://elsewhere:1"
    plans = plan_tiers(seen, facts())
    assert plans["m@int4"].policy.kl == 0.02
    assert plans["m@int4"].spec is None


def test_nothing_to_run_is_said() -> None:
    serving = parse_config({"models": {"m": {"tiers": [{"name": "far", "url": "http://elsewhere:1"}]}}})
    with pytest.raises(UsageError, match="nothing for the cluster"):
        deployments(serving, plan_tiers(serving, {"m@far": TierFacts("openai")}))


@pytest.mark.parametrize("replicas", [0, {"min": 3, "max": 2}, {"min": 1, "max": 0}, {"most": 2}])
def test_impossible_replicas_are_refused(replicas: object) -> None:
    with pytest.raises(UsageError, match=r"replicas"):
        config(replicas=replicas)


NAMES = st.sets(st.text("abcdef", min_size=1, max_size=4), min_size=2, max_size=8)


@given(NAMES, st.text(max_size=8))
def test_only_prompts_of_a_lost_replica_move(names: set[str], affinity: str) -> None:
    replicas = sorted(names)
    home = home_of(affinity, replicas)
    for lost in replicas:
        if lost != home:
            assert home_of(affinity, [name for name in replicas if name != lost]) == home


def test_homes_are_spread_evenly() -> None:
    counts = Counter(home_of(str(number), ["a", "b", "c", "d"]) for number in range(4000))
    assert all(850 < count < 1150 for count in counts.values())


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 20)), st.text(max_size=4))
def test_every_replica_can_be_reached_and_an_overloaded_home_is_passed_over(
    lengths: dict[str, int], affinity: str
) -> None:
    ranks = order(affinity, lengths, slack=4, rng=random.Random(1))
    assert {name for rank in ranks for name in rank} == set(lengths)
    if lengths and affinity and lengths[home_of(affinity, sorted(lengths))] > min(lengths.values()) + 4:
        assert len(ranks) == 2


def test_a_conversation_keeps_its_home_as_it_grows() -> None:
    first = b'{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]}'
    later = first.replace(b'"a"}]', b'"a"}, {"role": "assistant", "content": "b"}]')
    assert affinity_of(first) == affinity_of(later) != ""
    assert affinity_of(b'{"prompt": "x"}') != affinity_of(b'{"prompt": "y"}')
    assert affinity_of(b"not json") == affinity_of(b"[]") == affinity_of(b"{}") == ""


class Replicas:
    """A deployment that loses the first ``lost`` replicas it asks, before or after their first words."""

    def __init__(self, lost: int, *, late: bool = False, stream: bool = False) -> None:
        self.lost, self.late, self.asked = lost, late, 0
        self.kind = "text/event-stream" if stream else "application/json"

    async def __call__(
        self, method: str, path: str, body: bytes, headers: Mapping[str, str], affinity: str, avoid: Collection[str]
    ) -> AsyncIterator[Head | bytes]:
        assert set(avoid) == {f"r{number}" for number in range(1, self.asked + 1)}
        self.asked += 1
        dies = self.asked <= self.lost
        if dies and not self.late:
            raise ReplicaLostError("gone", f"r{self.asked}")
        yield Head(200, {"content-type": self.kind})
        yield f"{method} {path} ".encode()
        if dies:
            raise ReplicaLostError("gone", f"r{self.asked}")
        yield body


async def through(replicas: Replicas) -> tuple[int, str]:
    bridge = Bridge({"m": replicas})
    runner = web.AppRunner(bridge.app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        url = f"http://{host}:{port}/m/v1/x?y=1"
        async with aiohttp.ClientSession() as session, session.post(url, data=b"hello") as response:
            return response.status, await response.text()
    finally:
        await runner.cleanup()


def test_a_request_lost_before_its_first_word_goes_to_another_replica() -> None:
    replicas = Replicas(lost=2)
    assert asyncio.run(through(replicas)) == (200, "POST /v1/x?y=1 hello")
    assert replicas.asked == 3


def test_when_all_are_lost_the_gateway_is_told() -> None:
    status, text = asyncio.run(through(Replicas(lost=99)))
    assert status == 502
    assert "gone" in text


@pytest.mark.parametrize("stream", [False, True])
def test_a_whole_answer_is_asked_for_again_even_after_its_head(stream: bool) -> None:
    replicas = Replicas(lost=2, late=not stream, stream=stream)
    assert asyncio.run(through(replicas)) == (200, "POST /v1/x?y=1 hello")
    assert replicas.asked == 3


def test_a_stream_cut_off_in_the_middle_does_not_look_whole() -> None:
    with pytest.raises(aiohttp.ClientError):
        asyncio.run(through(Replicas(lost=1, late=True, stream=True)))
