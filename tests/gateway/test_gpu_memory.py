"""Which GPUs tiers get and how much of them, on made-up machines; and two engines that take turns on one GPU."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from harness import running
from stack import MIB, Stack, fake_tier

from lowbit.devices.gpu import Gpu
from lowbit.errors import UsageError
from lowbit.gateway import prepare
from lowbit.gateway.app import make_app
from lowbit.gateway.config import ServeConfig, load_config, parse_config
from lowbit.gateway.known_facts import known_facts, remember_facts
from lowbit.gateway.launch import TierFacts, TierPlan, plan_tiers, printable, serving_policy
from lowbit.gateway.placement import Device, Wanted, find_devices, place
from lowbit.gateway.pool import Pool

GIB = 1024**3
BIG, SMALL = Gpu("Big", (9, 0), 80 * GIB, 70 * GIB), Gpu("Small", (8, 9), 24 * GIB, 20 * GIB)
TWO = (Device("0", "Big", 80 * GIB, 60 * GIB), Device("1", "Big", 80 * GIB, 60 * GIB))


def models(*tiers: dict[str, Any], **settings: Any) -> ServeConfig:
    return parse_config({"models": {"a": {"tiers": list(tiers)}}, **settings})


def planned(*tiers: dict[str, Any], devices: tuple[Device, ...] = TWO, **facts: TierFacts) -> dict[str, TierPlan]:
    known = {f"a@{name}": each for name, each in facts.items()}
    return plan_tiers(models(*tiers), known, devices=devices)


def tier(name: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, "path": "m", "engine": "vllm", **settings}


# the machine


def test_budgets_are_what_is_free_or_what_is_said() -> None:
    here = find_devices(models(tier("x")), lambda: (BIG, SMALL), {})
    assert [(device.visible, device.memory, device.budget) for device in here] == [
        ("0", 80 * GIB, 63 * GIB),
        ("1", 24 * GIB, 18 * GIB),
    ]
    said = find_devices(models(tier("x"), gpu_memory="10GiB"), lambda: (BIG, SMALL), {})
    assert [device.budget for device in said] == [10 * GIB] * 2
    said = find_devices(models(tier("x"), gpu_memory=["10GiB", "5GiB"]), lambda: (BIG, SMALL), {})
    assert [device.budget for device in said] == [10 * GIB, 5 * GIB]
    with pytest.raises(UsageError, match="2 sizes for 1 GPUs"):
        find_devices(models(tier("x"), gpu_memory=["10GiB", "5GiB"]), lambda: (BIG,), {})


@pytest.mark.parametrize(
    ("mask", "names"),
    [("1,0", ["1", "0"]), ("1", ["1"]), ("", []), ("0,7,1", ["0"]), ("GPU-8f2a,0", ["GPU-8f2a", "0"])],
)
def test_gpus_that_this_process_may_not_see(mask: str, names: list[str]) -> None:
    here = find_devices(models(tier("x")), lambda: (BIG, SMALL), {"CUDA_VISIBLE_DEVICES": mask})
    assert [device.visible for device in here] == names
    assert all(device.budget == 18 * GIB for device in here if not device.visible.startswith("0"))


def test_no_driver() -> None:
    assert find_devices(models(tier("x")), lambda: (), {}) == ()
    (device,) = find_devices(models(tier("x"), gpu_memory="10GiB"), lambda: (), {})
    assert (device.memory, device.budget) == (0, 10 * GIB)


def test_the_gateway_finds_gpus_without_torch() -> None:
    code = "import sys, lowbit.gateway.pool, lowbit.gateway.placement as p; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# who gets what


def test_tiers_are_spread_and_the_pinned_and_chosen_go_first() -> None:
    wanted = {
        "a": Wanted(1, 30 * GIB),
        "b": Wanted(1, 20 * GIB),
        "c": Wanted(1, 50 * GIB, pinned=True),
        "d": Wanted(2, 5 * GIB),
        "e": Wanted(1, GIB, chosen=(0,)),
    }
    assert place(wanted, TWO) == {"e": (0,), "c": (1,), "a": (0,), "b": (0,), "d": (0, 1)}
    with pytest.raises(UsageError, match="wants 3 GPUs, and there are 2"):
        place({"a": Wanted(3, 1)}, TWO)
    with pytest.raises(UsageError, match="wants GPU 4, and there are 2"):
        place({"a": Wanted(1, 1, chosen=(4,))}, TWO)


def test_an_engine_alone_on_its_gpus_fills_their_budget() -> None:
    plans = planned(
        tier("x", flags={"tensor_parallel": 2}), x=TierFacts("vllm", "m", GIB, context=512, gpus=2, gpu_memory=9 * GIB)
    )
    plan = plans["a@x"]
    assert plan.policy.room == (GIB, 60 * GIB, 60 * GIB)
    assert "--gpu-memory-utilization 0.75" in printable(plan)
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=0,1" in printable(plan)


def test_engines_that_share_a_gpu_are_told_their_part_of_it() -> None:
    facts = TierFacts("vllm", "m", GIB, context=512, gpus=1, gpu_memory=20 * GIB)
    plans = planned(tier("x", gpus=[1]), tier("y", gpus=[1]), tier("z"), x=facts, y=facts, z=facts)
    assert plans["a@x"].policy.room == plans["a@y"].policy.room == (GIB, 0, 20 * GIB)
    assert plans["a@z"].policy.room == (GIB, 60 * GIB), "alone on the other"
    assert "--gpu-memory-utilization 0.25" in printable(plans["a@x"])
    assert "CUDA_VISIBLE_DEVICES=1 " in printable(plans["a@y"])


def test_what_the_configuration_says_counts() -> None:
    facts = TierFacts("vllm", "m", GIB, context=512, gpus=1, gpu_memory=20 * GIB)
    plans = planned(
        tier("bytes", gpu_memory="8GiB", gpus=[0]),
        tier("share", flags={"gpu_memory": 0.5}, gpus=[1]),
        {"name": "own", "command": ["serve", "{port}"], "gpu_memory": "3GiB", "gpus": [1]},
        bytes=facts,
        share=facts,
        own=TierFacts("openai"),
    )
    rooms = {name: plan.policy.room for name, plan in plans.items()}
    assert rooms == {"a@bytes": (GIB, 8 * GIB), "a@share": (GIB, 0, 40 * GIB), "a@own": (0, 0, 3 * GIB)}
    assert "--gpu-memory-utilization 0.1" in printable(plans["a@bytes"])
    assert "--gpu-memory-utilization 0.5" in printable(plans["a@share"])
    with pytest.raises(UsageError, match="gpus names 2, and its engine takes 1"):
        planned(tier("x", gpus=[0, 1]), x=facts)
    with pytest.raises(UsageError, match="given twice"):
        models(tier("x", gpu_memory=5, flags={"gpu_memory": 0.5}))
    with pytest.raises(UsageError, match="names one twice"):
        models(tier("x", gpus=[1, 1]))


def test_an_engine_on_the_processor_sees_no_gpu() -> None:
    facts = TierFacts("llama.cpp", "m.gguf", GIB, context=64)
    plan = planned(tier("x", engine="llama.cpp"), x=facts)["a@x"]
    assert plan.policy.room == (GIB,)
    assert "CUDA_VISIBLE_DEVICES=''" in printable(plan)
    plan = planned(tier("x", engine="llama.cpp"), devices=(), x=facts)["a@x"]
    assert "CUDA" not in printable(plan)


def test_pinned_tiers_must_fit_the_gpu() -> None:
    config = models(tier("x", pinned=True), tier("y", pinned=True))
    facts = TierFacts("vllm", "m", GIB, context=512, gpus=1, gpu_memory=40 * GIB)
    plans = plan_tiers(config, {"a@x": facts, "a@y": facts}, devices=TWO[:1])
    with pytest.raises(UsageError, match=r"need 80.00 GiB of a memory budget of GPU 0 of 60.00 GiB: .* --gpu-memory"):
        serving_policy(config, plans, 9 * GIB, (60 * GIB,))


# what the planner says of a model


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import lowbit

    path = tmp_path_factory.mktemp("gpu") / "demo.gguf"
    lowbit.convert("demo", str(path))
    return path


@pytest.mark.parametrize("layers", [None, 1, 99, 0])
def test_llama_cpp_divides_the_model_between_host_and_gpu(
    gguf: Path, layers: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    monkeypatch.setattr(prepare, "_says_yes", lambda python, question: "xllamacpp" in question)
    flags = {} if layers is None else {"gpu_layers": layers}
    config = models({"name": "x", "path": str(gguf), "context": 512, "flags": flags})
    on_cpu = prepare.find_facts(config, print)["a@x"]
    found = prepare.find_facts(config, print, TWO)["a@x"]
    assert (on_cpu.gpus, on_cpu.gpu_memory) == (0, 0)
    if layers == 0:
        assert found == on_cpu
        return
    assert found.gpus == 1
    assert on_cpu.memory > found.memory
    everything = models({"name": "x", "path": str(gguf), "context": 512})
    whole = prepare.find_facts(everything, print, TWO)["a@x"]
    if layers == 1:
        assert whole.memory < found.memory
        assert found.gpu_memory < whole.gpu_memory
        assert found.memory + found.gpu_memory == whole.memory + whole.gpu_memory
    else:
        assert found == whole
    remember_facts(config, {"a@x": found}, TWO)
    assert known_facts(config, TWO) == {"a@x": found}
    assert known_facts(config) == known_facts(config, TWO[:1]) == {}
    spread = prepare.find_facts(config, print, [Device("0", "Tiny", 0, found.gpu_memory - 1)] * 2)["a@x"]
    assert (spread.gpus, spread.gpu_memory) == (2, -(-found.gpu_memory // 2))


def test_a_build_without_gpus_stays_on_the_processor(
    gguf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The wheel of the tests has no GPU back end, whatever the driver says."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    config = models({"name": "x", "path": str(gguf), "context": 512})
    assert prepare.find_facts(config, print, TWO)["a@x"].gpus == 0


def test_vllm_splits_weights_and_cache_over_its_stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    monkeypatch.setattr(prepare, "_says_yes", lambda python, question: True)

    def facts(**flags: int) -> TierFacts:
        config = models({"name": "x", "path": "demo", "engine": "vllm", "context": 512, "flags": flags})
        return prepare.find_facts(config, print, TWO)["a@x"]

    whole, staged, parallel = facts(), facts(pipeline_parallel=2), facts(tensor_parallel=2)
    assert (whole.gpus, staged.gpus, parallel.gpus) == (1, 2, 2)
    assert staged.gpu_memory < whole.gpu_memory
    assert whole.memory > 0
    assert whole.kl == 0.0, "nobody has quantized it"


# real processes


def test_two_models_take_turns_on_one_gpu(tmp_path: Path) -> None:
    engine = fake_tier("int4", memory=10 * MIB, gpu_memory="6GiB", gpus=[0])
    tiers = {name: {"tiers": [engine]} for name in "ab"}
    config = parse_config({"models": tiers, "gpu_memory": "10GiB"})
    devices = find_devices(config, lambda: (), {})
    facts = {f"{name}@int4": TierFacts("openai") for name in "ab"}
    pool = Pool(config, plan_tiers(config, facts, tmp_path, devices=devices), 512 * MIB, (devices[0].budget,))

    async def take_turns() -> tuple[Any, str]:
        async with aiohttp.ClientSession() as http, running(make_app(pool, config)) as url:
            made = Stack(url, pool, http)
            for name in "aba":
                assert (await made.chat(name))[0] == 200
                assert pool.snapshot().held[1:] == (6 * GIB,)
            async with http.get(f"{url}/status") as answer:
                status = await answer.json()
            async with http.get(f"{url}/metrics") as answer:
                text = await answer.text()
        return status, text

    status, text = asyncio.run(take_turns())
    assert status["gpus"] == [{"memory": 6 * GIB, "memory_budget": 10 * GIB}]
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(samples['lowbit_gpu_memory_budget_bytes{gpu="0"}']) == 10 * GIB
    assert float(samples['lowbit_tier_gpu_memory_bytes{gpu="0",model="a",tier="int4"}']) == 6 * GIB


def test_a_line_that_is_wrong_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("models:\n  a:\n    tiers:\n      - {name: x, path: demo}\ngpu_memory: lots\n")
    with pytest.raises(UsageError, match=r"c.yaml:5: gpu_memory.*is not a size"):
        load_config(path)
