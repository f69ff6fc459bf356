"""Holds the layers of the design: a package imports only from packages above it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "lowbit"

LAYERS = (
    "errors",
    "cache",
    "formats",
    "kernels",
    "checkpoint",
    "codecs",
    "quant",
    "devices",
    "planning",
    "calibration",
    "pipeline",
    "evaluation",
    "sizing",
    "engines",
    "gateway",
    "ops",
    "cli",
)
"""From the top: what stands on the left of another may be imported by it, and not the other way round."""

BESIDE = {"demo": "cli"}
"""Packages beside a layer: they may import what it may, and only it may import them."""

ROOT = {"__version__"}
"""Names of the package itself that every layer may use."""


def rank(package: str) -> int:
    """The place of a package among the layers."""
    return LAYERS.index(BESIDE.get(package, package))


def imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """``(line, dotted name)`` of everything of lowbit that a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def upward_imports(path: Path, root: Path = SOURCE) -> list[str]:
    """Complaints about the imports of one file of the package."""
    relative = path.relative_to(root.parent)
    own = relative.parts[1].removesuffix(".py")
    found = []
    for line, name in imports(ast.parse(path.read_text(encoding="utf-8")), ".".join(relative.parts[:-1])):
        parts = name.split(".")
        if parts[0] != "lowbit" or len(parts) == 1 or parts[1] == own or parts[1] in ROOT:
            continue
        if parts[1] not in LAYERS and parts[1] not in BESIDE:
            found.append(f"{relative}:{line}: {name} is in no layer")
        elif rank(parts[1]) > rank(own) or (parts[1] in BESIDE and BESIDE[parts[1]] != own):
            found.append(f"{relative}:{line}: {own} may not import {name}")
    return found


FILES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.stem in LAYERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_go_up_only(path: Path) -> None:
    assert upward_imports(path) == []


def test_every_package_has_its_layer() -> None:
    packages = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()}
    assert packages <= {*LAYERS, *BESIDE}


@pytest.mark.parametrize(
    ("file", "code", "refused"),
    [
        ("planning/x.py", "from lowbit.pipeline.quantize import quantize", True),
        ("planning/x.py", "def f():\n    import lowbit.evaluation", True),
        ("codecs/x.py", "from ..quant import gptq", True),
        ("codecs/x.py", "from lowbit import evaluation", True),
        ("evaluation/x.py", "from lowbit.demo import corpus", True),
        ("errors.py", "from lowbit.formats import IntSpec", True),
        ("codecs/x.py", "import lowbit.elsewhere", True),
        ("codecs/x.py", "from ..formats import IntSpec\nfrom . import gptq\nfrom lowbit import __version__", False),
        ("cli/x.py", "from lowbit.demo import corpus\nimport torch", False),
    ],
)
def test_the_check_itself(tmp_path: Path, file: str, code: str, refused: bool) -> None:
    path = tmp_path / "lowbit" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    assert bool(upward_imports(path, tmp_path / "lowbit")) is refused
