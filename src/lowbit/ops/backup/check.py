"""Whether a backup can be relied on, and making room in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from lowbit.errors import CheckpointError, LowbitError, UsageError
from lowbit.evaluation.findings import Finding
from lowbit.ops.backup.lock import locked
from lowbit.ops.backup.manifest import SavedModel, Snapshot
from lowbit.ops.backup.store import Store
from lowbit.pipeline.progress import Progress, Silent

__all__ = ["BackupCheck", "Pruned", "SnapshotState", "prune", "verify_backup"]


@dataclass(frozen=True, slots=True)
class SnapshotState:
    """One snapshot and whether everything that it needs is there; ``models`` to bytes, empty where it is unreadable."""

    id: str
    created: str | None
    models: Mapping[str, int]
    ok: bool


@dataclass(frozen=True, slots=True)
class BackupCheck:
    """What :func:`verify_backup` found; ``blobs`` of ``bytes`` were looked at, ``read`` says whether their content was.

    ``unreferenced`` are blobs and bytes that no snapshot needs, which prune removes.
    """

    snapshots: tuple[SnapshotState, ...]
    blobs: int
    bytes: int
    read: bool
    unreferenced: tuple[int, int]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What :func:`prune` removed, or would remove: ids of snapshots, and blobs; ``kept`` snapshots stay."""

    snapshots: tuple[str, ...]
    blobs: int
    bytes: int
    leftovers: int
    kept: int


def verify_backup(
    store: Store,
    *,
    snapshot: str | None = None,
    quick: bool = False,
    set_aside: bool = False,
    progress: Progress | None = None,
) -> BackupCheck:
    """Check all snapshots, or one: that each is what was written, and each of its blobs there and unchanged.

    Every blob is read and hashed; ``quick`` looks at lengths only, ``set_aside`` moves damaged blobs away so that the
    next backup writes them anew. Damage becomes findings.
    """
    progress = progress or Silent()
    store.check()
    findings: list[Finding] = []
    names = store.snapshot_ids()
    if snapshot is not None:
        store.snapshot(snapshot)
        names = [snapshot]
    snapshots = _readable(store, names, findings)
    needed = _needed(snapshots.values())
    known = store.blobs()
    bad: dict[str, str] = {}
    progress.start("Checking blobs", len(needed))
    for digest, size in sorted(needed.items()):
        problem = _problem(store, known, digest, size, quick)
        if problem is not None:
            bad[digest] = problem
        progress.advance(digest[:16])
    still = set(store.snapshot_ids())  # a prune meanwhile may have removed some, with their blobs
    states = []
    for name in names:
        found = snapshots.get(name)
        if found is not None and name not in still:
            continue
        damage = () if found is None else tuple(_damage(found, bad))
        findings += [Finding("error", f"snapshot {name}", text) for text in damage]
        created = None if found is None else found.created.isoformat()
        sizes = {} if found is None else {key: model.total_bytes for key, model in found.models.items()}
        states.append(SnapshotState(name, created, sizes, found is not None and not damage))
    for digest in bad if set_aside else ():
        if digest in known:
            store.set_aside(digest)
            findings.append(
                Finding("note", f"blob {digest[:16]}…", "moved to damaged/: back up the same models again to mend it")
            )
    orphans = (0, 0)
    if snapshot is None and len(snapshots) == len(names):
        spare = [size for digest, size in known.items() if digest not in needed]
        orphans = (len(spare), sum(spare))
    leftovers = store.leftovers()
    if leftovers:
        findings.append(Finding("note", store.shown, f"{len(leftovers)} leftovers of killed runs: prune removes them"))
    if not names:
        findings.append(Finding("error", store.shown, "has no finished snapshot"))
    progress.close()
    return BackupCheck(tuple(states), len(needed), sum(needed.values()), not quick, orphans, tuple(findings))


def prune(
    store: Store, *, keep: timedelta, keep_last: int = 1, dry_run: bool = False, now: datetime | None = None
) -> Pruned:
    """Remove snapshots older than ``keep`` and the blobs that no remaining one needs.

    The newest ``keep_last`` snapshots of each model stay however old they are. First the snapshots go, then blobs: a
    kill in between leaves blobs that the next prune removes. Raises :class:`CheckpointError` if a snapshot that would
    stay cannot be read, since what it needs is not known then, and :class:`UsageError` while a backup is at work.
    """
    if keep_last < 1:
        raise UsageError("--keep-last must be at least 1: the newest snapshot of each model stays")
    store.check()
    if dry_run:
        return _prune(store, keep, keep_last, now, renew=None)
    with locked(store, "prune") as lock:
        return _prune(store, keep, keep_last, now, renew=lock.renew)


def _prune(
    store: Store, keep: timedelta, keep_last: int, now: datetime | None, renew: Callable[[], None] | None
) -> Pruned:
    """Do it, or with no ``renew`` only find out."""
    snapshots = {}
    for name in store.snapshot_ids():
        try:
            snapshots[name] = store.snapshot(name)
        except LowbitError as error:
            raise CheckpointError(
                f"{error}; nothing was pruned, since what it needs is not known: delete that file if it is of no use"
            ) from error
    old = _outdated(snapshots, (now or datetime.now(timezone.utc)) - keep, keep_last)
    needed = _needed(snapshot for name, snapshot in snapshots.items() if name not in old)
    spare = {digest: size for digest, size in store.blobs().items() if digest not in needed}
    leftovers = store.leftovers()
    if renew is not None:
        for name in old:
            renew()
            store.delete(f"snapshots/{name}.json")
        for digest in spare:
            renew()
            store.delete_blob(digest)
        for name in leftovers:
            renew()
            store.delete(name)
    return Pruned(tuple(old), len(spare), sum(spare.values()), len(leftovers), len(snapshots) - len(old))


def _outdated(snapshots: Mapping[str, Snapshot], limit: datetime, keep_last: int) -> list[str]:
    """Ids of the snapshots made before ``limit``, without the newest ones of each model."""
    seen: dict[tuple[str, str], int] = {}
    old = []
    for name, snapshot in sorted(snapshots.items(), key=lambda item: (item[1].created, item[0]), reverse=True):
        stays = snapshot.created >= limit
        for key, model in snapshot.models.items():
            count = seen[key, model.source] = seen.get((key, model.source), 0) + 1
            stays = stays or count <= keep_last
        if not stays:
            old.append(name)
    return sorted(old)


def _readable(store: Store, names: Iterable[str], findings: list[Finding]) -> dict[str, Snapshot]:
    found = {}
    for name in names:
        try:
            found[name] = store.snapshot(name)
        except LowbitError as error:
            if name in store.snapshot_ids():
                findings.append(Finding("error", f"snapshot {name}", str(error)))
    return found


def _needed(snapshots: Iterable[Snapshot]) -> dict[str, int]:
    """Every blob that the snapshots need, with its length."""
    needed: dict[str, int] = {}
    for snapshot in snapshots:
        needed.update(snapshot.blobs())
    return needed


def _problem(store: Store, known: Mapping[str, int], digest: str, size: int, quick: bool) -> str | None:
    if digest not in known:
        return "is missing"
    if known[digest] != size:
        return f"has {known[digest]:,} bytes instead of {size:,}"
    if quick:
        return None
    try:
        store.read_blob(digest, size)
    except CheckpointError:
        return "has changed: its sha256 is another"
    return None


def _damage(snapshot: Snapshot, bad: Mapping[str, str]) -> Iterator[str]:
    """A sentence for each file that cannot be restored."""
    for name, model in snapshot.models.items():
        yield from (f"{name}/{path}: {text}" for path, text in _damaged_files(model, bad))


def _damaged_files(model: SavedModel, bad: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for path, file in model.files.items():
        digests = [digest for digest in file.chunks if digest in bad]
        if digests:
            more = f" and {len(digests) - 1} more of its blobs are damaged" if len(digests) > 1 else ""
            yield path, f"its blob {digests[0][:16]}… {bad[digests[0]]}{more}"
