"""Backups: what comes back is what was kept, nothing is kept twice, and damage is never restored."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from backup_world import CHUNK, blob_files, contents, flip, local_store, make_model

from lowbit.errors import CheckpointError, LowbitError, ResourceError, UnsupportedError, UsageError
from lowbit.ops.backup.check import prune, verify_backup
from lowbit.ops.backup.restore import restore
from lowbit.ops.backup.run import back_up
from lowbit.ops.backup.store import Store, open_store


@pytest.fixture(params=["local", "uploads", "moves"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A directory; a store whose uploads appear whole; one where a temporary name has to be moved."""
    if request.param == "local":
        yield local_store(tmp_path / "store")
        return
    place = open_store("memory://backups/here")
    place.whole_uploads = request.param == "uploads"
    yield place
    place.filesystem.store.clear()
    place.filesystem.pseudo_dirs[:] = [""]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "tiny")


def test_round_trip(store: Store, model: Path, tmp_path: Path) -> None:
    result = back_up([model], store, chunk_bytes=CHUNK)
    files = contents(model)
    assert (result.models, result.files, result.bytes) == (
        ("tiny",),
        len(files),
        sum(len(d) for d, _ in files.values()),
    )
    back = restore(store, tmp_path / "out")
    assert contents(tmp_path / "out") == files
    assert (back.files, back.fetched_bytes) == (result.files, result.bytes)
    assert verify_backup(store).ok
    assert store.leftovers() == []
    assert [name for name, _ in store.find("locks")] == []


def test_every_blob_is_the_bytes_of_its_name(model: Path, tmp_path: Path) -> None:
    back_up([model], local_store(tmp_path / "store"), chunk_bytes=CHUNK)
    expected = set()
    for data, _ in contents(model).values():
        expected |= {hashlib.sha256(data[at : at + CHUNK]).hexdigest() for at in range(0, len(data), CHUNK)}
    assert {file.name for file in blob_files(tmp_path / "store")} == expected
    for file in blob_files(tmp_path / "store"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() == file.name


def test_only_what_changed_is_written(store: Store, model: Path, tmp_path: Path) -> None:
    first = back_up([model], store, chunk_bytes=CHUNK)
    again = back_up([model], store)
    assert (again.new_blobs, again.unread) == (0, first.files)
    assert back_up([model], store, read_all=True).unread == 0
    flip(model / "model-1.safetensors", 8 * (CHUNK + 3))
    changed = back_up([model], store)
    assert (changed.new_blobs, changed.new_bytes) == (1, CHUNK)
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    assert back_up([copy, model], store).new_blobs == 0
    restore(store, tmp_path / "both")
    assert contents(tmp_path / "both" / "copy") == contents(tmp_path / "both" / "tiny") == contents(model)
    restore(store, tmp_path / "old", snapshot=first.snapshot)
    assert contents(tmp_path / "old") != contents(model)


def test_restores_one_of_several(store: Store, model: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=1)
    both = back_up([model, other], store, chunk_bytes=CHUNK)
    back_up([model], store)
    restore(store, tmp_path / "out", model="other")
    assert contents(tmp_path / "out") == contents(other)
    with pytest.raises(UsageError, match="no snapshot has a model 'third'"):
        restore(store, tmp_path / "no", model="third")
    with pytest.raises(UsageError, match="has no model 'third': it has other, tiny"):
        restore(store, tmp_path / "no", model="third", snapshot=both.snapshot)


def test_a_gguf_file_brings_its_parts_and_manifest(store: Store, tmp_path: Path) -> None:
    source = tmp_path / "models"
    source.mkdir()
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "other.gguf"):
        (source / name).write_bytes(name.encode())
    back_up([source / "m-00001-of-00002.gguf"], store)
    restore(store, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    (source / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match="1 of its 2 parts"):
        back_up([source / "m-00001-of-00002.gguf"], store)


def missing(root: Path) -> None:
    blob_files(root)[0].unlink()


def truncated(root: Path) -> None:
    os.truncate(blob_files(root)[0], 500)


def flipped(root: Path) -> None:
    flip(blob_files(root)[0])


def swapped(root: Path) -> None:
    """Two whole blobs under each other's names."""
    one, two = blob_files(root)[:2]
    data = one.read_bytes(), two.read_bytes()
    one.write_bytes(data[1])
    two.write_bytes(data[0])


def the_snapshot(root: Path) -> Path:
    return next(iter((root / "snapshots").iterdir()))


def manifest_flipped(root: Path) -> None:
    flip(the_snapshot(root), 8 * 700)


def manifest_cut(root: Path) -> None:
    os.truncate(the_snapshot(root), the_snapshot(root).stat().st_size - 50)


def manifest_edited(root: Path) -> None:
    path = the_snapshot(root)
    value = json.loads(path.read_text())
    value["models"]["tiny"]["files"]["config.json"]["mode"] = 0o777
    path.write_text(json.dumps(value))


def manifest_renamed(root: Path) -> None:
    path = the_snapshot(root)
    path.rename(path.with_name("20200101T000000.000Z-00000000.json"))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    each.__name__: (each, words)
    for each, words in (
        (missing, "is missing"),
        (truncated, "500 bytes instead of 1,000"),
        (flipped, "has changed"),
        (swapped, "has changed"),
        (manifest_flipped, "sha256|JSON"),
        (manifest_cut, "JSON"),
        (manifest_edited, "does not match its sha256"),
        (manifest_renamed, "under another name"),
    )
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_never_restored(name: str, model: Path, tmp_path: Path) -> None:
    damage, words = DAMAGE[name]
    root = tmp_path / "store"
    back_up([model], local_store(root), chunk_bytes=CHUNK)
    damage(root)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=words):
        restore(local_store(root), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
    check = verify_backup(local_store(root))
    assert not check.ok
    assert not check.snapshots[0].ok
    assert any(finding.severity == "error" for finding in check.findings)
    if "manifest" in name:
        with pytest.raises(CheckpointError, match="nothing was pruned"):
            prune(local_store(root), keep=timedelta(0))
        return
    verify_backup(local_store(root), set_aside=True)
    assert back_up([model], local_store(root)).new_blobs > 0
    assert verify_backup(local_store(root)).ok
    restore(local_store(root), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(model)


def test_every_flipped_bit_of_a_snapshot_is_found(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    back_up([model], local_store(root), chunk_bytes=CHUNK)
    path = the_snapshot(root)
    whole = path.read_bytes()
    name = path.stem
    store = local_store(root)
    for bit in range(0, 8 * len(whole), 61):
        flip(path, bit)
        with pytest.raises(CheckpointError):
            store.snapshot(name)
        path.write_bytes(whole)
    local_store(root).snapshot(name)


def test_prune_keeps_what_is_needed(store: Store, model: Path, tmp_path: Path) -> None:
    first = back_up([model], store, chunk_bytes=CHUNK)
    flip(model / "model-0.safetensors")
    second = back_up([model], store)
    other = back_up([make_model(tmp_path / "other", seed=5)], store)
    assert prune(store, keep=timedelta(days=30)).snapshots == ()
    later = datetime.now(timezone.utc) + timedelta(days=31)
    plan = prune(store, keep=timedelta(days=30), now=later, dry_run=True)
    assert (plan.snapshots, plan.kept) == ((first.snapshot,), 2)
    assert len(store.snapshot_ids()) == 3
    assert prune(store, keep=timedelta(days=30), keep_last=2, now=later).snapshots == ()
    done = prune(store, keep=timedelta(days=30), now=later)
    assert (done.snapshots, done.blobs, done.bytes) == (plan.snapshots, 1, CHUNK)
    assert store.snapshot_ids() == sorted([second.snapshot, other.snapshot])
    check = verify_backup(store)
    assert check.ok
    assert check.unreferenced == (0, 0)
    restore(store, tmp_path / "out", model="tiny")
    assert contents(tmp_path / "out") == contents(model)


def test_overwriting(store: Store, model: Path, tmp_path: Path) -> None:
    back_up([model], store, chunk_bytes=CHUNK)
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(UsageError, match="--overwrite"):
        restore(store, out)
    restore(store, out, overwrite=True)
    assert contents(out) == contents(model)
    assert sorted(tmp_path.glob("out*")) == [out]
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match="exists"):
        restore(store, file, overwrite=True)


def test_a_failed_smoke_test_leaves_nothing(model: Path, tmp_path: Path) -> None:
    def fails(path: Path) -> str:
        assert contents(path) == contents(model)
        raise CheckpointError("it says nothing")

    root = tmp_path / "store"
    back_up([model], local_store(root), chunk_bytes=CHUNK)
    with pytest.raises(CheckpointError, match="it says nothing"):
        restore(local_store(root), tmp_path / "out", smoke=fails)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("kind", ["gguf", "directory", "neither"])
def test_the_smoke_test_asks_a_real_model(kind: str, model: Path, tmp_path: Path, demo_files: dict[str, Path]) -> None:
    root = tmp_path / "store"
    (model / "config.json").unlink()
    back_up([demo_files.get(kind, model)], local_store(root))
    from lowbit.ops.backup.smoke import smoke_test

    proofs = restore(local_store(root), tmp_path / "out", smoke=smoke_test).proofs
    expected = {"gguf": "llama.cpp continued", "directory": "forward pass", "neither": "no checkpoint"}
    assert expected[kind] in proofs[1]


@pytest.fixture(scope="module")
def demo_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import lowbit
    from lowbit.checkpoint.location import DEMO_DIRECTORY

    gguf = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    lowbit.convert("demo", str(gguf))
    return {"gguf": gguf, "directory": DEMO_DIRECTORY}


def test_refused_sources(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    store = local_store(root)
    (tmp_path / "nothing").mkdir()
    twin = make_model(tmp_path / "elsewhere" / "tiny")
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "pipe")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling" / "link").symlink_to("nowhere")
    (tmp_path / "folders").mkdir()
    (tmp_path / "folders" / "link").symlink_to(model)
    (tmp_path / "made.partial").mkdir()
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / "two\nlines").touch()
    cases: list[tuple[list[Path], str]] = [
        ([tmp_path / "nothing"], "holds no file"),
        ([model, twin], "have the same name"),
        ([tmp_path / "fifo"], "neither a file nor a directory"),
        ([tmp_path / "dangling"], "a link to something that is not there"),
        ([tmp_path / "folders"], "a link to a directory"),
        ([tmp_path / "made.partial"], "still being made"),
        ([odd], "characters"),
        ([tmp_path / "missing"], "no such directory"),
    ]
    for sources, words in cases:
        with pytest.raises((UsageError, CheckpointError), match=words):
            back_up(sources, store)
    assert not root.exists()
    with pytest.raises(UsageError, match="lies inside"):
        back_up([model], local_store(model / "store"))


def test_links_to_files_are_followed(tmp_path: Path, model: Path) -> None:
    source = tmp_path / "snapshot"
    source.mkdir()
    (source / "weights").symlink_to(model / "model-0.safetensors")
    back_up([source], local_store(tmp_path / "store"))
    restore(local_store(tmp_path / "store"), tmp_path / "out")
    assert (tmp_path / "out" / "weights").read_bytes() == (model / "model-0.safetensors").read_bytes()
    assert not (tmp_path / "out" / "weights").is_symlink()


def test_a_model_that_its_manifest_disowns(tmp_path: Path) -> None:
    from lowbit.checkpoint import Manifest, hash_file, write_manifest

    source = make_model(tmp_path / "signed")
    files = {path.name: hash_file(path) for path in source.iterdir() if path.is_file()}
    write_manifest(source, Manifest("f", "0.1.0", {}, {}, files=files))
    store = local_store(tmp_path / "store")
    back_up([source], store)
    flip(source / "model-0.safetensors")
    os.utime(source / "model-0.safetensors")
    with pytest.raises(CheckpointError, match=r"model-0.*--unverified"):
        back_up([source], store)
    assert len(store.snapshot_ids()) == 1
    back_up([source], store, unverified=True)
    (source / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing though"):
        back_up([source], store)


def test_a_file_that_changes_while_it_is_read(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = local_store(tmp_path / "store")
    write = store.write_blob

    def meddling(digest: str, data: bytes) -> None:
        with (model / "config.json").open("a") as file:
            file.write(" ")
        write(digest, data)

    monkeypatch.setattr(store, "write_blob", meddling)
    with pytest.raises(CheckpointError, match=r"config\.json: changed while it was read"):
        back_up([model], store, chunk_bytes=CHUNK)
    assert store.snapshot_ids() == []


def test_refused_places(model: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").touch()
    with pytest.raises(UsageError, match="holds other files"):
        back_up([model], local_store(full))
    with pytest.raises(UsageError, match="is a file"):
        back_up([model], local_store(full / "something"))
    assert [path.name for path in full.iterdir()] == ["something"]
    for action in (verify_backup, lambda store: prune(store, keep=timedelta(1)), lambda s: restore(s, tmp_path / "o")):
        with pytest.raises(CheckpointError, match="holds no backup"):
            action(local_store(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
    store = local_store(tmp_path / "store")
    back_up([model], store, chunk_bytes=CHUNK)
    with pytest.raises(UsageError, match="leave --chunk out"):
        back_up([model], store, chunk_bytes=7)
    (tmp_path / "store" / "lowbit-backup.json").write_text('{"version": 9}')
    with pytest.raises(CheckpointError, match="version 9"):
        verify_backup(store)


def test_protocols(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="Protocol not known"):
        open_store("nonsense://x")
    with pytest.raises(UsageError, match="empty"):
        open_store(" ")
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(UnsupportedError, match="pip install s3fs"):
        open_store("s3://bucket/x")
    with pytest.raises(LowbitError) as caught:
        open_store("sftp://me:secret@host/x", {"nonsense": "1"})
    assert "secret" not in str(caught.value)


def test_a_store_that_cannot_be_written(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store("memory://failing")

    def refuses(path: str, data: bytes) -> None:
        raise PermissionError(13, "Access Denied")

    monkeypatch.setattr(store.filesystem, "pipe_file", refuses)
    with pytest.raises(ResourceError, match=r"memory://failing: cannot write .*: Access Denied; run it again"):
        back_up([model], store)
