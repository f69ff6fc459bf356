"""Writing a picture where the user wants it."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from lowbit.errors import ResourceError, UsageError


def write_figure(figure: Figure, path: str | Path) -> None:
    """Save ``figure`` into a file whose ending names the format (``--png``).

    Raises :class:`UsageError` for an ending that is unknown and :class:`ResourceError` where it cannot be written.
    """
    target = Path(path)
    supported = figure.canvas.get_supported_filetypes()
    if target.suffix.lstrip(".").lower() not in supported:
        raise UsageError(f"--png {path}: the name must end in .png (or {', '.join(sorted(supported))})")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=150)
    except OSError as error:
        raise ResourceError(f"--png {path}: cannot be written ({error.strerror}): name another file") from error
