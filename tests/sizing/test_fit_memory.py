"""Bits and cache chosen together: against every combination, and what is said where nothing fits."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from lowbit import estimate
from lowbit.errors import ResourceError, UsageError
from lowbit.pipeline.choices import GroupSensitivity, Measured
from lowbit.pipeline.fit import Measurement
from lowbit.planning import Hardware
from lowbit.planning.kv_dtypes import KV_DTYPES
from lowbit.planning.serving import MEMORY
from lowbit.sizing.fit_memory import Asked, check_room, choose_together, offered_caches, open_asked

MIB, GIB = 2**20, 2**30
MACHINE = Hardware(8.0, "Some CPU", True, True, False, 64 * GIB, 48 * GIB)
CACHES = {"q8_0": 0.0004, "q4_0": 0.03}
GROUPS = tuple(
    GroupSensitivity(
        (f"module{number}",),
        400_000,
        {bits: Measured(50_000 * int(bits), (number + 1) * 0.5 / 4 ** int(bits)) for bits in "2468"},
    )
    for number in range(4)
)
MEASUREMENT = Measurement("demo", {}, "gguf", (), {}, 500_000, GROUPS, CACHES)


def asked(memory: int, **changes: Any) -> Asked:
    settings: dict[str, Any] = {
        "context": 1024, "concurrency": 16, "kv_dtype": "auto", "format": "gguf", "gpus": 0, "hardware": MACHINE,
    }  # fmt: skip
    return open_asked("demo", memory, **(settings | changes))


@pytest.mark.parametrize("memory", [62, 64, 70, 75, 82, 90, 95, 110])
def test_no_combination_that_fits_loses_less(memory: int) -> None:
    """All assignments with all caches, by brute force."""
    question = asked(memory * MIB)
    fit, serving = choose_together(question, MEASUREMENT, CACHES)
    best = {}
    for cache, names in product(("float16", *CACHES), product("2468", repeat=4)):
        picked = [group.candidates[name] for group, name in zip(GROUPS, names, strict=True)]
        weights = 500_000 + sum(one.bytes for one in picked)
        load = replace(question.load, kv=KV_DTYPES[cache])
        if MEMORY["llama.cpp"](question.with_weights(weights), load).total <= question.budget:
            best[cache, names] = sum(one.divergence for one in picked) + CACHES.get(cache, 0.0)
    total = fit.divergence + CACHES.get(serving.kv_dtype, 0.0)
    assert total == pytest.approx(min(best.values()), rel=0.02)
    assert serving.total <= serving.budget == question.budget
    assert serving.largest_concurrency >= 16
    assert serving.largest_context >= 1024


def test_more_memory_means_more_bits_somewhere() -> None:
    found = {memory: choose_together(asked(memory * MIB), MEASUREMENT, CACHES)[1] for memory in (62, 75, 200)}
    assert [serving.kv_dtype for serving in found.values()] == ["q4_0", "q8_0", "float16"]
    assert "leaves too little for any choice of weights" in found[62].reason
    assert "-ctk q8_0 -ctv q8_0" in " ".join(found[75].flags)


def test_a_named_cache_and_one_that_cannot_be_measured_are_kept() -> None:
    question = asked(200 * MIB, kv_dtype="q4_0")
    assert offered_caches(question, "q4_0") == ()
    serving = choose_together(question, MEASUREMENT, {})[1]
    assert (serving.kv_dtype, serving.reason) == ("q4_0", "asked for")
    serving = choose_together(asked(200 * MIB), MEASUREMENT, {}, "latent attention")[1]
    assert (serving.kv_dtype, serving.reason) == ("float16", "not chosen: latent attention")
    assert offered_caches(asked(200 * MIB), "auto") == ("q8_0", "q4_0")
    assert offered_caches(asked(4 * GIB, format="compressed-tensors", gpus=None), "auto") == ("fp8",)


def test_devices_share_the_weights() -> None:
    one, two = (asked(4 * GIB, format="compressed-tensors", gpus=gpus).room(KV_DTYPES["bfloat16"]) for gpus in (1, 2))
    assert one < two < 2.0 * one


def test_too_little_memory_says_by_how_much_and_what_would_do() -> None:
    with pytest.raises(ResourceError, match=r"smallest weights.*this would do: --concurrency \d+, or --memory"):
        choose_together(asked(45 * MIB), MEASUREMENT, CACHES)
    with pytest.raises(ResourceError, match=r"need \d+\.\d+ MiB, .*larger device"):
        check_room(asked(8 * MIB), ("q8_0", "q4_0"))
    check_room(asked(200 * MIB), ())
    # What is advised does fit.
    with pytest.raises(ResourceError) as found:
        choose_together(asked(50 * MIB), MEASUREMENT, CACHES)
    enough = float(str(found.value).rpartition("--memory ")[2].removesuffix("MiB"))
    assert choose_together(asked(int(enough * MIB)), MEASUREMENT, CACHES)[1].kv_dtype == "q4_0"


def test_the_rest_is_what_estimate_says() -> None:
    question = asked(200 * MIB)
    found = estimate("demo", schemes=["Q4_K_M"], engine="llama.cpp", gpus=0, context=1024, concurrency=16)
    entry = found.precisions[0]
    room = question.room(KV_DTYPES["float16"])
    assert room == question.budget - (entry.total - entry.parts["weights"])


def test_what_cannot_be_asked() -> None:
    with pytest.raises(UsageError, match="beyond the model's maximum of 1024"):
        asked(GIB, context=4096)
    with pytest.raises(UsageError, match=r"llama.cpp has no such cache"):
        asked(GIB, kv_dtype="fp8")
    with pytest.raises(UsageError, match="--gpus -1"):
        asked(GIB, gpus=-1)


@pytest.mark.parametrize("memory", [55, 60, 64, 75, 90])
@pytest.mark.parametrize("max_kl", [0.005, 0.02, 0.3])
def test_the_longest_context_within_the_price(memory: int, max_kl: float) -> None:
    """Against asking for every length by itself."""
    question = asked(memory * MIB, context="128..1000", max_kl=max_kl)
    fit, serving = choose_together(question, MEASUREMENT, CACHES)

    def lost(context: int) -> float:
        try:
            one, how = choose_together(asked(memory * MIB, context=context), MEASUREMENT, CACHES)
        except ResourceError:
            return float("inf")
        return one.divergence + CACHES.get(how.kv_dtype, 0.0)

    losses = {context: lost(context) for context in (128, 256, 512, 768, 1000)}
    price = max(max_kl, 1.05 * losses[128])
    assert serving.context == max(context for context, loss in losses.items() if loss <= price)
    assert fit.divergence + CACHES.get(serving.kv_dtype, 0.0) == losses[serving.context]
    assert serving.total <= serving.budget
    told = "the longest there is" if serving.context == 1000 else "the longest of 128..1,000 that loses at most"
    assert serving.context_reason.startswith(told)


def test_what_is_said_of_the_context() -> None:
    question = asked(62 * MIB, context="auto")
    assert (question.contexts.least, question.contexts.most) == (256, 1024)
    assert choose_together(asked(90 * MIB), MEASUREMENT, CACHES)[1].context_reason == "asked for"
    usual = choose_together(asked(90 * MIB, context=None), MEASUREMENT, CACHES)[1]
    assert (usual.context, usual.context_reason[:16]) == (1024, "the usual length")
    for context, message in [
        ("4096..32768", "beyond the model's maximum of 1024: use at most 1024"),
        ("512..256", "the smaller number first"),
        ("0..256", "write e.g. 4096..32768"),
        ("many", "give a number of tokens such as 8192, a range"),
        ("0", "give a number of tokens"),
    ]:
        with pytest.raises(UsageError, match=message):
            asked(GIB, context=context)
    with pytest.raises(UsageError, match="--max-kl is for a context that is to be chosen"):
        asked(GIB, context=512, max_kl=0.1)
    with pytest.raises(UsageError, match="--max-kl nan: give a number"):
        asked(GIB, context="auto", max_kl=float("nan"))


def test_a_token_table_that_stays_with_the_host_is_not_counted_on_the_gpu() -> None:
    """llama.cpp keeps an untied one in host memory, so what it is given costs the device nothing."""
    table = GroupSensitivity(("embed",), 400_000, {"2": Measured(100_000, 0.1), "8": Measured(400_000, 0.001)})
    measurement = replace(MEASUREMENT, groups=(*GROUPS, table), embedding="embed")
    question = asked(750 * MIB, gpus=1)
    shape = replace(question.served.shape, tied=False)
    question = replace(question, served=replace(question.served, shape=shape))
    fit, serving = choose_together(question, measurement, {})
    kept = table.candidates[fit.choices["embed"]].bytes
    load = replace(question.load, kv=KV_DTYPES["float16"])
    served = replace(question.with_weights(fit.bytes), embedding=kept)
    assert serving.total == MEMORY["llama.cpp"](served, load).total
