"""The ``lowbit`` command: parses the verb, runs it, and turns every user error into one line and exit status 2."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from lowbit import __version__
from lowbit.cli import (
    alerts,
    backup,
    backup_verify,
    bench,
    chat,
    compare,
    convert,
    demo,
    deploy,
    doctor,
    estimate,
    evaluate,
    fit,
    generate,
    imatrix,
    inspect,
    plan,
    prune,
    quantize,
    recommend,
    restore,
    serve,
    tune,
    verify,
)
from lowbit.errors import LowbitError, UsageError

VERBS = {
    "estimate": estimate,
    "recommend": recommend,
    "quantize": quantize,
    "fit": fit,
    "eval": evaluate,
    "compare": compare,
    "inspect": inspect,
    "convert": convert,
    "imatrix": imatrix,
    "verify": verify,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "bench": bench,
    "tune": tune,
    "plan": plan,
    "backup": backup,
    "backup-verify": backup_verify,
    "restore": restore,
    "prune": prune,
    "alerts": alerts,
    "doctor": doctor,
    "deploy": deploy,
    "demo": demo,
}
"""Verb to the module with its ``HELP``, ``EXAMPLES``, ``add_arguments`` and ``run``."""

FAILED = 2
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is a :class:`UsageError` of one line, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise :class:`UsageError` with the way to the help page."""
        raise UsageError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; building it imports neither torch nor transformers."""
    parser = Parser(
        prog="lowbit",
        description="Take a Hugging Face checkpoint to a verified low-bit one.",
        epilog="lowbit VERB --help explains a verb with examples. Try first: lowbit demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lowbit {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, dest="verb", parser_class=Parser)
    for name, module in VERBS.items():
        verb = verbs.add_parser(
            name,
            help=module.HELP,
            description=module.HELP[0].upper() + module.HELP[1:] + ".",
            epilog=f"examples:\n{module.EXAMPLES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 2 an error (of one line) or damage, 130 interrupted."""
    # Read when torch is loaded. By default OpenMP's threads spin at every barrier: beside another busy process that
    # was measured at up to four times the processor time of the work itself.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    hint = ""
    try:
        arguments = build_parser().parse_args(argv)
        if arguments.verb == "quantize" and not arguments.out.endswith(".gguf"):
            hint = ": the same command with --resume goes on from the last finished block"
        return int(arguments.run(arguments))
    except SystemExit as leaving:  # --help and --version
        return int(leaving.code or 0)
    except LowbitError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        print(f"\nlowbit: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone: leave quietly, and keep the interpreter from flushing into the pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        return complain("out of memory: lower --memory, --samples or --seq-len")
    except OSError as error:
        return complain(describe_os_error(error))


def complain(message: str) -> int:
    """Print the one line of an error and return its exit status."""
    print(f"lowbit: error: {' '.join(message.split())}", file=sys.stderr)
    return FAILED


def describe_os_error(error: OSError) -> str:
    """What the operating system refused, where, and what to do about it."""
    where = f"{error.filename}: " if error.filename else ""
    text = f"{where}{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{text}: free some space; quantize goes on with --resume"
    return text
