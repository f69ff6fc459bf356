"""The states of a run: refused, started, gone on with, finished."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lowbit.checkpoint import Manifest, PartialCheckpoint, hash_file, open_checkpoint, partial_path, read_manifest
from lowbit.errors import CheckpointError, UsageError

CONFIG = {"model_type": "llama"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def begin(out: Path, count: int = 2, **options: Any) -> PartialCheckpoint:
    partial = PartialCheckpoint.create(out, "mine", **options)
    for index in range(len(partial.journal), count):
        partial.commit_part(index, {f"t{index}": torch.full((4, 4), float(index))}, {"note": f"part {index}"})
    return partial


def test_one_file(out: Path) -> None:
    with begin(out) as partial:
        assert not out.exists()
        partial.finish(CONFIG)
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}
    assert not partial_path(out).exists()
    loaded = safetensors.torch.load_file(out / "model.safetensors")
    assert torch.equal(loaded["t1"], torch.ones(4, 4))
    with safetensors.safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_index_and_manifest(out: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "quant.json").write_text("not this one")
    told: list[int] = []
    with begin(out, 5) as partial:
        partial.finish(
            CONFIG,
            {"quant.json": {"bits": 4}},
            [tmp_path / "tokenizer.json", tmp_path / "quant.json"],
            128,
            manifest=Manifest("mine", "0", {}, {}),
            progress=told.append,
        )
    assert sum(told) == 5 * 64
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 64
    assert index["weight_map"]["t4"] == "model-00003-of-00003.safetensors"
    checkpoint = open_checkpoint(out)
    assert [float(checkpoint.read(f"t{i}")[0, 0]) for i in range(5)] == [0, 1, 2, 3, 4]
    assert json.loads((out / "quant.json").read_text()) == {"bits": 4}
    manifest = read_manifest(out)
    assert manifest is not None
    assert set(manifest.files) == {path.name for path in out.iterdir()} - {"lowbit.json"}
    assert all(hash_file(out / name) == record for name, record in manifest.files.items())


def test_a_tensor_larger_than_a_shard(out: Path) -> None:
    with begin(out, 3) as partial:
        partial.finish(CONFIG, max_shard_bytes=10)
    assert len(list(out.glob("model-*-of-00003.safetensors"))) == 3


def test_parts_may_come_in_any_order_and_be_empty(out: Path) -> None:
    with PartialCheckpoint.create(out, "mine") as partial:
        partial.commit_part(7, {"b": torch.ones(2)}, {})
        partial.commit_part(3, {"a": torch.zeros(2)}, {})
        partial.commit_part(5, {}, {"empty": True})
        assert torch.equal(partial.read_part(7)["b"], torch.ones(2))
        assert partial.read_part(5) == {}
        with pytest.raises(KeyError):
            partial.read_part(1)
        partial.finish(CONFIG)
    assert list(open_checkpoint(out).tensors) == ["a", "b"]


def test_mistakes_of_the_caller(out: Path) -> None:
    with begin(out) as partial:
        with pytest.raises(ValueError, match="already in the journal"):
            partial.commit_part(0, {}, {})
        with pytest.raises(ValueError, match="must not use the key 'part'"):
            partial.commit_part(9, {}, {"part": 1})
        partial.commit_part(9, {"t0": torch.ones(1)}, {})
        with pytest.raises(CheckpointError, match=r"'t0' is in part 00000\.safetensors and in 00009"):
            partial.finish(CONFIG)
    assert not out.exists()


def test_resume_reads_the_journal(out: Path) -> None:
    with begin(out) as partial:
        (partial.scratch / "activations").write_text("kept")
        before = partial.journal
    with begin(out, 0, resume=True) as partial:
        assert partial.journal == before
        assert [entry["note"] for entry in partial.journal] == ["part 0", "part 1"]
        assert (partial.scratch / "activations").read_text() == "kept"
        partial.finish(CONFIG)
    assert set(open_checkpoint(out).tensors) == {"t0", "t1"}


@pytest.mark.parametrize("damage", ["torn", "garbage", "changed", "truncated", "deleted", "path"])
def test_a_damaged_journal_or_part_costs_what_follows(out: Path, damage: str) -> None:
    begin(out, 4).close()
    directory = partial_path(out)
    journal, part = directory / "journal.jsonl", directory / "parts" / "00002.safetensors"
    lines = journal.read_bytes().splitlines(keepends=True)
    if damage == "torn":
        journal.write_bytes(b"".join(lines[:2]) + lines[2][:-1])
    elif damage == "garbage":
        journal.write_bytes(b"".join(lines[:2]) + b"[1, 2\n" + b"".join(lines[2:]))
    elif damage == "changed":
        part.write_bytes(part.read_bytes()[:-1] + b"x")
    elif damage == "truncated":
        part.write_bytes(part.read_bytes()[:-1])
    elif damage == "deleted":
        part.unlink()
    else:
        journal.write_bytes(b"".join(lines).replace(b"00002.safetensors", b"../parts/00002.safetensors"))
    with begin(out, 0, resume=True) as partial:
        assert [entry["index"] for entry in partial.journal] == [0, 1]
    with begin(out, 4, resume=True) as partial:
        partial.finish(CONFIG)
    assert [float(open_checkpoint(out).read(f"t{i}")[0, 0]) for i in range(4)] == [0, 1, 2, 3]


def test_output_directory_not_empty(out: Path) -> None:
    out.mkdir()
    (out / "precious").write_text("data")
    for options in ({}, {"resume": True}):
        with pytest.raises(UsageError, match="exists and is not empty: use --overwrite"):
            PartialCheckpoint.create(out, "mine", **options)
    assert not partial_path(out).exists()


def test_output_is_a_file_or_a_mount_point(out: Path) -> None:
    out.write_text("")
    with pytest.raises(UsageError, match="is a file"):
        PartialCheckpoint.create(out, "mine", overwrite=True)
    with pytest.raises(UsageError, match="mount point"):
        PartialCheckpoint.create(Path("/"), "mine", overwrite=True)


def test_empty_output_directory_and_missing_parents(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        with begin(out) as partial:
            partial.finish(CONFIG)
        assert open_checkpoint(out).path == out


def test_output_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with begin(tmp_path / "link") as partial:
        partial.finish(CONFIG)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").exists()


def test_overwrite_keeps_the_old_one_until_the_end(out: Path) -> None:
    out.mkdir()
    (out / "old").write_text("old")
    with begin(out, overwrite=True) as partial:
        assert (out / "old").exists()
        partial.finish(CONFIG)
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}


def test_resume_remembers_overwrite(out: Path) -> None:
    out.mkdir()
    (out / "old").write_text("old")
    begin(out, 1, overwrite=True).close()
    with begin(out, resume=True) as partial:
        partial.finish(CONFIG)
    assert not (out / "old").exists()


def test_output_appears_meanwhile(out: Path) -> None:
    with begin(out) as partial:
        out.mkdir()
        (out / "other").write_text("someone else's")
        with pytest.raises(UsageError, match="--overwrite"):
            partial.finish(CONFIG)
    assert (out / "other").exists()
    (out / "other").unlink()
    with begin(out, 0, resume=True) as partial:
        partial.finish(CONFIG)
    assert set(open_checkpoint(out).tensors) == {"t0", "t1"}


def test_an_unfinished_run_is_there(out: Path) -> None:
    begin(out).close()
    with pytest.raises(UsageError, match="use --resume to go on with it, or --overwrite"):
        PartialCheckpoint.create(out, "mine")
    with pytest.raises(UsageError, match=r"other settings, source or calibration.*--overwrite"):
        PartialCheckpoint.create(out, "other", resume=True)
    with PartialCheckpoint.create(out, "other", overwrite=True) as partial:
        assert partial.journal == []
        assert list((partial_path(out) / "parts").iterdir()) == []


def test_two_processes_at_once(out: Path) -> None:
    with begin(out), pytest.raises(UsageError, match="another lowbit process"):
        PartialCheckpoint.create(out, "mine", resume=True)
    begin(out, resume=True).close()


def test_a_directory_that_is_not_ours(out: Path) -> None:
    partial_path(out).mkdir()
    (partial_path(out) / "thesis.tex").write_text("")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UsageError, match="is no unfinished run of lowbit"):
            PartialCheckpoint.create(out, "mine", **options)
    assert (partial_path(out) / "thesis.tex").exists()


def test_another_version_of_the_working_directory(out: Path) -> None:
    begin(out).close()
    (partial_path(out) / "run.json").write_text('{"version": 99, "fingerprint": "mine"}')
    with pytest.raises(UsageError, match="another version"):
        PartialCheckpoint.create(out, "mine", resume=True)


def test_resuming_what_is_finished_does_nothing(out: Path) -> None:
    with begin(out) as partial:
        partial.finish(CONFIG, manifest=Manifest("mine", "0", {}, {}))
        partial.finish(CONFIG)
    before = {path.name: os.stat(path).st_ino for path in out.iterdir()}
    with PartialCheckpoint.create(out, "mine", resume=True) as partial:
        assert partial.finished
        partial.finish(CONFIG)
    assert {path.name: os.stat(path).st_ino for path in out.iterdir()} == before
    with pytest.raises(UsageError, match="--overwrite"):
        PartialCheckpoint.create(out, "other", resume=True)


def test_an_unfinished_run_is_no_checkpoint(out: Path) -> None:
    begin(out).close()
    with pytest.raises(CheckpointError, match="unfinished run"):
        open_checkpoint(partial_path(out))


def test_a_missing_file_to_copy(out: Path, tmp_path: Path) -> None:
    with begin(out) as partial, pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        partial.finish(CONFIG, copy_files=[tmp_path / "tokenizer.json"])
    assert not out.exists()
