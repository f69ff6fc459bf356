"""``lowbit backup-verify``: can everything in a backup be restored?"""

from __future__ import annotations

import argparse

from lowbit.cli.backup_options import add_store_arguments, open_backup
from lowbit.cli.options import add_report_arguments
from lowbit.cli.output import human_bytes, print_findings, print_table, write_json
from lowbit.cli.progress import shown_progress

HELP = "read a backup through: every snapshot and blob against its sha256"
EXAMPLES = """\
  lowbit backup-verify /mnt/backup
  lowbit backup-verify /mnt/backup --quick        # lists the snapshots; lengths only
  lowbit backup-verify /mnt/backup --set-aside    # then back up again: damaged blobs are written anew"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_store_arguments(parser)
    parser.add_argument("--snapshot", metavar="ID", help="only this one")
    parser.add_argument("--quick", action="store_true", help="look at lengths, do not read blobs")
    parser.add_argument("--set-aside", action="store_true", help="move damaged blobs to damaged/")
    add_report_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print snapshots and findings; the exit status is 2 if one is an error."""
    from lowbit.ops.backup.check import verify_backup

    store = open_backup(arguments)
    with shown_progress(quiet=arguments.quiet) as progress:
        result = verify_backup(
            store,
            snapshot=arguments.snapshot,
            quick=arguments.quick,
            set_aside=arguments.set_aside,
            progress=progress,
        )
    if arguments.json:
        write_json({"ok": result.ok, **{name: getattr(result, name) for name in type(result).__slots__}})
        return 0 if result.ok else 2
    if result.snapshots:
        rows = [
            [
                state.id,
                "whole" if state.ok else "DAMAGED",
                human_bytes(sum(state.models.values())),
                ", ".join(state.models),
            ]
            for state in result.snapshots
        ]
        print_table(["snapshot", "state", "size", "models"], rows)
    print_findings(result.findings)
    count, size = result.unreferenced
    spare = f"; {count} blobs ({human_bytes(size)}) belong to no snapshot: prune removes them" if count else ""
    how = "read and hashed" if result.read else "looked at (lengths only)"
    verdict = "whole" if result.ok else "DAMAGED"
    print(f"{verdict}: {store.shown}: {result.blobs} blobs, {human_bytes(result.bytes)}, {how}{spare}")
    return 0 if result.ok else 2
