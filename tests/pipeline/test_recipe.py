"""Recipes: strictness, precedence of rules, fused shards, GPTQModel's dynamic tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import UsageError
from lowbit.formats import IntSpec
from lowbit.pipeline.module_plan import ModulePlan, resolve
from lowbit.pipeline.recipe import Recipe, Rule, method_options, rules_from_dynamic
from lowbit.quant.awq import AwqOptions
from lowbit.quant.smoothquant import SmoothQuantOptions

BLOCK = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = [f"model.layers.{i}.{name}" for i in range(2) for name in (*BLOCK, *MLP)]
MODULES = dict.fromkeys([*NAMES, "lm_head", "model.layers.1.mlp.gate"], (256, 256))
FUSED = [[f"model.layers.{i}.{name}" for name in names] for i in range(2) for names in (BLOCK[:3], MLP[:2])]


def recipe_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_file_with_every_key(tmp_path: Path) -> None:
    path = recipe_file(
        tmp_path,
        """
scheme: W4A16
method: awq
format: compressed-tensors
group_size: 64
sym: false
ordering: static
options: {damping: 0.02}
skip: ['.*layers\\.0\\.mlp\\.down_proj']
rules:
  - {pattern: '.*down_proj', bits: 8, group_size: 32, method: gptq}
dynamic:
  '-:.*o_proj': {}
  '+:.*self_attn': {bits: 3, sym: true, desc_act: false}
""",
    )
    recipe = Recipe.from_yaml(path)
    assert recipe.spec == IntSpec(4, 64, symmetric=False)
    assert recipe.options == {"damping": 0.02}
    plan = resolve(recipe, MODULES, FUSED)
    assert plan["model.layers.0.mlp.down_proj"] is None
    assert plan["model.layers.1.mlp.down_proj"] == ModulePlan(IntSpec(8, 32, symmetric=False), "gptq", "static")
    assert plan["model.layers.0.self_attn.o_proj"] is None
    assert plan["model.layers.0.self_attn.q_proj"] == ModulePlan(IntSpec(3, 64, symmetric=True), "awq", "none")
    assert plan["model.layers.0.mlp.up_proj"] == ModulePlan(recipe.spec, "awq", "static")
    assert list(plan) == list(MODULES)


def test_heads_embeddings_and_routers_stay_dense_unless_named() -> None:
    names = {
        "lm_head": False,
        "embed_out": False,
        "model.embed_tokens": False,
        "transformer.wte": False,
        "gpt_neox.embed_in": False,
        "model.decoder.embed_positions": False,
        "model.layers.3.block_sparse_moe.gate": False,
        "model.layers.3.mlp.gate": False,
        "model.layers.3.mlp.shared_expert_gate": False,
        "model.layers.3.mlp.router": False,
        "model.layers.3.mlp.gate_proj": True,
        "model.layers.3.mlp.experts.7.up_proj": True,
        "model.layers.3.mlp.shared_expert.gate_proj": True,
        "model.layers.3.self_attn.qkv_proj": True,
        "model.decoder.layers.0.fc1": True,
        "gpt_neox.layers.0.attention.dense": True,
    }
    plan = resolve(Recipe(), dict.fromkeys(names, (256, 256)))
    assert {name: entry is not None for name, entry in plan.items()} == names
    assert resolve(Recipe(rules=(Rule("lm_head", bits=8),)), MODULES)["lm_head"] == ModulePlan(IntSpec(8), "gptq")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("metod: gptq", "recipe.yaml: unknown key 'metod': did you mean 'method'?"),
        ("groupsize: 128", "did you mean 'group_size'?"),
        ("rules: [{pattern: x, bitz: 3}]", "rules[0]: unknown key 'bitz': did you mean 'bits'?"),
        ("rules: [{bits: 3}]", "rules[0]: needs a pattern"),
        ("rules: [{pattern: x, skip: true, bits: 3}]", "has no meaning"),
        ("rules: {pattern: x}", "rules must be a list"),
        ("dynamic: {'+:x': {desc_akt: false}}", "did you mean 'desc_act'?"),
        ("dynamic: {'+:x': {desc_act: true}}", "use ordering: static"),
        ("dynamic: {'-:x': {bits: 3}}", "takes no settings"),
        ("bits: true", "bits: expected a whole number, not True"),
        ("bits: '4'", "expected a whole number"),
        ("sym: 1", "expected true or false"),
        ("scheme: 4", "scheme: expected text"),
        ("ordering: dynamic", "ordering must be none or static"),
        ("skip: ['*proj']", "not a regular expression"),
        ("options: [1]", "options must be a table"),
        ("- a", "expected a table"),
        ("bits: 4\nbits: 8", "recipe.yaml:2: not valid YAML (key 'bits' is given twice)"),
        ("bits: [", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, expected: str) -> None:
    path = recipe_file(tmp_path, text)
    with pytest.raises(UsageError, match=re.escape(expected)) as caught:
        Recipe.from_yaml(path)
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        Recipe.from_yaml(tmp_path / "none.yaml")
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"scheme: \xff")
    with pytest.raises(UsageError, match="UTF-8"):
        Recipe.from_yaml(path)


def test_an_empty_file_is_the_default_recipe(tmp_path: Path) -> None:
    assert Recipe.from_yaml(recipe_file(tmp_path, "")) == Recipe()


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Recipe(rules=(Rule("down_proj", skip=True),)), "'.*down_proj' would match 2"),
        (Recipe(rules=(Rule("model.layers.7.mlp.up_proj", bits=8),)), "names look like 'model.layers."),
        (Recipe(rules=(Rule(".*q_proj", bits=8),)), "model.layers.0.self_attn.q_proj (int8-g128-sym by gptq)"),
        (Recipe(rules=(Rule(".*up_proj", skip=True),)), "model.layers.0.mlp.up_proj (dense)"),
        (Recipe(rules=(Rule(".*(gate|up)_proj", method="gptk"),)), "did you mean 'gptq'?"),
        (Recipe(rules=(Rule(".*down_proj", bits=9),)), "rule '.*down_proj' for model.layers.0.mlp.down_proj: bits"),
        (Recipe(group_size=512), "model.layers.0.self_attn.q_proj: group size 512 exceeds its 256 input features"),
        (Recipe(bits=1), "bits must be 2 to 8"),
        (Recipe(scheme="W4A17"), "unknown number format or scheme"),
        (Recipe(rules=(Rule(".*", skip=True),)), "quantizes no module"),
    ],
)
def test_recipes_that_cannot_work(recipe: Recipe, expected: str) -> None:
    with pytest.raises(UsageError, match=re.escape(expected)):
        resolve(recipe, MODULES, FUSED, methods=("rtn", "gptq", "awq"))


def test_skipping_a_head_that_is_tied_is_fine() -> None:
    modules = dict.fromkeys(NAMES, (256, 256))
    assert all(resolve(Recipe(rules=(Rule("lm_head", skip=True),)), modules, FUSED).values())


def test_partly_present_groups_are_compared_as_far_as_they_go() -> None:
    modules = {"a.q_proj": (64, 256), "a.v_proj": (64, 256)}
    assert resolve(Recipe(), modules, [["a.q_proj", "a.k_proj", "a.v_proj"]])["a.v_proj"] is not None


def test_rules_in_front_win() -> None:
    recipe = Recipe(rules=(Rule(".*down_proj", bits=8),)).with_rules([Rule(".*down_proj", skip=True)])
    assert resolve(recipe, MODULES, FUSED)["model.layers.0.mlp.down_proj"] is None


PATTERNS = [".*down_proj", "model.layers.0", ".*self_attn", ".*mlp", ".*", "model.layers.1.self_attn.o_proj"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(PATTERNS), st.sampled_from(["-:", "+:", ""]), st.integers(2, 8), st.sampled_from([32, 64])
        ),
        unique_by=lambda item: item[1] + item[0],
        max_size=6,
    )
)
def test_dynamic_tables_against_a_plain_reading_of_the_rules(items: list[tuple[str, str, int, int]]) -> None:
    table: dict[str, Any] = {
        sign + pattern: {} if sign == "-:" else {"bits": bits, "group_size": group}
        for pattern, sign, bits, group in items
    }
    recipe = Recipe(rules=tuple(rules_from_dynamic(table)))

    def expected(name: str) -> ModulePlan | None:
        for key, settings in table.items():
            skip, pattern = key.startswith("-:"), key.split(":")[-1]
            if re.compile(pattern).match(name):
                spec = IntSpec(settings["bits"], settings["group_size"]) if not skip else None
                return ModulePlan(spec, "gptq") if spec else None
        return ModulePlan(IntSpec(4, 128), "gptq")

    modules = dict.fromkeys(NAMES, (256, 256))
    wanted = {name: expected(name) for name in modules}
    if any(wanted.values()):
        assert resolve(recipe, modules) == wanted
    else:
        with pytest.raises(UsageError, match="quantizes no module"):
            resolve(recipe, modules)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


@dataclass(frozen=True)
class Options:
    damping: float = 0.01
    block_size: int = 128
    clip: bool = True
    ordering: Literal["none", "static"] = "none"


def test_options_of_a_method() -> None:
    given = {"damping": 1, "clip": False, "ordering": "static"}
    assert method_options(Options, given) == Options(damping=1, clip=False, ordering="static")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dampng": 1}, "unknown option 'dampng': did you mean 'damping'?"),
        ({"damping": "1e-2"}, "damping: expected a number, not '1e-2'"),
        ({"block_size": 1.5}, "block_size: expected a whole number"),
        ({"block_size": True}, "block_size: expected a whole number, not True"),
        ({"clip": 1}, "clip: expected true or false, not 1"),
    ],
)
def test_options_that_a_method_does_not_take(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=re.escape(expected)):
        method_options(Options, options)


def test_options_of_transforms() -> None:
    """They stand by the transform's name, so that they hold whatever the method is; a file's survive the way there."""
    recipe = Recipe.from_dict({"method": "gptq", "transform_options": {"smoothquant": {"strength": 0.5, "steps": 4}}})
    assert recipe.options_of_transform("smoothquant") == SmoothQuantOptions(steps=4, strength=0.5)
    assert recipe.options_of_transform("awq") == AwqOptions()
    assert recipe.options_of_transform("awq", AwqOptions(steps=3)) == AwqOptions(steps=3)
    assert recipe.options_of_transform("smoothquant", AwqOptions()) == SmoothQuantOptions(steps=4, strength=0.5)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    for table, expected in (
        ({"smothquant": {}}, "unknown transform 'smothquant': did you mean 'smoothquant'?"),
        ({"smoothquant": {"strenth": 1}}, "smoothquant: unknown option 'strenth': did you mean 'strength'?"),
        ({"smoothquant": {"steps": "x"}}, "steps: expected a whole number, not 'x'"),
        ({"smoothquant": 3}, "smoothquant must be a table"),
        ([], None),
        (["awq"], "transform_options must be a table"),
    ):
        if expected is None:
            assert Recipe.from_dict({"transform_options": table}) == Recipe()
            continue
        with pytest.raises(UsageError, match=re.escape(expected)):
            Recipe.from_dict({"transform_options": table})


def test_a_budget_is_text() -> None:
    assert Recipe.from_dict({"method": "best", "budget": "90s"}).to_dict()["budget"] == "90s"
    with pytest.raises(UsageError, match="budget: expected text"):
        Recipe.from_dict({"method": "best", "budget": 90})
