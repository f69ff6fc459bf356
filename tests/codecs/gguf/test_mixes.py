"""Mixes: held to what llama.cpp's quantizer chose (recorded by tests/engines/mixes_check.py), and their errors."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lowbit.codecs.gguf.mixes import MIXES, choose_types, find_mix, is_mix, needs_importance, parse_overrides
from lowbit.errors import UsageError
from lowbit.formats.ggml.types import GGML_TYPES

TABLE: dict[str, Any] = json.loads((Path(__file__).with_name("mixes.json")).read_text())


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    keep_float: bool = False


def tensors_of(case: dict[str, Any]) -> list[Tensor]:
    named = dict(case["shell"])
    for layer in range(case["layers"]):
        named |= {f"blk.{layer}.{suffix}.weight": shape for suffix, shape in case["block"].items()}
    return [Tensor(name, tuple(shape)) for name, shape in named.items()]


def expanded(text: str, layers: int) -> dict[str, str]:
    """Tensor name to type, of a recorded text such as ``12 Q4_K: attn_q ffn_up; …``; F32 tensors are left out."""
    types = {}
    for part in text.split("; "):
        runs, _, suffixes = part.partition(": ")
        kinds = [kind for run in runs.split(", ") for kind in [run.split()[1]] * int(run.split()[0])]
        for suffix in suffixes.split():
            if suffix.endswith(".weight"):
                types[suffix] = kinds[0]
            else:
                assert len(kinds) == layers
                types |= {f"blk.{layer}.{suffix}.weight": kind for layer, kind in enumerate(kinds)}
    return types


@pytest.mark.parametrize("name", list(TABLE["cases"]))
def test_the_choices_of_llama_cpp(name: str) -> None:
    case = TABLE["cases"][name]
    tensors = tensors_of(case)
    recorded = TABLE["types"][name]
    assert {label.partition(" ")[0] for label in recorded} == set(MIXES) - {"NVFP4"}
    for scheme, mix in MIXES.items():
        if scheme == "NVFP4":
            continue
        for has_imatrix in (False, True):
            text = recorded.get(f"{scheme} imatrix", recorded[scheme]) if has_imatrix else recorded[scheme]
            chosen = choose_types(mix, tensors, case["metadata"], has_imatrix=has_imatrix)
            quantized = {tensor: kind.name for tensor, kind in chosen.items() if kind.name != "F32"}
            assert quantized == (expanded(text, case["layers"]) if text else {}), scheme


LLAMA = TABLE["cases"]["llama, heads of their own"]


def test_pure_gives_every_matrix_one_type() -> None:
    chosen = choose_types(find_mix("Q4_K_M"), tensors_of(LLAMA), LLAMA["metadata"], pure=True)
    assert {kind.name for name, kind in chosen.items() if "norm" not in name} == {"Q4_K"}


def test_overrides_win_and_the_first_one_counts() -> None:
    overrides = parse_overrides([r"blk\.0\.ffn_down=Q8_0", "ffn_down=iq4_xs", "token_embd=F16"])
    chosen = choose_types(find_mix("Q4_K_M"), tensors_of(LLAMA), LLAMA["metadata"], overrides=overrides)
    assert chosen["blk.0.ffn_down.weight"].name == "Q8_0"
    assert {chosen[f"blk.{layer}.ffn_down.weight"].name for layer in range(1, 24)} == {"IQ4_XS"}
    assert chosen["token_embd.weight"].name == "F16"
    assert chosen["blk.3.attn_q.weight"].name == "Q4_K"
    dense = choose_types(find_mix("F16"), tensors_of(LLAMA), LLAMA["metadata"], overrides=overrides)
    assert dense["blk.0.ffn_down.weight"].name == "Q8_0"


@pytest.mark.parametrize(
    ("kind", "columns", "expected"),
    [
        ("Q4_K", 288, "Q5_0"), ("Q6_K", 288, "Q8_0"), ("Q3_K", 288, "Q4_0"), ("Q5_K", 288, "Q5_1"),
        ("IQ2_XXS", 288, "IQ4_NL"), ("NVFP4", 96, "IQ4_NL"), ("NVFP4", 64, "NVFP4"), ("Q4_K", 80, "F16"),
        ("Q8_0", 80, "F16"), ("MXFP4", 48, "F16"), ("TQ1_0", 32, "Q4_0"),
    ],
)  # fmt: skip
def test_types_that_do_not_fit_give_way(kind: str, columns: int, expected: str) -> None:
    chosen = choose_types(
        find_mix("Q8_0"),
        [Tensor("blk.0.ffn_up.weight", (64, columns))],
        LLAMA["metadata"],
        overrides=parse_overrides([f"ffn_up={kind}"]),
    )
    assert chosen["blk.0.ffn_up.weight"].name == expected


def test_nvfp4_has_a_mix_although_llama_cpp_only_reads_it() -> None:
    chosen = choose_types(find_mix("NVFP4"), tensors_of(LLAMA), LLAMA["metadata"])
    assert chosen["blk.0.attn_q.weight"].name == "NVFP4"
    assert chosen["output.weight"].name == "Q6_K"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["ffn_down"], r"write REGEX=TYPE"),
        (["=Q4_K"], r"write REGEX=TYPE"),
        (["ffn_down=Q4_Q"], r"unknown type 'Q4_Q': did you mean 'Q4_K'"),
        (["ffn_(=Q4_K"], r"'ffn_\(' is no regular expression"),
        (["ffn_dwn=Q4_K"], r"matches no tensor: names look like 'blk\.\d+\.ffn_down\.weight'"),
        (["attn_norm=Q4_K"], r"never quantized \(blk\.0\.attn_norm\.weight\)"),
    ],
)
def test_overrides_that_cannot_work(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_types(find_mix("Q4_K_M"), tensors_of(LLAMA), LLAMA["metadata"], overrides=parse_overrides(texts))


def test_names() -> None:
    assert find_mix("q4_k").name == find_mix("Q4_K_M").name == "Q4_K_M"
    assert is_mix("iq3_xs")
    assert not is_mix("W4A16")
    with pytest.raises(UsageError, match=re.escape("unknown GGUF scheme 'Q4_KM': did you mean 'Q4_K_M'?")):
        find_mix("Q4_KM")
    assert len({mix.file_type for mix in MIXES.values()}) == len(MIXES)


def test_types_that_need_an_importance_matrix() -> None:
    for kind, needed in (("IQ1_S", True), ("IQ2_S", True), ("IQ3_XXS", True), ("IQ3_S", False), ("Q2_K", False)):
        assert needs_importance(find_mix("Q4_K_M"), "blk.0.ffn_up.weight", GGML_TYPES[kind]) is needed
    assert needs_importance(find_mix("Q2_K_S"), "blk.0.ffn_up.weight", GGML_TYPES["Q2_K"])
    assert not needs_importance(find_mix("IQ1_S"), "token_embd.weight", GGML_TYPES["IQ2_XXS"])
