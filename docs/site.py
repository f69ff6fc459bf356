"""Hooks of the documentation site: the front page is the README, the reference is made from the code.

Run by mkdocs (`make docs`), in an environment that has lowbit installed as well.
"""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files of docs/."""
    pages = {"index.md": front_page(), "reference/commands.md": commands(), "reference/python.md": python()}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def front_page() -> str:
    """The README, its links relative to docs/."""
    return re.sub(r"\]\(docs/", "](", (ROOT / "README.md").read_text(encoding="utf-8"))


def commands() -> str:
    """A section for each verb: what it is for, examples, and a table of its flags."""
    from lowbit.cli.main import VERBS, build_parser

    verbs = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    parts = ["# Every flag", "Made from the program's own help. `lowbit VERB --help` prints the same."]
    for name, module in VERBS.items():
        parser = verbs.choices[name]
        parts += [f"## {name}", f"{module.HELP[0].upper()}{module.HELP[1:]}."]
        parts.append(f"```\n{inspect.cleandoc('  ' + module.EXAMPLES)}\n```")
        shown = [action for action in parser._actions if action.dest != "help" and action.help != argparse.SUPPRESS]
        rows = [_row(action) for action in shown]
        parts.append("\n".join(["| argument | meaning |", "|---|---|", *rows]))
    return "\n\n".join(parts)


def _row(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    if action.option_strings and action.nargs != 0:
        choices = "|".join(map(str, action.choices)) if action.choices else action.dest.upper()
        names += f" `{action.metavar or choices}`"
    meaning = (action.help or "") % {**vars(action), "prog": "lowbit"}
    return "| {} | {} |".format(names.replace("|", "\\|"), meaning.replace("|", "\\|"))


def python() -> str:
    """The names that `import lowbit` offers, with their signatures and docstrings."""
    import lowbit

    parts = ["# Python", "Everything that `import lowbit` offers. Modules below it may change without notice."]
    for name in sorted(lowbit.__all__):
        thing = getattr(lowbit, name)
        if callable(thing):
            try:
                signature = str(inspect.signature(thing))
            except (TypeError, ValueError):
                signature = ""
            parts += [f"## `{name}`", f"```python\n{name}{signature}\n```", inspect.getdoc(thing) or ""]
        else:
            parts += [f"## `{name}`", f"`{thing!r}`"]
    return "\n\n".join(parts)
