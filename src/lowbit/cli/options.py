"""Arguments that several verbs share, and the values they parse."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

from lowbit.errors import UsageError

METHODS = ("gptq", "gptaq", "autoround", "awq", "hqq", "rtn", "best")
PRUNERS = ("sparsegpt", "wanda", "magnitude")
TRANSFORMS = ("awq", "smoothquant", "none")
FORMATS = ("compressed-tensors", "gptq", "gptq_v2", "awq", "bitsandbytes", "hqq", "dense")
"""The names in the registries of methods, transforms and codecs, repeated here so that ``--help`` needs no torch; a
test holds them together."""

SOURCE_HELP = "a Hugging Face directory, a .gguf file, a hub id (owner/name), or 'demo', the model that comes along"

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]?)(?P<binary>i?)B?", re.IGNORECASE)


def parse_bytes(text: str, flag: str = "--memory") -> int:
    """``4GiB``, ``4G``, ``500MB`` or ``1000000`` as bytes: ``GiB`` and ``G`` are binary, ``GB`` is decimal."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{flag} {text!r} is not a size: write e.g. 4GiB or 800MiB")
    if float(match["number"]) <= 0:
        raise UsageError(f"{flag} {text}: nothing fits in that: give more, e.g. 4GiB")
    power = " KMGT".index(match["unit"].upper() or " ")
    decimal = power > 0 and text.strip().upper().endswith("B") and not match["binary"]
    return int(float(match["number"]) * (1000 if decimal else 1024) ** power)


def size_of(flag: str) -> Callable[[str], int]:
    """:func:`parse_bytes` for an argument called ``flag``."""
    return lambda text: parse_bytes(text, flag)


def positive(text: str) -> int:
    """A whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def number(text: str) -> float:
    """A finite number, not below zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of zero or more")
    return value


def add_generation_arguments(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """How text is drawn from a model, and where it runs."""
    parser.add_argument(
        "--max-tokens", metavar="N", type=positive, default=max_tokens, help=f"longest answer (default: {max_tokens})"
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=number,
        default=0.8,
        help="0 takes the likeliest token each time (default: 0.8)",
    )
    parser.add_argument(
        "--top-p", metavar="P", type=number, default=0.95, help="draw among the likeliest of this total (default: 0.95)"
    )
    parser.add_argument("--seed", metavar="N", type=seed, help="the same text for the same seed (default: a new one)")
    parser.add_argument(
        "--context", metavar="N", type=positive, help="tokens of prompt and answer (default: the model's, at most 4096)"
    )
    parser.add_argument("--threads", metavar="N", type=positive, help="processor threads (default: the physical cores)")


def seed(text: str) -> int:
    """A whole number from 0 to 2**32 - 2; llama.cpp takes the next one for "none"."""
    if not text.isdecimal() or int(text) > 2**32 - 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 2}")
    return int(text)


def split_size(text: str) -> int:
    """The bytes of ``--split-size``, at least a million."""
    size = parse_bytes(text, "--split-size")
    if size < 1_000_000:
        raise UsageError(f"--split-size {text!r} makes too many files: write e.g. 4GB")
    return size


def add_calibration_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """``--calibration``, ``--samples``, ``--seq-len`` and ``--seed``."""
    parser.add_argument(
        "--calibration",
        metavar="FILE|NAME|self",
        help="text, JSONL, JSON or parquet; general, code, medical, legal or chinese; a hub data set; or text sampled "
        "from the model itself",
    )
    parser.add_argument("--samples", type=positive, default=128, metavar="N", help="sequences (default: 128)")
    parser.add_argument("--seq-len", type=positive, default=2048, metavar="N", help="tokens in each (default: 2048)")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="of the choice of text (default: 42)")


def add_compute_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """``--device`` and ``--memory``."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: a GPU if present)"
    )
    parser.add_argument(
        "--memory", metavar="SIZE", type=parse_bytes, help="memory to stay within, e.g. 4GiB; the rest goes to disk"
    )


def add_report_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """``--json`` and ``--quiet``."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def add_trust_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """``--allow-pickle`` and ``--trust-remote-code``."""
    parser.add_argument(
        "--allow-pickle", action="store_true", help="also read .bin files (pickle), with torch's weights-only loader"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that comes with the checkpoint"
    )
