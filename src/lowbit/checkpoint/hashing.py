"""A sha256 of many pieces, computed beside whatever else is done with them."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

__all__ = ["HashBeside"]


class HashBeside:
    """The hash of the pieces given to :meth:`update`, in a thread: hashlib lets go of the interpreter meanwhile.

    At most one piece is on its way; the caller must not change it until the next call or :meth:`wait`. Use as a context
    manager.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> HashBeside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def update(self, data: bytes | memoryview) -> None:
        """Add a piece, when the one before has been added."""
        self.wait()
        self._pending = self._pool.submit(self._digest.update, data)

    def hexdigest(self) -> str:
        """The hash of all pieces."""
        self.wait()
        return self._digest.hexdigest()

    def wait(self) -> None:
        """Until the last piece has been added."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None
