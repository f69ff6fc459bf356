"""The policy by simulation: directed scenarios of each rule, then thousands of random schedules."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import GIB, Engine, Ticket, World, make_policy, tier

from lowbit.gateway.learning import LoadStarted, Tick, initial, learn
from lowbit.gateway.policy import Load, Reject, Request, Route, Settings, TierPolicy
from lowbit.gateway.routing import decide, urgency

CHAT = Request("chat")
FAST = Settings(ttft=1.0, degrade_after=2.0, recover_after=5.0, dwell=4.0, max_dwell=64.0)


def two_tiers(budget: float = 10, settings: Settings | None = None, **facts: object) -> World:
    tiers = [tier("chat", "bf16", 4, **facts), tier("chat", "int4", 1, **facts)]
    return World(make_policy({"chat": tiers}, int(budget * GIB), settings))


def events(world: World, name: str) -> list[tuple[float, str]]:
    return [(time, tier_id) for time, event, tier_id in world.log if event == name]


# which tier


def test_preferred_tier_is_loaded_on_demand_and_answers() -> None:
    world = two_tiers()
    ticket = world.ask(1.0, CHAT)
    world.run(10)
    assert ticket.outcome == "answered@chat@bf16"
    assert events(world, "loading") == [(1.0, "chat@bf16")]


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (Request("chat", tier="int4"), "chat@int4"),
        (Request("chat", precision="high"), "chat@bf16"),
        (Request("chat", precision="medium"), "chat@int8"),
        (Request("chat", precision="low"), "chat@int4"),
        (Request("chat", memory_limit=2 * GIB), "chat@int8"),
        (Request("chat", memory_limit=GIB), "chat@int4"),
        (Request("chat", speed=True), "chat@int4"),
        (Request("chat"), "chat@bf16"),
    ],
)
def test_choice_by_name_and_requirement(request_: Request, answer: str) -> None:
    tiers = [tier("chat", "bf16", 4), tier("chat", "int8", 2), tier("chat", "int4", 1)]
    world = World(make_policy({"chat": tiers}, 10 * GIB))
    ticket = world.ask(0.0, request_)
    world.run(10)
    assert ticket.outcome == f"answered@{answer}"


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        (Request("chatt"), 404, "no model 'chatt'"),
        (Request("chat", tier="int3"), 404, "has no tier 'int3', only bf16, int4"),
        (Request("chat", memory_limit=1), 400, "smallest takes 1073741824"),
    ],
)
def test_what_cannot_be_is_refused_at_once_with_reasons(request_: Request, status: int, words: str) -> None:
    world = two_tiers()
    answer = decide(world.policy, world.snapshot, request_)
    assert isinstance(answer, Reject)
    assert answer.status == status
    assert words in answer.message


def test_precision_that_no_tier_has() -> None:
    policy = make_policy({"chat": [tier("chat", "int4")]}, GIB)
    answer = decide(policy, initial(policy, 0.0), Request("chat", precision="high"))
    assert isinstance(answer, Reject)
    assert answer.code == "precision_unavailable"


def test_a_tier_larger_than_the_budget_is_passed_over() -> None:
    world = two_tiers(budget=2)
    ticket = world.ask(0.0, CHAT)
    strict = world.ask(0.0, Request("chat", tier="bf16"))
    world.run(10)
    assert (ticket.outcome, strict.status) == ("answered@chat@int4", 503)


# fallback


def test_three_failures_open_the_circuit_and_each_request_is_answered_by_the_next_tier() -> None:
    world = two_tiers()
    world.engines["chat@bf16"].fails = True
    tickets = [world.ask(3.0 * n, CHAT) for n in range(6)]
    world.run(14.0)
    assert [time for time, _ in events(world, "circuit_opened")] == [pytest.approx(6.1)]
    world.run(30.0)
    assert {ticket.outcome for ticket in tickets} == {"answered@chat@int4"}
    assert [len(ticket.tried) for ticket in tickets] == [1, 1, 1, 0, 0, 0]


def test_a_probe_closes_the_circuit() -> None:
    world = two_tiers()
    world.engines["chat@bf16"].fails = True
    for n in range(3):
        world.ask(2.0 * n, CHAT)
    world.run(12.0)
    world.engines["chat@bf16"].fails = False
    later = [world.ask(20.0, CHAT) for _ in range(3)]
    world.run(40.0)
    assert len(events(world, "circuit_closed")) == 1
    assert sorted(str(ticket.outcome) for ticket in later) == ["answered@chat@bf16", *["answered@chat@int4"] * 2]
    world.ask(41.0, CHAT)
    assert world.run(50.0).tickets[-1].outcome == "answered@chat@bf16"


def test_a_failing_probe_doubles_the_cooldown() -> None:
    world = two_tiers()
    world.engines["chat@bf16"].fails = True
    for n in range(400):
        world.ask(1.0 * n, CHAT)
    world.run(420.0)
    opened = [time for time, _ in events(world, "circuit_opened")]
    gaps = [later - earlier for earlier, later in itertools.pairwise(opened)]
    assert gaps == pytest.approx([10, 20, 40, 80, 160], abs=1.2)
    assert {ticket.outcome for ticket in world.tickets} == {"answered@chat@int4"}


def test_success_between_failures_resets_the_count() -> None:
    world = two_tiers()
    for n in range(20):
        broken = n % 3 != 2
        world.at(2.0 * n - 0.01, lambda broken=broken: setattr(world.engines["chat@bf16"], "fails", broken))
        world.ask(2.0 * n, CHAT)
    world.run(60.0)
    assert events(world, "circuit_opened") == []


def test_an_engine_that_breaks_off_every_answer_is_found_out() -> None:
    world = two_tiers()
    world.engines["chat@bf16"].breaks_off = True
    for n in range(6):
        world.ask(3.0 * n, CHAT)
    world.run(40.0)
    outcomes = [ticket.outcome for ticket in world.tickets]
    assert outcomes == ["broken@chat@bf16"] * 3 + ["answered@chat@int4"] * 3


def test_a_tier_that_cannot_load_steps_down_at_once_and_is_tried_again_later() -> None:
    world = two_tiers()
    world.engines["chat@bf16"].refuses_load = True
    first = world.ask(0.0, CHAT)
    world.run(5.0)
    assert first.outcome == "answered@chat@int4"
    world.engines["chat@bf16"].refuses_load = False
    for n in range(40):
        world.ask(5.0 + n, CHAT)
    world.run(60.0)
    assert world.tickets[-1].outcome == "answered@chat@bf16"


def test_the_only_tier_crashes_under_load_and_every_request_is_still_answered() -> None:
    world = World(make_policy({"chat": [tier("chat", "int4", concurrency=50)]}, GIB))
    tickets = [world.ask(2.0, CHAT) for _ in range(50)]
    world.at(2.05, lambda: world.crash("chat@int4"))
    world.ask(0.0, CHAT)
    world.run(30.0)
    assert {ticket.outcome for ticket in tickets} == {"answered@chat@int4"}
    assert events(world, "circuit_opened") == []


def test_every_tier_failing_gives_502_or_503_with_a_time_to_come_back() -> None:
    world = two_tiers()
    for engine in world.engines.values():
        engine.fails = True
    tickets = [world.ask(2.0 * n, CHAT) for n in range(8)]
    world.run(30.0)
    assert {ticket.status for ticket in tickets} == {502, 503}


# degradation


def test_a_missed_objective_steps_down_and_climbs_back_when_pressure_ends() -> None:
    world = two_tiers(settings=FAST)
    world.engines["chat@bf16"].ttft = 3.0
    world.at(30.0, lambda: setattr(world.engines["chat@bf16"], "ttft", 0.1))
    for n in range(80):
        world.ask(1.0 * n, CHAT)
    world.run(90.0)
    assert events(world, "degraded")[0][1] == "chat@int4"
    assert events(world, "recovered")
    assert world.tickets[-1].outcome == "answered@chat@bf16"


def test_a_climb_that_fails_waits_longer_each_time() -> None:
    world = two_tiers(settings=FAST)
    world.engines["chat@bf16"].ttft = 3.0
    for n in range(800):
        world.ask(0.5 * n, CHAT)
    world.run(400.0)
    climbs = [time for time, _ in events(world, "recovered")]
    gaps = [later - earlier for earlier, later in itertools.pairwise(climbs)]
    assert len(gaps) >= 3
    assert all(later >= earlier for earlier, later in itertools.pairwise(gaps))
    assert gaps[-1] > 2 * gaps[0]
    slow = sum(ticket.outcome == "answered@chat@bf16" for ticket in world.tickets)
    assert slow < 0.25 * len(world.tickets)


def test_requests_that_get_no_token_at_all_count_as_missed() -> None:
    world = two_tiers(settings=FAST)
    world.engines["chat@bf16"].ttft = 1000.0
    for n in range(20):
        world.ask(2.0 + n, CHAT)
    world.run(40.0)
    assert events(world, "degraded")
    assert sum(ticket.outcome == "answered@chat@int4" for ticket in world.tickets) >= 14


# memory


def test_least_recently_used_goes_first_and_pinned_never() -> None:
    tiers = {name: [tier(name, "int4", 1, pinned=name == "a")] for name in "abcd"}
    world = World(make_policy(tiers, 3 * GIB))
    for n, name in enumerate("abcabd"):
        world.ask(5.0 * n, Request(name))
    world.run(60.0)
    assert {ticket.outcome for ticket in world.tickets} == {f"answered@{name}@int4" for name in "abcd"}
    assert [name for _, name in events(world, "draining")] == ["c@int4"]


def test_two_busy_models_that_do_not_fit_together_take_turns() -> None:
    world = World(make_policy({name: [tier(name, "int4", 1, concurrency=2)] for name in "ab"}, GIB))
    for n in range(80):
        world.ask(0.8 * n, Request("a"), timeout=100)
        world.ask(0.8 * n, Request("b"), timeout=100)
    world.run(400.0)
    assert all(ticket.outcome == f"answered@{ticket.request.model}@int4" for ticket in world.tickets)
    assert max(ticket.ended - ticket.request.arrived for ticket in world.tickets) < 30
    assert 4 <= len(events(world, "draining")) <= 60


def test_a_swap_drops_nothing_under_way() -> None:
    world = World(make_policy({name: [tier(name, "int4", 1)] for name in "ab"}, GIB))
    world.engines["a@int4"].duration = 20.0
    long = world.ask(0.0, Request("a"))
    other = world.ask(3.0, Request("b"))
    world.run(60.0)
    assert (long.outcome, other.outcome) == ("answered@a@int4", "answered@b@int4")
    assert other.ended > long.ended


def test_unused_tiers_are_unloaded() -> None:
    world = two_tiers(settings=Settings(idle_unload=30.0))
    world.ask(0.0, CHAT)
    world.run(100.0)
    assert events(world, "draining") == [(pytest.approx(31.6, abs=1), "chat@bf16")]
    assert world.snapshot.memory == 0


def test_eviction_takes_no_more_than_it_needs() -> None:
    tiers = {"a": [tier("a", "x", 1)], "b": [tier("b", "x", 4)], "c": [tier("c", "x", 4)]}
    world = World(make_policy(tiers, 5 * GIB))
    for n, name in enumerate("abc"):
        world.ask(10.0 * n, Request(name))
    world.run(60.0)
    assert [name for _, name in events(world, "draining")] == ["b@x"]


def on_gpu(model: str, name: str, host: float, *gpus: float, **facts: object) -> TierPolicy:
    return replace(tier(model, name, host, **facts), gpu_memory=tuple(int(size * GIB) for size in gpus))


def test_a_tier_needs_room_in_both_pools() -> None:
    groups = {"a": [on_gpu("a", "int4", 1, 6)], "b": [on_gpu("b", "int4", 1, 6)], "c": [tier("c", "int4", 4)]}
    world = World(make_policy(groups, 6 * GIB, gpus=(10 * GIB,)))
    for n, name in enumerate("acb"):
        world.ask(5.0 * n, Request(name))
    world.run(30.0)
    assert {ticket.outcome for ticket in world.tickets} == {f"answered@{name}@int4" for name in "abc"}
    assert [name for _, name in events(world, "draining")] == ["a@int4"], "only GPU memory was short, c holds none"
    assert world.snapshot.held == (5 * GIB, 6 * GIB)


def test_host_memory_is_made_where_host_memory_is_short() -> None:
    groups = {"a": [on_gpu("a", "int4", 0.5, 6)], "b": [tier("b", "int4", 4)], "c": [on_gpu("c", "int4", 3, 1)]}
    world = World(make_policy(groups, 5 * GIB, gpus=(10 * GIB,)))
    for n, name in enumerate("bac"):
        world.ask(5.0 * n, Request(name))
    world.run(30.0)
    assert [name for _, name in events(world, "draining")] == ["b@int4"]


def test_gpus_are_pools_of_their_own() -> None:
    groups = {"a": [on_gpu("a", "x", 1, 8)], "b": [on_gpu("b", "x", 1, 0, 8)], "c": [on_gpu("c", "x", 1, 0, 4)]}
    world = World(make_policy(groups, 9 * GIB, gpus=(10 * GIB, 10 * GIB)))
    for n, name in enumerate("abc"):
        world.ask(5.0 * n, Request(name))
    world.run(30.0)
    assert [name for _, name in events(world, "draining")] == ["b@x"]


@pytest.mark.parametrize(
    ("gpus", "pinned", "words"),
    [
        ((), False, "needs 6442450944 bytes of memory of GPU 0, there are 0"),
        ((4 * GIB,), False, "needs 6442450944 bytes of memory of GPU 0, there are 4294967296"),
        ((8 * GIB,), True, "there are 8589934592, 6442450944 of them pinned"),
    ],
)
def test_a_tier_larger_than_the_gpu_says_which_memory(gpus: tuple[int, ...], pinned: bool, words: str) -> None:
    groups = {"chat": [on_gpu("chat", "int4", 1, 6)], "other": [on_gpu("other", "int4", 1, 6, pinned=pinned)]}
    policy = make_policy(groups, 20 * GIB, gpus=gpus)
    answer = decide(policy, initial(policy, 0.0), CHAT)
    assert isinstance(answer, Reject)
    assert (answer.status, answer.code) == (503, "insufficient_memory")
    assert words in answer.message


def test_a_request_limits_the_memory_of_both() -> None:
    policy = make_policy({"chat": [on_gpu("chat", "int4", 1, 6)]}, 20 * GIB, gpus=(8 * GIB,))
    snapshot = initial(policy, 0.0)
    assert isinstance(decide(policy, snapshot, Request("chat", memory_limit=6 * GIB)), Reject)
    assert decide(policy, snapshot, Request("chat", memory_limit=7 * GIB)) == Load("chat@int4")


def test_an_engine_elsewhere_takes_no_memory_and_is_there_at_once() -> None:
    policy = make_policy({"chat": [tier("chat", "int4", 0, remote=True)]}, 0)
    assert decide(policy, initial(policy, 0.0), CHAT) == Route("chat@int4")


def test_decide_loads_into_free_memory() -> None:
    world = two_tiers()
    assert decide(world.policy, world.snapshot, CHAT) == Load("chat@bf16")


# order


def test_waiting_raises_priority() -> None:
    old, new = Request("chat", arrived=0.0), Request("chat", priority=2, arrived=29.0)
    assert urgency(new, 15.0 + 14.0) > urgency(old, 29.0)
    assert urgency(replace(new, arrived=5.0), 10.0) < urgency(old, 10.0)


def test_time_does_not_run_backwards() -> None:
    world = two_tiers()
    world.snapshot.now = 5.0
    learn(world.policy, world.snapshot, Tick(3.0, {}, {}))
    assert world.snapshot.now == 5.0


def test_a_copy_stays_as_it_was() -> None:
    world = two_tiers()
    kept, before = world.snapshot.copy(1.0), repr(world.snapshot.tiers)
    learn(world.policy, world.snapshot, LoadStarted("chat@bf16", 2.0))
    learn(world.policy, world.snapshot, Tick(3.0, {"chat@bf16": 2}, {}))
    assert (kept.now, repr(kept.tiers)) == (1.0, before)
    assert repr(world.snapshot.tiers) != before


# thousands of random schedules


def random_world(chance: random.Random) -> World:
    names = [("bf16", 4), ("int8", 2), ("int4", 1)]
    groups = {}
    for model in "abc"[: chance.randint(1, 3)]:
        chosen = sorted(chance.sample(names, chance.randint(1, 3)), key=lambda item: -item[1])
        groups[model] = [tier(model, name, size, concurrency=chance.randint(1, 3)) for name, size in chosen]
    gpus = tuple(chance.choice([1, 3, 6, 12]) * GIB for _ in range(chance.choice([0, 0, 1, 2])))
    for group in groups.values():
        group[:] = [moved(each, chance, len(gpus)) for each in group]
    if chance.random() < 0.5:
        first = groups["a"]
        first[-1] = replace(first[-1], pinned=True)
    budget = chance.choice([1, 2, 4, 5, 7, 20])
    objective = chance.choice([None, 0.5, 1.0])
    rules = Settings(
        ttft=objective,
        degrade_after=2.0,
        recover_after=chance.choice([2.0, 5.0]),
        dwell=chance.choice([1.0, 4.0]),
        idle_unload=chance.choice([None, 5.0]),
        cooldown=chance.choice([1.0, 5.0]),
        max_cooldown=20.0,
        patience=chance.choice([0.5, 3.0]),
    )
    return World(make_policy(groups, budget * GIB, rules, gpus))


def moved(found: TierPolicy, chance: random.Random, gpus: int) -> TierPolicy:
    """The tier, perhaps with most of it on one GPU or on all."""
    if not gpus or chance.random() < 0.4:
        return found
    whole = chance.random() < 0.3
    at = chance.randrange(gpus)
    share = found.memory // gpus if whole else found.memory
    sizes = tuple(share if whole or number == at else 0 for number in range(gpus))
    return replace(found, memory=chance.choice([0, GIB // 2]), gpu_memory=sizes)


def random_faults(world: World, chance: random.Random, until: float) -> None:
    for name, engine in world.engines.items():
        engine.load, engine.duration = chance.choice([0.1, 2.0]), chance.choice([0.1, 1.0, 4.0])
        for _ in range(chance.randint(0, 3)):
            fault = chance.choice(["fails", "breaks_off", "refuses_load", "slow", "crash"])
            start = chance.uniform(0, until)
            world.at(start, lambda name=name, fault=fault: set_fault(world, name, fault, True))
            world.at(start + chance.uniform(0, 15), lambda name=name, fault=fault: set_fault(world, name, fault, False))


def set_fault(world: World, name: str, fault: str, on: bool) -> None:
    engine: Engine = world.engines[name]
    if fault == "crash":
        if on:
            world.crash(name, restart=1.5)
    elif fault == "slow":
        engine.ttft = 3.0 if on else 0.1
    else:
        setattr(engine, fault, on)


def random_request(world: World, chance: random.Random) -> Request:
    model = chance.choice(sorted(world.policy.models))
    names = [world.policy.tiers[name].name for name in world.policy.models[model].tiers]
    return chance.choice(
        [
            Request(model),
            Request(model, priority=chance.randint(0, 3)),
            Request(model, tier=chance.choice(names)),
            Request(model, precision=chance.choice(["high", "medium", "low"])),
            Request(model, speed=True, memory_limit=chance.choice([None, GIB, 3 * GIB])),
        ]
    )


def acceptable(world: World, ticket: Ticket) -> bool:
    """Whether the tier that answered is one that the request asked for."""
    if ticket.outcome is None or not ticket.outcome.startswith(("answered@", "broken@")):
        return ticket.outcome == "refused"
    served = world.policy.tiers[ticket.outcome.split("@", 1)[1]]
    wanted = ticket.request
    floor = {None: 0, "low": 0, "medium": 8, "high": 16}[wanted.precision]
    return (
        served.model == wanted.model
        and wanted.tier in (None, served.name)
        and served.bits >= floor
        and (wanted.memory_limit is None or served.footprint <= wanted.memory_limit)
    )


def check_random_schedule(seed: int) -> None:
    chance = random.Random(seed)
    world = random_world(chance)
    until = 40.0
    random_faults(world, chance, until)
    for _ in range(chance.randint(1, 40)):
        world.ask(chance.uniform(0, until), random_request(world, chance), timeout=chance.choice([5.0, 30.0]))
    world.run(until + 30.0 + 10.0)
    assert all(acceptable(world, ticket) for ticket in world.tickets)
    assert all(health.in_flight == 0 for health in world.snapshot.tiers.values())
    for model in world.policy.models.values():
        own = [time for time, event, name in world.log if event in ("degraded", "recovered") and name in model.tiers]
        assert all(b - a >= model.settings.dwell - 1e-9 for a, b in itertools.pairwise(own)), "flapping"


@settings(max_examples=500, deadline=None)
@given(st.integers(min_value=0, max_value=2**63))
def test_random_schedules_hold_every_invariant(seed: int) -> None:
    check_random_schedule(seed)


@pytest.mark.slow
def test_thousands_of_random_schedules() -> None:
    for seed in range(5000):
        check_random_schedule(seed)


@settings(max_examples=100, deadline=None)
@given(st.integers(min_value=0, max_value=2**63))
def test_without_faults_nobody_starves(seed: int) -> None:
    """Whatever fits is answered, within a bound on the wait, although models may have to take turns in memory."""
    chance = random.Random(seed)
    groups = {}
    for name in "abc":
        size, host = chance.choice([1, 2]), chance.choice([0.5, 1])
        on_cpu = tier(name, "int4", size, concurrency=2)
        groups[name] = [chance.choice([on_cpu, on_gpu(name, "int4", host, size, concurrency=2)])]
    budget, gpu = chance.choice([2, 3, 4]), chance.choice([2, 3, 4])
    world = World(make_policy(groups, budget * GIB, Settings(patience=1.0), gpus=(gpu * GIB,)))
    for _ in range(60):
        world.ask(chance.uniform(0, 20), Request(chance.choice("abc")), timeout=200.0)
    world.run(100.0)
    assert {ticket.outcome for ticket in world.tickets} <= {f"answered@{name}@int4" for name in "abc"}
    assert max(ticket.ended - ticket.request.arrived for ticket in world.tickets) < 60
