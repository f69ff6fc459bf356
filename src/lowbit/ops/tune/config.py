"""Writes what was found into a configuration of ``lowbit serve`` without touching the rest of the file.

Only the keys that change are replaced in the text, so that comments, order and layout stay; the result is read back
and has to mean exactly what was intended, or nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from lowbit.errors import UsageError
from lowbit.gateway.config import parse_config

__all__ = ["edit_tier", "new_config", "tier_changes"]


def tier_changes(changes: Mapping[str, Any], evidence: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys (``flags.threads``) as nested mappings, and the ``tuned:`` block."""
    nested: dict[str, Any] = {}
    for key, value in changes.items():
        where, _, name = key.rpartition(".")
        (nested.setdefault(where, {}) if where else nested)[name] = value
    return {**nested, "tuned": dict(evidence)}


def new_config(model: str, tier: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """A configuration of one model with one tier."""
    given = {key: value for key, value in tier.items() if value is not None}
    content = {"models": {model: {"tiers": [_merged(given, changes)]}}}
    parse_config(content, where="the new configuration")
    return _dump(content)


def edit_tier(text: str, model: str, tier: str, changes: Mapping[str, Any], where: str) -> str:
    """``text`` of a configuration with ``changes`` (nested mappings) in one tier of one model.

    Raises :class:`UsageError` where the tier is not there or the text cannot be edited faithfully (anchors, say).
    """
    content = yaml.safe_load(text)
    node = _tier_node(yaml.compose(text, Loader=yaml.SafeLoader), model, tier, where)
    edits: list[tuple[int, int, str]] = []
    _edit_mapping(text, node, changes, edits)
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    for each in content["models"][model]["tiers"]:
        if each["name"] == tier:
            each.update(_merged(each, changes))
    try:
        faithful = yaml.safe_load(text) == content
    except yaml.YAMLError:
        faithful = False
    if not faithful:
        raise UsageError(f"{where}: cannot be edited in place: say --out FILE and copy what it has into {model}@{tier}")
    parse_config(content, where=where)
    return text


def _merged(old: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``old`` with ``changes``, nested mappings merged, the ``tuned`` block replaced."""
    found = dict(old)
    for key, value in changes.items():
        both = isinstance(found.get(key), Mapping) and isinstance(value, Mapping) and key != "tuned"
        found[key] = {**found[key], **value} if both else value
    return found


def _tier_node(root: yaml.Node | None, model: str, tier: str, where: str) -> yaml.MappingNode:
    models = _value(root, "models")
    tiers = _value(_value(models, model), "tiers")
    for each in tiers.value if isinstance(tiers, yaml.SequenceNode) else ():
        name = _value(each, "name")
        if isinstance(each, yaml.MappingNode) and name is not None and name.value == tier:
            return each
    raise UsageError(f"{where}: has no tier {model}@{tier}")


def _value(node: yaml.Node | None, key: str) -> yaml.Node | None:
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if name.value == key:
            found: yaml.Node = value
            return found
    return None


def _edit_mapping(
    text: str, node: yaml.MappingNode, changes: Mapping[str, Any], edits: list[tuple[int, int, str]]
) -> None:
    """Collect ``(start, end, replacement)`` of the text that make ``node`` have ``changes``."""
    if node.flow_style:
        merged = _merged(yaml.safe_load(text[node.start_mark.index : node.end_mark.index]), changes)
        edits.append((node.start_mark.index, node.end_mark.index, _flow(merged)))
        return
    indent = " " * node.start_mark.column
    added = []
    for key, value in changes.items():
        old = _value(node, key)
        if old is None:
            added.append(_block(key, value, indent))
        elif isinstance(old, yaml.MappingNode) and isinstance(value, Mapping) and key != "tuned":
            _edit_mapping(text, old, value, edits)
        else:
            start = next(name.start_mark.index for name, each in node.value if each is old)
            edits.append((start, _end(old), _block(key, value, indent)))
    if added:
        end = _end(node)
        edits.append((end, end, "".join(f"\n{indent}{block}" for block in added)))


def _end(node: yaml.Node) -> int:
    """Where the text of a node ends; a block's own mark lies behind the comments and empty lines that follow it."""
    if isinstance(node, yaml.ScalarNode) or getattr(node, "flow_style", False) or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end(last[1] if isinstance(last, tuple) else last)


def _block(key: str, value: Any, indent: str) -> str:
    """``key: value`` in block style, all lines but the first indented."""
    return _dump({key: value}).rstrip("\n").replace("\n", f"\n{indent}")


def _dump(value: Any) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)
    return text


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, default_flow_style=True, width=10**6)
    return text.strip()
