"""Runs of the checkpoint writer in forked processes that kill themselves at a chosen file operation.

Imported by the tests; as a program (``python writer_run.py OUT``) it does one slow run for a parent that kills it.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint import Manifest, PartialCheckpoint
from lowbit.checkpoint import writer as writer_module
from lowbit.errors import LowbitError

PARTS = 3
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}

_EVENTS = frozenset(
    {
        "open",
        "os.rename",
        "os.remove",
        "os.mkdir",
        "os.rmdir",
        "os.truncate",
        "shutil.rmtree",
        "os.listdir",
        "os.scandir",
    }
)
DONE, FAILED, KILLED = 0, 3, -signal.SIGKILL


def part(index: int, size: int = 64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    return {
        f"block.{index}.weight": torch.randn(4, size, generator=generator),
        f"block.{index}.bias": torch.randn(size, generator=generator).to(torch.bfloat16),
        f"block.{index}.codes": torch.randint(0, 255, (size, 3), dtype=torch.uint8, generator=generator),
    }


def run(
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    size: int = 64,
    max_shard_bytes: int = 3000,
    manifest: bool = True,
) -> PartialCheckpoint:
    """One whole run, going on after the parts that the journal holds."""
    tokenizer = out.parent / "tokenizer.json"
    with PartialCheckpoint.create(out, "fingerprint", resume=resume, overwrite=overwrite) as partial:
        (partial.scratch / "activations").write_bytes(b"x" * 100) if not partial.finished else None
        done = {entry["index"] for entry in partial.journal}
        if not partial.finished:
            for index in range(PARTS):
                if index not in done:
                    partial.commit_part(index, part(index, size), {"module": f"block.{index}", "error": 0.25 * index})
        modules = {entry["module"]: {"error": entry["error"]} for entry in partial.journal}
        partial.finish(
            CONFIG,
            {"quantize_config.json": {"bits": 4}},
            [tokenizer],
            max_shard_bytes,
            manifest=Manifest("fingerprint", "0.1.0", {}, {}, modules=modules) if manifest else None,
        )
        return partial


def no_sync() -> None:
    """For :func:`in_child`: fsync costs a disk its time and makes no difference to a process that is killed."""
    os.fsync = lambda descriptor: None


def in_child(action: Callable[[], Any], before: Callable[[], None] = no_sync) -> int:
    """Fork, run ``before`` and ``action`` in the child; DONE, FAILED (a LowbitError) or minus the killing signal."""
    process = os.fork()
    if process == 0:
        status = 70
        try:
            before()
            action()
            status = DONE
        except LowbitError:
            status = FAILED
        except BaseException:  # noqa: BLE001 - a child must never return into the test runner
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_at(moment: int, root: Path) -> Callable[[], None]:
    """For :func:`in_child`: die at the ``moment``-th file operation under ``root`` (a journal line has two)."""
    seen = 0

    def tick() -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and arguments and str(arguments[0]).startswith(str(root)):
            tick()

    def torn(descriptor: int, data: bytes) -> None:
        half = len(data) // 2
        os.write(descriptor, data[:half])
        tick()
        os.write(descriptor, data[half:])

    def sync(descriptor: int) -> None:
        tick()

    def install() -> None:
        writer_module._write_all = torn
        os.fsync = sync
        sys.addaudithook(audit)

    return install


def full_at(moment: int) -> Callable[[], None]:
    """For :func:`in_child`: from the ``moment``-th fsync on, the disk is full."""
    seen = 0

    def sync(descriptor: int) -> None:
        nonlocal seen
        seen += 1
        if seen >= moment:
            raise OSError(errno.ENOSPC, "No space left on device")

    def install() -> None:
        os.fsync = sync

    return install


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), resume=True, size=60_000, max_shard_bytes=400_000)
