"""Log files of engines: bounded by rotation, with the last lines at hand for error messages."""

from __future__ import annotations

from collections import deque
from pathlib import Path

__all__ = ["EngineLog"]


class EngineLog:
    """What an engine prints. Kept in ``path`` and ``path.1`` … up to ``files`` of ``size`` bytes each; None: nowhere.

    The last 40 lines stay in memory.
    """

    def __init__(self, path: Path | None, size: int = 8 * 1024**2, files: int = 3) -> None:
        self._path, self._size, self._files = path, size, files
        self._lines: deque[str] = deque(maxlen=40)
        self._partial = b""
        self._written = 0
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            self._written = self._file.tell()

    def write(self, data: bytes) -> None:
        """Take what the engine printed, in any pieces."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._partial = self._partial[-4096:]
        self._lines.extend(line.decode("utf-8", "replace").strip() for line in lines[-40:] if line.strip())
        if self._file is None:
            return
        if self._written + len(data) > self._size and self._written:
            self._rotate()
        self._file.write(data)
        self._file.flush()
        self._written += len(data)

    def tail(self, count: int = 5) -> list[str]:
        """The last lines that are not empty."""
        partial = self._partial.decode("utf-8", "replace").strip()
        return [*self._lines, *([partial] if partial else [])][-count:]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rotate(self) -> None:
        if self._path is None or self._file is None:
            return
        self._file.close()
        for number in range(self._files - 1, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            newer = self._path.with_name(f"{self._path.name}.{number - 1}") if number > 1 else self._path
            if newer.exists():
                newer.replace(older)
        self._file = self._path.open("wb")
        self._written = 0
