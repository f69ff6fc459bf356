"""The Python API: what ``import lowbit`` offers, and what it costs."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lowbit
from lowbit.evaluation.certify import QuantizeSettings
from lowbit.pipeline.gguf import GgufSettings
from lowbit.pipeline.job import Settings

INIT = Path(lowbit.__file__)
VERBS = {"quantize", "evaluate", "convert", "inspect", "verify"}


def test_all_is_sorted_and_complete() -> None:
    assert lowbit.__all__ == sorted(lowbit.__all__)
    assert set(lowbit.__all__) >= VERBS
    assert set(lowbit.__all__) == set(lowbit._ORIGINS) | {"__version__"}


@pytest.mark.parametrize("name", lowbit.__all__)
def test_every_name_loads(name: str) -> None:
    value = getattr(lowbit, name)
    if name in VERBS:
        assert callable(value)


def test_errors_are_the_errors() -> None:
    errors = importlib.import_module("lowbit.errors")
    for name in errors.__all__:
        assert getattr(lowbit, name) is getattr(errors, name)


def test_type_checkers_see_what_runs() -> None:
    """The imports for type checkers and the table for run time name the same things."""
    block = next(node for node in ast.parse(INIT.read_text()).body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == lowbit._ORIGINS


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = lowbit.quantise  # type: ignore[attr-defined]


def test_dir_lists_the_api() -> None:
    assert set(lowbit.__all__) <= set(dir(lowbit))


@pytest.mark.parametrize("module", ["lowbit", "lowbit.cli.main"])
def test_import_is_light(module: str) -> None:
    heavy = ("torch", "transformers", "numba", "matplotlib")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version_matches_the_package() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'version = "{lowbit.__version__}"' in text


def test_quantize_names_every_setting() -> None:
    names = {f.name for kind in (Settings, GgufSettings) for f in dataclasses.fields(kind)}
    assert set(QuantizeSettings.__annotations__) == names - {"held_out_tokens"} | {"resume", "overwrite", "executor"}
