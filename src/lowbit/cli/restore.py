"""``lowbit restore``: bring back what ``lowbit backup`` kept, and show that it is whole."""

from __future__ import annotations

import argparse
from pathlib import Path

from lowbit.cli.backup_options import add_store_arguments, open_backup
from lowbit.cli.options import add_report_arguments
from lowbit.cli.output import human_bytes, write_json
from lowbit.cli.progress import shown_progress

HELP = "bring models back from a backup to a new path, every chunk and file checked"
EXAMPLES = """\
  lowbit restore /mnt/backup ./restored --smoke
  lowbit restore s3://bucket/models ./Qwen3-8B --model Qwen3-8B-W4A16 --snapshot 20260131T120000.000Z-0123abcd"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    add_store_arguments(parser)
    parser.add_argument("out", metavar="OUT", help="a directory that is not there yet")
    parser.add_argument("--snapshot", metavar="ID", help="default: the newest (backup-verify --quick lists them)")
    parser.add_argument("--model", metavar="NAME", help="only this one; OUT is then its directory")
    parser.add_argument("--overwrite", action="store_true", help="replace the directory OUT when the new one is proven")
    parser.add_argument(
        "--smoke", action="store_true", help="before it is called OUT, verify each checkpoint and answer one prompt"
    )
    add_report_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Restore, and say what shows that it is whole."""
    from lowbit.ops.backup.restore import restore
    from lowbit.ops.backup.smoke import smoke_test

    store = open_backup(arguments)
    with shown_progress(quiet=arguments.quiet) as progress:
        result = restore(
            store,
            Path(arguments.out),
            snapshot=arguments.snapshot,
            model=arguments.model,
            overwrite=arguments.overwrite,
            smoke=smoke_test if arguments.smoke else None,
            progress=progress,
        )
    if arguments.json:
        write_json(result)
        return 0
    for proof in result.proofs:
        print(proof)
    print(
        f"{result.out}: {', '.join(result.models)} from snapshot {result.snapshot}: {result.files} files, "
        f"{human_bytes(result.bytes)}, of which {human_bytes(result.fetched_bytes)} fetched now"
    )
    return 0
