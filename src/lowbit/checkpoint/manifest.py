"""``lowbit.json``: what a checkpoint was made from, how, how far each module strays, and the hash of each file.

A GGUF file has it beside it, as ``NAME.lowbit.json``. Nothing in it depends on the hour, the machine or an
interruption: the same inputs give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lowbit.checkpoint.files import FileRecord, read_json_object, records_to_json, write_json
from lowbit.errors import CheckpointError

__all__ = [
    "MANIFEST_NAME",
    "MANIFEST_VERSION",
    "Manifest",
    "manifest_path",
    "read_manifest",
    "update_quality",
    "write_manifest",
]

MANIFEST_NAME = "lowbit.json"
MANIFEST_VERSION = 1
_SINGLE_FILE = re.compile(r"(?P<stem>.+?)(-\d{5}-of-\d{5})?\.gguf")


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of ``lowbit.json``.

    ``fingerprint``      identifies the run (source, recipe, calibration): ``--resume`` recognises its own work by it
    ``source``           path or id, sha256 of its config and of each weight file
    ``recipe``           the recipe as run, defaults filled in
    ``calibration``      name, sha256 of the token ids, samples, tokens; None where no data was used
    ``modules``          module name to spec, method, bits_per_weight, error …
    ``expert_coverage``  block name to tokens seen per expert; empty for a dense model
    ``quality``          the certificate of :func:`update_quality`, or None
    ``files``            file name to sha256 and bytes, all files of the directory but this one

    Values are plain JSON; a number that is not finite is refused when written.
    """

    fingerprint: str
    lowbit_version: str
    source: dict[str, Any]
    recipe: dict[str, Any]
    calibration: dict[str, Any] | None = None
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    expert_coverage: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] | None = None
    files: dict[str, FileRecord] = field(default_factory=dict)
    version: int = MANIFEST_VERSION

    def with_files(self, files: Mapping[str, FileRecord]) -> Manifest:
        """The same manifest vouching for ``files``."""
        return replace(self, files=dict(files))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, keys in a fixed order."""
        return {
            "version": self.version,
            "lowbit_version": self.lowbit_version,
            "fingerprint": self.fingerprint,
            "source": self.source,
            "recipe": self.recipe,
            "calibration": self.calibration,
            "modules": self.modules,
            "expert_coverage": self.expert_coverage,
            "quality": self.quality,
            "files": records_to_json(self.files),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str = MANIFEST_NAME) -> Manifest:
        """Inverse of :meth:`to_json`. Strict: :class:`CheckpointError` for a missing, unknown or mistyped field."""
        version = value.get("version")
        if version != MANIFEST_VERSION:
            raise CheckpointError(f"{where}: version {version!r} is not {MANIFEST_VERSION}: written by another lowbit?")
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(value) - known):
            raise CheckpointError(f"{where}: unknown field {unknown[0]!r}")
        for name, kinds in _KINDS.items():
            if name not in value:
                raise CheckpointError(f"{where}: field {name!r} is missing")
            if not isinstance(value[name], kinds):
                raise CheckpointError(f"{where}: field {name!r} has the wrong type ({type(value[name]).__name__})")
        for name, module in value["modules"].items():
            if not isinstance(module, dict):
                raise CheckpointError(f"{where}: modules[{name!r}] must be an object")
        files = {name: _record(name, record, where) for name, record in value["files"].items()}
        return cls(**{**value, "files": files})


_OBJECT_OR_NONE = (dict, type(None))
_KINDS: dict[str, type | tuple[type, ...]] = {
    "lowbit_version": str,
    "fingerprint": str,
    "source": dict,
    "recipe": dict,
    "calibration": _OBJECT_OR_NONE,
    "modules": dict,
    "expert_coverage": dict,
    "quality": _OBJECT_OR_NONE,
    "files": dict,
}


def _record(name: str, value: object, where: str) -> FileRecord:
    if not isinstance(value, dict) or set(value) != {"sha256", "bytes"}:
        raise CheckpointError(f"{where}: files[{name!r}] must hold sha256 and bytes")
    digest, size = value["sha256"], value["bytes"]
    if not isinstance(digest, str) or len(digest) != 64 or type(size) is not int or size < 0:
        raise CheckpointError(f"{where}: files[{name!r}] is not a sha256 and a length")
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        raise CheckpointError(f"{where}: files[{name!r}] is not a plain file name")
    return FileRecord(digest, size)


def manifest_path(checkpoint: Path) -> Path:
    """Where the manifest of a checkpoint lies: in its directory, or beside a GGUF file (one for all parts of it)."""
    if (match := _SINGLE_FILE.fullmatch(checkpoint.name)) and not checkpoint.is_dir():
        return checkpoint.with_name(f"{match['stem']}.{MANIFEST_NAME}")
    return checkpoint / MANIFEST_NAME


def read_manifest(checkpoint: Path) -> Manifest | None:
    """The manifest of a checkpoint (a directory or a GGUF file), or None where there is none.

    Raises :class:`CheckpointError` if it is damaged.
    """
    path = manifest_path(checkpoint)
    if not path.exists():
        return None
    return Manifest.from_json(read_json_object(path), str(path))


def write_manifest(checkpoint: Path, manifest: Manifest) -> FileRecord:
    """Write the manifest atomically; ValueError if a number in it is not finite."""
    path = manifest_path(checkpoint)
    return write_json(path, manifest.to_json(), "free some disk space and run again", allow_nan=False)


def update_quality(checkpoint: Path, certificate: Mapping[str, Any]) -> Manifest:
    """Put a quality certificate into a checkpoint's manifest, atomically.

    Raises :class:`CheckpointError` where the checkpoint has no manifest.
    """
    manifest = read_manifest(checkpoint)
    if manifest is None:
        raise CheckpointError(f"{checkpoint}: has no {MANIFEST_NAME} to hold a quality certificate")
    manifest = replace(manifest, quality=dict(certificate))
    write_manifest(checkpoint, manifest)
    return manifest
