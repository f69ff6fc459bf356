"""``lowbit prune``: remove old snapshots from a backup, and what only they needed."""

from __future__ import annotations

import argparse
from datetime import timedelta

from lowbit.cli.backup_options import add_store_arguments, duration, open_backup
from lowbit.cli.options import positive
from lowbit.cli.output import human_bytes, write_json

HELP = "remove a backup's old snapshots and the blobs that no other one needs"
EXAMPLES = """\
  lowbit prune /mnt/backup --keep 30d
  lowbit prune s3://bucket/models --keep 12w --keep-last 3 --dry-run"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_store_arguments(parser)
    parser.add_argument(
        "--keep", metavar="TIME", type=duration, required=True, help="snapshots as young as this stay: 30d, 12w, 48h"
    )
    parser.add_argument(
        "--keep-last",
        metavar="N",
        type=positive,
        default=1,
        help="newest snapshots of each model that stay (default: 1)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prune and say what went."""
    from lowbit.ops.backup.check import prune

    result = prune(
        open_backup(arguments),
        keep=timedelta(hours=arguments.keep),
        keep_last=arguments.keep_last,
        dry_run=arguments.dry_run,
    )
    if arguments.json:
        write_json(result)
        return 0
    for name in result.snapshots:
        print(name)
    verb = "would remove" if arguments.dry_run else "removed"
    print(
        f"{verb} {len(result.snapshots)} snapshots, {result.blobs} blobs ({human_bytes(result.bytes)}) and "
        f"{result.leftovers} leftovers of killed runs; {result.kept} snapshots stay"
    )
    return 0
