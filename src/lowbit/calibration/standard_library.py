"""Text that is on every machine: the Python standard library, split by module name.

The demo model is trained on one half. The split is by name, so every machine agrees on what it has never seen,
whichever Python version it runs.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT = (
    "argparse",
    "calendar",
    "cmd",
    "configparser",
    "csv",
    "fractions",
    "heapq",
    "json",
    "queue",
    "sched",
    "shelve",
    "statistics",
    "tarfile",
    "textwrap",
    "wsgiref",
)
"""Modules kept out of training, with their tests: the text that certificates are measured on."""

# Character tables and generated help pages: data rather than code.
_TABLES = (
    "encodings/",
    "pydoc_data/",
    "lib2to3/tests/data",
    "test/test_unicode",
    "test/cjkencodings",
    "site-packages/",
)


def standard_library() -> Path:
    """The directory of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def _module(path: str) -> str:
    """The module that a path below the standard library belongs to, tests counted with what they test."""
    parts = path.removesuffix(".py").split("/")
    for part in parts:
        if part.startswith("test_"):
            return part.removeprefix("test_").split("_")[0]
    return parts[0]


def sources(root: Path | None = None, *, held_out: bool) -> Iterator[tuple[str, str]]:
    """Yield ``(relative path, text)`` of every module file in or out of the held-out set, in a fixed order.

    Held-out text is library code only; tests of held-out modules are in neither half.
    """
    root = root or standard_library()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(table in name for table in _TABLES):
            continue
        is_held_out = _module(name) in HELD_OUT
        if is_held_out != held_out or (held_out and "test" in name):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield name, text


def held_out_text(root: Path | None = None) -> str:
    """The held-out modules as one text, each led by a comment with its file name."""
    return "\n\n".join(f"# {name}\n{text}" for name, text in sources(root, held_out=True))
