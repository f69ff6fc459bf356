"""Every `lowbit` command in the documentation parses; `make test-docs` also runs those that need no other machine."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowbit.cli.main import VERBS, build_parser
from lowbit.errors import UsageError

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
_FENCE = re.compile(r"^ *```.*?\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_PLACEHOLDER = re.compile(r"[…\[\]<>]|\.\.\.| \| ")


def documented() -> Iterator[tuple[str, str]]:
    """Page and command, continued lines joined and remarks taken off; synopses with placeholders left out."""
    blocks = [
        (str(page.relative_to(ROOT)), block) for page in PAGES for block in _FENCE.findall(page.read_text("utf-8"))
    ]
    blocks += [(f"{verb} --help", module.EXAMPLES) for verb, module in VERBS.items()]
    for page, block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"\s#\s.*", "", line.strip().removeprefix("$ ")).strip()
            if command.startswith("lowbit ") and not _PLACEHOLDER.search(command):
                yield page, " ".join(command.split())


COMMANDS = list(dict.fromkeys(documented()))


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_parses(page: str, command: str) -> None:
    try:
        build_parser().parse_args(shlex.split(command)[1:])
    except UsageError as error:
        pytest.fail(f"{page}: {command}: {error}")
