"""Opening a model on disk, whatever it is: Hugging Face's files or GGUF."""

from __future__ import annotations

from pathlib import Path

from lowbit.checkpoint import Checkpoint, locate, open_checkpoint
from lowbit.codecs.gguf.checkpoint import open_gguf_checkpoint

__all__ = ["open_model"]


def open_model(
    source: str | Path, *, revision: str | None = None, allow_pickle: bool = False, trust_remote_code: bool = False
) -> Checkpoint:
    """Open a checkpoint: a directory, a hub id, ``"demo"``, a GGUF file or a directory that holds nothing but one.

    See :func:`lowbit.checkpoint.open_checkpoint` and :func:`lowbit.codecs.gguf.checkpoint.open_gguf_checkpoint`, whose
    errors are raised.
    """
    path = locate(source, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    if path.is_file():
        return open_gguf_checkpoint(path)
    return open_checkpoint(path, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
