"""The configuration: strict, with the line of what is wrong; and what it becomes: plans, commands, the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowbit.engines.memory import available_bytes, oom_kills, total_bytes
from lowbit.errors import UnsupportedError, UsageError
from lowbit.gateway.config import config_for_model, kind_of, load_config, parse_config
from lowbit.gateway.known_facts import known_facts, remember_facts
from lowbit.gateway.launch import (
    TierFacts,
    engine_threads,
    plan_tiers,
    printable,
    serving_policy,
    thread_variables,
)
from lowbit.gateway.prepare import find_facts

GIB = 1024**3
TIER = {"name": "int4", "path": "m.gguf"}
A = "models:\n  a:\n    tiers:\n      - {name: x, path: p}\n"


def models(*tiers: dict[str, Any], **model: Any) -> dict[str, Any]:
    return {"models": {"a": {"tiers": list(tiers) or [TIER], **model}}}


def test_a_whole_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    path = tmp_path / "serve.yaml"
    path.write_text(
        "host: 0.0.0.0\napi_keys: [env:KEY]\nmemory: 12GiB\nlimits: {body_bytes: 1MB, request_timeout: 2m}\n"
        "models:\n  chat:\n    aliases: [gpt-4o]\n    policy: {ttft: 500ms, idle_unload: 1h}\n    tiers:\n"
        "      - {name: int4, path: m.gguf, memory: 1.5GiB, kl: 0.01}\n"
        "      - {name: big, url: 'http://host:8000/v1/', bits: 16}\n"
    )
    config = load_config(path)
    assert (config.memory, config.limits.body_bytes, config.limits.request_timeout) == (12 * GIB, 10**6, 120.0)
    chat = config.models["chat"]
    assert (chat.policy.ttft, chat.policy.idle_unload) == (0.5, 3600.0)
    assert chat.tiers[0].path == str(tmp_path / "m.gguf"), "relative to the file"
    assert chat.tiers[1].url == "http://host:8000"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "models:\n  a:\n    tiers:\n      - {name: x, path: p}\n    polcy: {}\n",
            ":5: unknown key 'models.a.polcy': did",
        ),
        ("modles: {}\n", ":1: unknown key 'modles': did you mean 'models'?"),
        ("port: 1\n", ":1: models is missing"),
        (
            "models:\n  a:\n    tiers:\n      - name: x\n        path: p\n        context: many\n",
            ":6: models.a.tiers.0",
        ),
        (
            "models:\n  a:\n    tiers:\n      - {name: x}\n",
            ":4: models.a.tiers.0: needs exactly one of path, url and c",
        ),
        ("models:\n  a: {tiers: [{name: x, path: p, url: 'http://h'}]}\n", "not path and url"),
        ("models:\n  a: {tiers: [{name: x, path: p}, {name: x, path: q}]}\n", "two tiers are called 'x'"),
        ("models:\n  a: {tiers: [{name: x, path: p}]}\n  a: {tiers: []}\n", ":3: key 'a' is given twice"),
        ("models:\n  a: {tiers: [{name: x, path: p, memory: big}]}\n", "not a size: write e.g. 12GiB"),
        (
            "models:\n  a: {tiers: [{name: x, path: p}], aliases: [b]}\n  b: {tiers: [{name: x, path: p}]}\n",
            "names both",
        ),
        ("models:\n  a: {tiers: [{name: x, path: p}]}\napi_keys: [plain]\n", "never as it is"),
        ("models: [\n", "not valid YAML"),
        ("", "is empty"),
        ("models:\n  a: {tiers: [{name: x, path: p}], policy: {cooldown: -1}}\n", "greater than or equal to 0"),
    ],
)
def test_mistakes_are_one_line_with_the_place(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_config(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("bf16", 16), ("fp32", 32), ("int8", 8), ("q4_k_m", 4), ("IQ3_XXS", 3), ("w4a16", 4), ("best", None)],
)
def test_bits_are_read_from_names(name: str, bits: int | None) -> None:
    config = parse_config(models({"name": name, "path": "x"}))
    assert config.models["a"].tiers[0].known_bits() == bits


def test_one_model() -> None:
    config = config_for_model("dir/My Model.gguf", context=100, port=1, threads=2)
    assert list(config.models) == ["My-Model"]
    tier = config.models["My-Model"].tiers[0]
    assert (tier.path, tier.context, tier.pinned, config.threads) == ("dir/My Model.gguf", 100, True, 2)


def test_the_kind_of_a_model_is_seen(tmp_path: Path) -> None:
    assert kind_of(tmp_path) == "chat"
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    assert kind_of(tmp_path) == "chat"
    (tmp_path / "modules.json").write_text("[]")
    assert kind_of(tmp_path) == "embedding"
    (tmp_path / "config.json").write_text('{"architectures": ["BertForSequenceClassification"]}')
    assert kind_of(tmp_path) == "rerank"
    (tmp_path / "config.json").write_text("[]")
    assert config_for_model(str(tmp_path), name="x").models["x"].kind == "chat"


def test_threads_are_divided_and_leave_the_gateway_room() -> None:
    one = parse_config(models())
    two = parse_config({"models": {name: {"tiers": [TIER]} for name in "ab"}})
    assert [engine_threads(one, cores) for cores in (1, 2, 4, 8, 64)] == [1, 2, 4, 7, 63]
    assert [engine_threads(two, cores) for cores in (1, 2, 4, 8)] == [1, 1, 2, 3]
    assert engine_threads(one, 8, idle=2.4) == 2
    assert engine_threads(one, 8, idle=0.0) == 1
    assert engine_threads(parse_config({**models(), "threads": 5}), 2) == 5


def test_plans_of_each_kind() -> None:
    config = parse_config(
        models(
            {"name": "bf16", "url": "http://h:1", "api_key": None},
            {"name": "int8", "command": ["serve", "--port", "{port}"], "memory": "1GiB"},
            {"name": "int4", "path": "m.gguf", "context": 64, "flags": {"extra": ["--verbosity", "2"]}},
        )
    )
    facts = {
        "a@bf16": TierFacts("openai"),
        "a@int8": TierFacts("openai"),
        "a@int4": TierFacts("llama.cpp", "m.gguf", 5, 4.5, 0.02, 0.01, 512),
    }
    plans = plan_tiers(config, facts)
    remote, command, local = (plans[f"a@{name}"] for name in ("bf16", "int8", "int4"))
    assert remote.spec is None
    assert remote.policy.remote
    assert command.policy.memory == GIB
    assert local.spec is not None
    assert local.policy.memory == 5
    assert (local.policy.kl, local.policy.bits, local.context) == (0.02, 4.0, 64)
    key = local.headers["Authorization"].removeprefix("Bearer ")
    assert key not in printable(local)
    assert key not in " ".join(local.spec.command)
    assert "--context 64 --parallel 4" in printable(local)
    assert printable(local).endswith("--verbosity 2")
    policy = serving_policy(config, plans, 10)
    assert policy.models["a"].tiers == ("a@bf16", "a@int8", "a@int4")


def test_refusals_of_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"a@int4": TierFacts("llama.cpp", "m.gguf", 5 * GIB)}
    config = parse_config(models({**TIER, "pinned": True}))
    plans = plan_tiers(config, facts)
    with pytest.raises(UsageError, match=r"need 5.00 GiB of a memory budget of 1.00 GiB"):
        serving_policy(config, plans, GIB)
    with pytest.raises(UnsupportedError, match="divides the layers"):
        plan_tiers(parse_config(models({**TIER, "flags": {"tensor_parallel": 2}})), facts)
    remote = {"name": "int4", "url": "http://h:1", "api_key": "env:LOWBIT_TEST_KEY"}
    with pytest.raises(UsageError, match="not set"):
        plan_tiers(parse_config(models(remote)), facts)
    monkeypatch.setenv("LOWBIT_TEST_KEY", "k")
    assert plan_tiers(parse_config(models(remote)), facts)["a@int4"].headers == {"Authorization": "Bearer k"}
    with pytest.raises(UsageError, match="never the key itself"):
        plan_tiers(parse_config(models({**remote, "api_key": "k"})), facts)


@pytest.mark.parametrize(("batch", "concurrency", "least"), [(1, 1, 2), (1, 4, 4), (3, 4, 4)])
def test_batches_that_llama_cpp_aborts_at(batch: int, concurrency: int, least: int) -> None:
    tier = {**TIER, "concurrency": concurrency, "flags": {"batch": batch}}
    with pytest.raises(UsageError, match=rf"flags.batch is {batch}, and llama.cpp aborts below {least}"):
        parse_config(models(tier))
    assert parse_config(models({**tier, "flags": {"batch": least}}))


def test_facts_are_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    config = parse_config(models({"name": "int4", "path": str(model)}))
    facts = {"a@int4": TierFacts("llama.cpp", str(model), 7, 4.5, None, None, 512)}
    assert known_facts(config) == {}
    remember_facts(config, facts)
    assert known_facts(config) == facts
    assert known_facts(parse_config(models({"name": "int4", "path": str(model), "context": 3}))) == {}
    model.write_bytes(b"GGUF2")
    assert known_facts(config) == {}
    assert known_facts(parse_config(models({"name": "x", "url": "http://h"}))) == {"a@x": TierFacts("openai")}


def test_memory_of_a_container(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) > 0
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("3000000\n")
    (group / "memory.current").write_text("2500000\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 100000\n")
    assert available_bytes(tmp_path) == 600000
    assert total_bytes(tmp_path) == int((group / "memory.max").read_text())
    (group / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) > 600000


def test_oom_kills_of_the_container_or_the_machine(tmp_path: Path) -> None:
    assert oom_kills(tmp_path) == 0
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "vmstat").write_text("pgfault 9\noom_kill 3\n")
    assert oom_kills(tmp_path) == 3
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.events").write_text("low 0\noom 2\noom_kill 1\n")
    assert oom_kills(tmp_path) == 1


def test_threads_of_a_large_model_look_longer_before_they_sleep(tmp_path: Path) -> None:
    small, large = thread_variables(40 << 20), thread_variables(600 << 20)
    assert small["OMP_WAIT_POLICY"] == large["OMP_WAIT_POLICY"] == "PASSIVE"
    assert 0 < int(small["GOMP_SPINCOUNT"]) < int(large["GOMP_SPINCOUNT"]) <= 1000
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    plan = plan_tiers(parse_config(models(TIER)), {"a@int4": TierFacts("llama.cpp", str(model))})["a@int4"]
    assert plan.spec is not None
    assert plan.spec.env["GOMP_SPINCOUNT"] == small["GOMP_SPINCOUNT"]
    assert "--threads 1 " in f"{printable(plan)} ", "a model of a few bytes has one thread"


def test_what_was_measured_of_a_checkpoint_is_told_of_its_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that is served holds the checkpoint's codes; its distance is the checkpoint's, or not known."""
    import lowbit

    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    made = tmp_path / "gptq"
    lowbit.quantize("demo", str(made), scheme="W4A16", method="rtn", format="gptq", certify_tokens=2000)
    config = parse_config(models({"name": "int4", "path": str(made), "context": 64}))
    facts = find_facts(config, print)["a@int4"]
    assert str(facts.path).endswith(".gguf")
    assert facts.kl is not None
    assert facts.kl > 0
    assert facts.error is not None
    assert facts.error > 0
    (made / "lowbit.json").unlink()
    facts = find_facts(config, print)["a@int4"]
    assert (facts.kl, facts.error) == (None, None), "a checkpoint of others: nobody measured it"
    original = parse_config(models({"name": "bf16", "path": "demo", "context": 64}))
    assert find_facts(original, print)["a@bf16"].kl == 0.0
