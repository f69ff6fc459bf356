"""``lowbit backup``: keep models where a lost disk does not reach them."""

from __future__ import annotations

import argparse

from lowbit.cli.backup_options import add_store_arguments, open_backup
from lowbit.cli.options import SOURCE_HELP, add_report_arguments, parse_bytes
from lowbit.cli.output import human_bytes, write_json
from lowbit.cli.progress import shown_progress
from lowbit.errors import UsageError

HELP = "keep models at another place, incrementally: every byte once, each file by its sha256"
EXAMPLES = """\
  lowbit backup ./Qwen3-8B-W4A16 ./Qwen3-8B-Q4_K_M.gguf /mnt/backup
  lowbit backup ./Qwen3-8B-W4A16 s3://bucket/models --option endpoint_url=http://minio:9000
  lowbit backup ./Qwen3-8B-W4A16 ssh://host/backup    # interrupted: the same command goes on"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb."""
    parser.add_argument("models", metavar="MODEL", nargs="+", help=f"{SOURCE_HELP}; or any directory")
    add_store_arguments(parser)
    parser.add_argument(
        "--chunk",
        metavar="SIZE",
        type=chunk_size,
        help="cut files in pieces of so much, fixed by the first backup (default: 64MiB)",
    )
    parser.add_argument("--unverified", action="store_true", help="also keep a model that its lowbit.json disowns")
    parser.add_argument(
        "--read-all", action="store_true", help="read files again that look as they did at the last backup"
    )
    add_report_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Make the snapshot and say what it took."""
    from lowbit.ops.backup.run import back_up

    store = open_backup(arguments)
    with shown_progress(quiet=arguments.quiet) as progress:
        result = back_up(
            arguments.models,
            store,
            chunk_bytes=arguments.chunk,
            unverified=arguments.unverified,
            read_all=arguments.read_all,
            progress=progress,
        )
    if arguments.json:
        write_json(result)
        return 0
    print(
        f"snapshot {result.snapshot}: {', '.join(result.models)}: {result.files} files, {human_bytes(result.bytes)}; "
        f"{human_bytes(result.new_bytes)} in {result.new_blobs} blobs were new, {result.unread} files unchanged"
    )
    return 0


def chunk_size(text: str) -> int:
    """The bytes of ``--chunk``: one chunk is held in memory at a time."""
    size = parse_bytes(text, "--chunk")
    if size > 1 << 30:
        raise UsageError(f"--chunk {text!r} is more than 1GiB, which is held in memory at a time")
    return size
