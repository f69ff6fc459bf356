"""Names of a comparison, and what a scheme is used with."""

from __future__ import annotations

import pytest

from lowbit.errors import UsageError
from lowbit.formats import parse_scheme
from lowbit.pipeline.candidates import contenders, usual_choice
from lowbit.pipeline.job import Settings


def test_methods_come_at_every_width_and_schemes_once() -> None:
    found = contenders(["gptq", " AWQ+gptq", "hqq", "nf4", "llm-int8", "q4_k_m"], [4, 2], group_size=64, symmetric=True)
    assert [one.name for one in found] == [
        "GPTQ 4 bit",
        "GPTQ 2 bit",
        "AWQ+GPTQ 4 bit",
        "AWQ+GPTQ 2 bit",
        "HQQ 4 bit",
        "HQQ 2 bit",
        "NF4",
        "LLM_INT8",
        "Q4_K_M",
    ]
    settings = {one.name: dict(one.settings) for one in found}
    assert settings["GPTQ 4 bit"] == {"method": "gptq", "format": "compressed-tensors", "scheme": "int4-g64-sym"}
    assert settings["AWQ+GPTQ 2 bit"]["transform"] == "awq"
    assert settings["HQQ 2 bit"] == {"method": "hqq", "format": "hqq", "scheme": "int2-g64-affine"}
    assert settings["LLM_INT8"] == {"method": "rtn", "format": "bitsandbytes", "scheme": "LLM_INT8"}
    assert found[-1].is_gguf
    assert [one.file_name for one in found[2:3] + found[-1:]] == ["awq+gptq-4bit", "q4_k_m.gguf"]


def test_a_name_given_twice_counts_once() -> None:
    assert len(contenders(["nf4", "NF4", "gptq"], [4, 4], group_size=-1, symmetric=False)) == 2
    (own,) = contenders(["rtn"], [3], group_size=-1, symmetric=False)
    assert own.settings["scheme"] == "int3-channel-asym"


@pytest.mark.parametrize(("name", "hint"), [("gptk", "gptq"), ("q4_k_x", "q4_k"), ("zzzz", "use e.g.")])
def test_unknown_names_get_a_hint(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match=f"unknown name '{name}'.*{hint}"):
        contenders([name], [4], group_size=128, symmetric=True)


@pytest.mark.parametrize(
    ("scheme", "method", "format"),
    [
        ("W4A16", "gptq", "compressed-tensors"),
        ("FP8_DYNAMIC", "rtn", "compressed-tensors"),
        ("NF4", "rtn", "bitsandbytes"),
        ("LLM_INT8", "rtn", "bitsandbytes"),
        ("int3-g64-affine", "hqq", "hqq"),
    ],
)
def test_a_scheme_brings_its_method_and_format(scheme: str, method: str, format: str) -> None:
    assert usual_choice(parse_scheme(scheme)) == (method, format)
    recipe = Settings(scheme=scheme).resolved_recipe()
    assert (recipe.method, recipe.format) == (method, format)
    assert Settings(scheme=scheme, method="awq", format="dense").resolved_recipe().method == "awq"


def test_a_budget_is_for_methods_that_have_candidates() -> None:
    names = ["gptq", "best", "awq+best", "nf4"]
    found = contenders(names, [4], group_size=128, symmetric=True, budget="5m")
    settings = {one.name: dict(one.settings) for one in found}
    assert [name for name, given in settings.items() if given.get("budget") == "5m"] == ["BEST 4 bit", "AWQ+BEST 4 bit"]
    assert settings["AWQ+BEST 4 bit"]["transform"] == "awq"
