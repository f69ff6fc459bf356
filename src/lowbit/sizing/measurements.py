"""Certificates that were measured on a model's quantized copies: what a recommendation goes by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lowbit.checkpoint import MANIFEST_NAME, Manifest, read_manifest
from lowbit.errors import CheckpointError, UsageError
from lowbit.planning.choice import Measured


def find_measurements(model: str | Path, directories: Sequence[str | Path] = ()) -> dict[str, list[Measured]]:
    """Certificates by number format, of copies of ``model`` in ``directories`` and beside the model itself.

    A copy is one whose manifest names the model as its source. Raises :class:`UsageError` for a directory without a
    certificate, among those that were named.
    """
    found: dict[str, list[Measured]] = {}
    for named in directories:
        manifest = read_manifest(Path(named))
        if manifest is None or not manifest.quality:
            raise UsageError(f"--measured {named}: no certificate there: measure it with lowbit eval {named} --against")
        _add(found, Path(named).name, manifest)
    for path, manifest in _beside(Path(model)):
        if manifest.source.get("name") in (Path(model).name, str(model)):
            _add(found, path.name, manifest)
    return found


def best(found: Iterable[Measured]) -> Measured | None:
    """The measurement of the least divergence."""
    return min(found, key=lambda entry: entry.divergence, default=None)


def _beside(model: Path) -> Iterator[tuple[Path, Manifest]]:
    parent = model.parent if model.exists() else Path()
    for path in sorted(parent.glob(f"*/{MANIFEST_NAME}")):
        try:
            manifest = read_manifest(path.parent)
        except CheckpointError:
            continue
        if manifest is not None and manifest.quality:
            yield path.parent, manifest


def _add(found: dict[str, list[Measured]], name: str, manifest: Manifest) -> None:
    quality = manifest.quality or {}
    perplexity, reference = quality.get("perplexity"), quality.get("reference_perplexity")
    if not isinstance(perplexity, int | float) or not isinstance(reference, int | float) or not reference:
        return
    specs = {str(entry.get("spec")) for entry in manifest.modules.values()}
    if len(specs) != 1:
        return
    method = str(manifest.recipe.get("method", ""))
    measured = Measured(name, method, perplexity / reference - 1, float(quality.get("kl_divergence") or 0.0))
    found.setdefault(specs.pop(), []).append(measured)
