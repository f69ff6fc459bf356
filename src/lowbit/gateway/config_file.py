"""YAML with the line of every key, and pydantic's complaints as one line that a person can act on."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lowbit.errors import UsageError

__all__ = ["Lines", "explain", "read_yaml"]

Lines = dict[tuple[str | int, ...], int]
"""The line (from 1) of each value, by its path of keys and indexes."""


def read_yaml(path: Path) -> tuple[Any, Lines]:
    """The plain values of a file and their lines. Raises :class:`UsageError` for what is unreadable or repeated."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            raise UsageError(f"{path}: is empty; it must at least have models:")
        lines: Lines = {}
        _note_lines(node, (), lines, str(path))
        return yaml.safe_load(text), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise UsageError(f"{path}{where}: not valid YAML ({problem})") from error


def _note_lines(node: yaml.Node, path: tuple[str | int, ...], lines: Lines, where: str) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            line = key.start_mark.line + 1
            if name in seen:
                raise UsageError(f"{where}:{line}: key {name!r} is given twice")
            seen.add(name)
            lines[(*path, name)] = line
            _note_lines(value, (*path, name), lines, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _note_lines(value, (*path, index), lines, where)


def explain(error: ValidationError, model: type[BaseModel], where: str, lines: Lines) -> str:
    """The complaint that explains most, as ``file:line: key: what is wrong``; an unknown key with a suggestion."""
    complaints = error.errors(include_url=False)
    # a misspelt key is also missing under its right name: say what was misspelt
    first = next((each for each in complaints if each["type"] == "extra_forbidden"), complaints[0])
    location = tuple(first["loc"])
    line = next((lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines), lines.get(()))
    place = f"{where}:{line}" if line else where
    key = ".".join(str(part) for part in location)
    kind, message = first["type"], first["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        known = _keys(model, location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"
        return f"{place}: unknown key {key!r}: {hint}"
    if kind == "missing":
        return f"{place}: {key} is missing"
    got = f", not {first['input']!r}" if isinstance(first["input"], str | int | float | bool | None) else ""
    return f"{place}: {key or 'the whole'}: {message[:1].lower()}{message[1:]}{got if kind != 'value_error' else ''}"


def _keys(model: type[BaseModel], path: tuple[str | int, ...]) -> list[str]:
    """The keys that are known at ``path``, found by walking the annotations."""
    current: Any = model
    for part in path:
        if _is_model(current):
            field = current.model_fields.get(str(part))
            current = field.annotation if field else None
        else:
            current = getattr(current, "__args__", (None,))[-1]
    return list(current.model_fields) if _is_model(current) else []


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
