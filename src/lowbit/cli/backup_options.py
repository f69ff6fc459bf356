"""Arguments that the verbs of backups share."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from lowbit.errors import UsageError

if TYPE_CHECKING:
    from lowbit.ops.backup.store import Store

_TIME = re.compile(r"(?P<number>\d+)(?P<unit>[hdwmy])")
_HOURS = {"h": 1, "d": 24, "w": 7 * 24, "m": 30 * 24, "y": 365 * 24}


def add_store_arguments(parser: argparse.ArgumentParser) -> None:
    """``DEST`` and ``--option``."""
    parser.add_argument(
        "dest", metavar="DEST", help="a directory, or a url that fsspec knows: s3://bucket/path, ssh://host/path …"
    )
    parser.add_argument(
        "--option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="for the filesystem behind the url, e.g. endpoint_url=…; keys and passwords stay where its library looks "
        "for them (environment, ~/.aws, ~/.ssh); may be repeated",
    )


def open_backup(arguments: argparse.Namespace) -> Store:
    """The place that ``DEST`` names."""
    from lowbit.ops.backup.store import open_store

    options = {}
    for text in arguments.option:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise UsageError(f"--option {text!r} is not KEY=VALUE")
        options[key] = value
    return open_store(arguments.dest, options)


def duration(text: str) -> int:
    """``30d``, ``48h``, ``12w``, ``6m`` (of 30 days) or ``1y`` in hours."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time: write e.g. 30d, 48h, 12w, 6m or 1y")
    hours = int(match["number"]) * _HOURS[match["unit"]]
    if hours > 1000 * _HOURS["y"]:
        raise argparse.ArgumentTypeError(f"{text!r} is longer than a thousand years")
    return hours
