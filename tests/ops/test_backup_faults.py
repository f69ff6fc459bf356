"""Backups, restores and prunes that are killed or run out of disk at every moment, and that meet each other."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path

import pytest
from backup_world import CHUNK, contents, flip, local_store, make_model
from writer_run import DONE, FAILED, KILLED, full_at, in_child, kill_at

from lowbit.errors import CheckpointError, ResourceError, UsageError
from lowbit.ops.backup import lock as backup_lock
from lowbit.ops.backup.check import prune, verify_backup
from lowbit.ops.backup.lock import EXPIRY, locked
from lowbit.ops.backup.restore import restore
from lowbit.ops.backup.run import back_up

LATER = datetime.now(timezone.utc) + timedelta(days=40)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "tiny", shards=1, size=1500)


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are killed here, not machines: waiting for the disk would show nothing."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def keep(model: Path, root: Path) -> None:
    back_up([model], local_store(root), chunk_bytes=CHUNK)


def whole(root: Path) -> bool:
    return verify_backup(local_store(root)).ok


def test_a_backup_killed_at_every_operation(model: Path, tmp_path: Path) -> None:
    kept_before_the_end = 0
    for moment in range(1, 1000):
        root = tmp_path / f"store{moment}"
        status = in_child(partial(keep, model, root), kill_at(moment, root))
        if (root / "lowbit-backup.json").exists():
            kept = len(local_store(root).snapshot_ids())
            kept_before_the_end += kept if status == KILLED else 0
            assert not kept or whole(root), moment
            if not kept:
                with pytest.raises(UsageError, match="no finished snapshot"):
                    restore(local_store(root), tmp_path / "out")
        if status == DONE:
            break
        assert status == KILLED, moment
        keep(model, root)
        assert whole(root), moment
        prune(local_store(root), keep=timedelta(days=1))
        assert local_store(root).leftovers() == []
        if moment % 5 == 0:
            out = tmp_path / f"out{moment}"
            restore(local_store(root), out)
            assert contents(out) == contents(model), moment
    assert moment > 40
    assert 0 < kept_before_the_end < 10, "the snapshot comes last"


def test_a_killed_backup_goes_on(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    assert in_child(partial(keep, model, root), kill_at(40, root)) == KILLED
    there = len(local_store(root).blobs())
    result = back_up([model], local_store(root))
    assert there > 2
    assert result.new_blobs == len(local_store(root).blobs()) - there


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_restore_killed_at_every_operation(model: Path, tmp_path: Path, overwrite: bool) -> None:
    root = tmp_path / "store"
    keep(model, root)
    expected, old = contents(model), {"old": (b"old", 0o644)}
    for moment in range(1, 1000):
        home = tmp_path / f"home{moment}"
        out = home / "out"
        home.mkdir()
        if overwrite:
            out.mkdir()
            (out / "old").write_text("old")
            (out / "old").chmod(0o644)
        action = partial(restore, local_store(root), out, overwrite=overwrite)
        status = in_child(action, kill_at(moment, home))
        if out.exists():
            assert contents(out) in ([expected, old] if overwrite else [expected]), moment
        elif overwrite:
            assert contents(home / "out.replaced") == old, moment
        if status == DONE:
            break
        assert status == KILLED, moment
        finished = out.exists() and contents(out) == expected
        if not finished or overwrite:
            action()
        assert contents(out) == expected, moment
        if not finished or overwrite:
            assert [path.name for path in home.iterdir()] == ["out"], moment
    assert moment > 30


def test_a_killed_restore_goes_on(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    keep(model, root)
    assert in_child(partial(restore, local_store(root), tmp_path / "out"), kill_at(30, tmp_path)) == KILLED
    result = restore(local_store(root), tmp_path / "out")
    assert 0 < result.fetched_bytes < result.bytes


def test_what_a_killed_restore_left_is_not_trusted(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    keep(model, root)
    assert in_child(partial(restore, local_store(root), tmp_path / "out"), kill_at(40, tmp_path)) == KILLED
    for file in (tmp_path / "out.restoring" / "content").rglob("*"):
        if file.is_file() and file.stat().st_size:
            flip(file)
            with file.open("ab") as longer:
                longer.write(b"more")
    (tmp_path / "out.restoring" / "content" / "foreign").touch()
    restore(local_store(root), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(model)


def test_a_prune_killed_at_every_operation(model: Path, tmp_path: Path) -> None:
    original = contents(model)
    for moment in range(1, 1000):
        root = tmp_path / f"store{moment}"
        keep(model, root)
        for name, (data, _) in original.items():
            (model / name).write_bytes(bytes(reversed(data)))
        keep(model, root)
        expected = contents(model)
        action = partial(prune, local_store(root), keep=timedelta(days=30), now=LATER)
        status = in_child(action, kill_at(moment, root))
        assert whole(root), moment
        if status != DONE:
            assert status == KILLED, moment
            action()
        check = verify_backup(local_store(root))
        assert (check.ok, len(check.snapshots), check.unreferenced) == (True, 1, (0, 0)), moment
        restore(local_store(root), tmp_path / f"out{moment}")
        assert contents(tmp_path / f"out{moment}") == expected, moment
        if status == DONE:
            break
    assert moment > 10


@pytest.mark.parametrize("verb", ["backup", "restore"])
def test_a_full_disk_at_every_sync(verb: str, model: Path, tmp_path: Path) -> None:
    root = tmp_path / "kept"
    keep(model, root)
    for moment in range(1, 200):
        place, out = tmp_path / f"store{moment}", tmp_path / f"out{moment}"
        actions: dict[str, Callable[[], object]] = {
            "backup": partial(keep, model, place),
            "restore": partial(restore, local_store(root), out),
        }
        status = in_child(actions[verb], full_at(moment))
        assert not list(place.rglob("*.tmp"))
        if status == DONE:
            break
        assert status == FAILED, moment
        if out.exists():  # the very last sync failed
            assert contents(out) == contents(model), moment
            continue
        if (place / "snapshots").exists() and list((place / "snapshots").glob("*.json")):
            assert whole(place), moment
        actions[verb]()
        assert contents(out) == contents(model) if verb == "restore" else whole(place), moment
    assert moment > 5


@pytest.mark.parametrize("limit", [300, 990, 1400])
def test_a_real_limit_on_file_size(limit: int, model: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE cuts writes short in the kernel, as a full disk or a quota does."""

    def restrict() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    root, out = tmp_path / "store", tmp_path / "out"
    if limit < CHUNK:
        assert in_child(partial(keep, model, root), restrict) == FAILED
        assert not list(root.rglob("*.tmp"))
        assert local_store(root).snapshot_ids() == []
    keep(model, root)
    assert in_child(partial(restore, local_store(root), out), restrict) == FAILED
    assert not out.exists()
    restore(local_store(root), out)
    assert contents(out) == contents(model)


def test_a_restore_that_cannot_fit_says_so_first(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(model, tmp_path / "store")
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("lowbit.ops.backup.restore.shutil.disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match=r"disk full: [\d,]+ bytes are needed, 10 are free"):
        restore(local_store(tmp_path / "store"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prune_and_backup_exclude_each_other(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    keep(model, root)
    store = local_store(root)
    with locked(store, "backup"), locked(store, "backup"):
        with pytest.raises(UsageError, match=r"a backup by .*process \d+.*is at work.*expires in 30 min"):
            prune(store, keep=timedelta(1))
        prune(store, keep=timedelta(1), dry_run=True)
    with locked(store, "prune"):
        for action in (partial(keep, model, root), partial(prune, store, keep=timedelta(1))):
            with pytest.raises(UsageError, match="a prune by"):
                action()
    prune(store, keep=timedelta(1))
    assert not list((root / "locks").iterdir())


def test_a_lock_ends_with_its_owner_or_its_time(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "store"
    keep(model, root)
    store = local_store(root)

    def dies() -> None:
        with locked(store, "prune"):
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(dies) == KILLED
    assert list((root / "locks").iterdir())
    keep(model, root)
    assert not list((root / "locks").iterdir())
    now = time.time()
    monkeypatch.setattr(backup_lock, "_machine", lambda: "another machine")
    assert in_child(dies) == KILLED
    monkeypatch.undo()
    with pytest.raises(UsageError, match="a prune by"), locked(store, "backup", lambda: now + EXPIRY - 60):
        pass
    with locked(store, "backup", lambda: now + EXPIRY + 60):
        assert len(list((root / "locks").iterdir())) == 1


def test_a_lock_is_renewed_and_its_loss_noticed(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    keep(model, root)
    now = time.time()
    with locked(local_store(root), "backup", lambda: now) as lock:
        file = root / lock.name
        first = file.read_bytes()
        lock.renew()
        assert file.read_bytes() == first
        now += 90
        lock.renew()
        assert file.read_bytes() != first
        file.unlink()
        now += 90
        with pytest.raises(ResourceError, match="lost its lock"):
            lock.renew()
        lock.write()
        now += EXPIRY
        with pytest.raises(ResourceError, match="held up for 1800 s"):
            lock.renew(now=True)


def test_a_lock_of_somebody_else_is_not_understood(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    keep(model, root)
    for text in ("{}", "[]", '{"kind": "dance"}'):
        (root / "locks" / "x.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"locks/x\.json"):
            keep(model, root)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lowbit", *map(str, arguments), *(["--quiet"] if arguments[0] != "prune" else [])]


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["backup", "restore"])
def test_real_processes_killed_at_random_times(verb: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny", shards=4, size=1_000_000)
    root, out = tmp_path / "store", tmp_path / "out"
    if verb == "restore":
        subprocess.run(command("backup", model, root, "--chunk", "16K"), check=True, capture_output=True)
    work = command("backup", model, root, "--chunk", "16K") if verb == "backup" else command("restore", root, out)
    trace = root / "blobs" if verb == "backup" else tmp_path / "out.restoring" / "content"
    generator = random.Random(3)
    killed = 0
    for _ in range(4):
        process = subprocess.Popen(work, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and not trace.exists():
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        assert not out.exists() or contents(out) == contents(model)
    assert killed
    if not out.exists():
        subprocess.run(work, check=True, capture_output=True)
    assert whole(root)
    if verb == "backup":
        subprocess.run(command("restore", root, out), check=True, capture_output=True)
    assert contents(out) == contents(model)


@pytest.mark.slow
def test_backups_and_prunes_at_once_lose_nothing(tmp_path: Path) -> None:
    """Two writers and a pruner in real processes, time and again; each either works or says that it must wait."""
    root = tmp_path / "store"
    models = [make_model(tmp_path / f"m{index}", seed=index, shards=1, size=20_000) for index in range(2)]
    back_up(models, local_store(root), chunk_bytes=CHUNK)
    script = (
        "import sys, random; from pathlib import Path; from datetime import timedelta\n"
        "from lowbit.errors import UsageError; from lowbit.ops.backup.run import back_up\n"
        "from lowbit.ops.backup.check import prune; from lowbit.ops.backup.store import open_store\n"
        "store, done, generator = open_store(sys.argv[1]), 0, random.Random(int(sys.argv[3]))\n"
        "for turn in range(12):\n"
        "    try:\n"
        "        if sys.argv[2] == 'prune': prune(store, keep=timedelta(0))\n"
        "        else:\n"
        "            Path(sys.argv[2], 'model-0.safetensors').write_bytes(generator.randbytes(20000))\n"
        "            back_up([sys.argv[2]], store)\n"
        "        done += 1\n"
        "    except UsageError as error: assert 'is at work' in str(error), error\n"
        "print(done)\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(root), what, str(seed)], stdout=subprocess.PIPE, text=True)
        for seed, what in enumerate((str(models[0]), str(models[1]), "prune"))
    ]
    done = [int(process.communicate(timeout=120)[0] or -1) for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert sum(done[:2]) > 0
    assert whole(root)
    for each in models:
        back_up([each], local_store(root))
        restore(local_store(root), tmp_path / f"out-{each.name}", model=each.name)
        assert contents(tmp_path / f"out-{each.name}") == contents(each)
