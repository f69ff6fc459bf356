"""Whether a JSON schema in a request makes sense, before an engine builds a grammar from it.

Follows draft 2020-12 for the keywords whose value has a fixed type; unknown keywords pass, as the draft asks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["check_schema"]

_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties", "contains", "not", "propertyNames", "if", "then", "else")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_MAX_DEPTH = 64


def check_schema(schema: object, where: str) -> None:
    """Raise :class:`ValueError` naming the place in ``schema`` that is wrong."""
    _check(schema, where, schema, 0)


def _check(schema: object, where: str, root: object, depth: int) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise ValueError(f"{where} must be an object, not {type(schema).__name__}")
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where} is nested deeper than {_MAX_DEPTH} levels")
    _check_values(schema, where)
    if isinstance(reference := schema.get("$ref"), str) and reference.startswith("#"):
        _resolve(reference, root, where)
    for key in _MAPS:
        if not isinstance(branches := schema.get(key, {}), Mapping):
            raise ValueError(f"{where}.{key} must be an object of schemas")
        for name, branch in branches.items():
            _check(branch, f"{where}.{key}.{name}", root, depth + 1)
    for key in _LISTS:
        branches = schema.get(key)
        if branches is not None and (not isinstance(branches, list) or not branches):
            raise ValueError(f"{where}.{key} must be a list of schemas, not empty")
        for index, branch in enumerate(branches or ()):
            _check(branch, f"{where}.{key}[{index}]", root, depth + 1)
    for key in _SINGLE:
        if key in schema and not (key == "items" and isinstance(schema[key], list)):
            _check(schema[key], f"{where}.{key}", root, depth + 1)


def _check_values(schema: Mapping[str, Any], where: str) -> None:
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in _TYPES:
            raise ValueError(f"{where}.type: {kind!r} is none of {', '.join(_TYPES)}")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ValueError(f"{where}.required must be a list of property names")
    if "enum" in schema and (not isinstance(schema["enum"], list) or not schema["enum"]):
        raise ValueError(f"{where}.enum must be a list, not empty")
    for key in _COUNTS:
        if key in schema and (type(schema[key]) is not int or schema[key] < 0):
            raise ValueError(f"{where}.{key} must be a whole number, zero or more")
    for key in _NUMBERS:
        if key in schema and (isinstance(schema[key], bool) or not isinstance(schema[key], (int, float))):
            raise ValueError(f"{where}.{key} must be a number")
    if "pattern" in schema:
        try:
            re.compile(schema["pattern"])
        except (re.error, TypeError) as error:
            raise ValueError(f"{where}.pattern is not a regular expression: {error}") from None


def _resolve(reference: str, root: object, where: str) -> None:
    place = root
    for part in reference.removeprefix("#").strip("/").split("/") if reference != "#" else ():
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(place, Mapping) or name not in place:
            raise ValueError(f"{where}.$ref: {reference!r} leads nowhere")
        place = place[name]
