"""Regular expressions that single out modules by name, as engines match them (start-anchored)."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from lowbit.formats.spec import IntSpec

__all__ = ["FUSED_SHARDS", "common_spec", "fused_names", "in_numbered_block", "owner", "patterns"]

FUSED_SHARDS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Layers that engines merge at load, by the merged name, and the checkpoint's names of their shards."""


def patterns(members: Collection[str], others: Collection[str]) -> list[str]:
    """Regexes ``^…$`` that match every one of ``members`` and none of ``others``, few where names repeat by layer.

    A name is taken as its dotted parts; where all modules that differ only in their numbers (layer, expert) are
    members, one regex with ``\\d+`` stands for them; where that holds in some layers only, those are listed.
    """
    outside: defaultdict[tuple[str, ...], set[str]] = defaultdict(set)
    for name in others:
        numbers = _numbers(name)
        outside[_template(name)].add(numbers[0] if numbers else "")
    inside: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in members:
        inside[_template(name)].append(name)
    found: list[str] = []
    for template, names in inside.items():
        if len(names) == 1 or not _numbers(names[0]):
            found += [f"^{re.escape(name)}$" for name in names]
            continue
        if template not in outside:
            found.append(_regex(template, r"\d+"))
            continue
        layers = sorted({_numbers(name)[0] for name in names}, key=int)
        clean = [layer for layer in layers if layer not in outside[template]]
        if clean:
            found.append(_regex(template, clean[0] if len(clean) == 1 else f"(?:{'|'.join(clean)})"))
        found += [f"^{re.escape(name)}$" for name in sorted(names) if _numbers(name)[0] not in clean]
    return found


def fused_names(names: Collection[str], others: Collection[str]) -> set[str]:
    """Names that merged layers have in an engine: shards all among ``names``, experts with none among ``others``."""
    known = set(names)
    foreign = {_experts(name) for name in others}
    found = {_experts(name) for name in known} - foreign - {""}
    for name in known:
        parent, _, last = name.rpartition(".")
        for merged, shards in FUSED_SHARDS.items():
            if last == shards[0] and all(f"{parent}.{shard}" in known for shard in shards):
                found.add(f"{parent}.{merged}")
    return found


def owner(tensor: str, modules: Collection[str]) -> str | None:
    """The one of ``modules`` that the tensor ``tensor`` belongs to, however deep its local name is; None for none."""
    module = tensor
    while module:
        module = module.rpartition(".")[0]
        if module in modules:
            return module
    return None


def in_numbered_block(name: str) -> bool:
    """Whether a module lies in one of the repeated blocks (and not beside them, as the embedding and the head do)."""
    return bool(_numbers(name))


def common_spec(specs: Iterable[IntSpec]) -> IntSpec:
    """The spec that most modules have; the first of them on a tie."""
    return Counter(specs).most_common(1)[0][0]


def _experts(name: str) -> str:
    """``…mlp.experts`` for a layer of one of its experts (``…mlp.experts.3.w1``), else the empty string."""
    parent, separator, rest = name.rpartition(".experts.")
    return f"{parent}.experts" if separator and rest.partition(".")[0].isdecimal() else ""


def _template(name: str) -> tuple[str, ...]:
    return tuple("#" if part.isdecimal() else part for part in name.split("."))


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdecimal()]


def _regex(template: Sequence[str], first_number: str) -> str:
    parts: list[str] = []
    number = first_number
    for part in template:
        if part == "#":
            parts.append(number)
            number = r"\d+"
        else:
            parts.append(re.escape(part))
    return "^" + r"\.".join(parts) + "$"
