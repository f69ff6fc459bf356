"""The verbs of backups as people type them: what they print, and one clear line for what cannot work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from backup_world import blob_files, contents, flip, make_model

from lowbit.cli.main import main


def test_the_way_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, root = make_model(tmp_path / "tiny"), tmp_path / "store"
    assert main(["backup", str(model), str(root), "--chunk", "1K", "--json", "--quiet"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert main(["backup-verify", str(root), "--quick", "--quiet"]) == 0
    assert made["snapshot"] in capsys.readouterr().out
    assert main(["restore", str(root), str(tmp_path / "out"), "--snapshot", made["snapshot"], "--quiet"]) == 0
    assert "read back after writing" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(model)
    assert main(["prune", str(root), "--keep", "30d", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == 1
    flip(blob_files(root)[0])
    assert main(["backup-verify", str(root), "--json", "--quiet"]) == 2
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["backup", "MODEL", "nonsense://x"], "Protocol not known: nonsense"),
        (["backup", "nothing-here/at/all", "STORE"], "no such directory"),
        (["backup", "MODEL", "STORE", "--chunk", "lots"], "--chunk 'lots' is not a size"),
        (["backup", "MODEL", "STORE", "--chunk", "2GiB"], "--chunk"),
        (["backup", "MODEL", "STORE", "--option", "x"], "--option 'x' is not KEY=VALUE"),
        (["backup", "MODEL"], "required: DEST"),
        (["restore", "STORE", "OUT"], "holds no backup"),
        (["restore", "KEPT", "MODEL"], "exists"),
        (["restore", "KEPT", "OUT", "--snapshot", "latest"], "'latest' is no id"),
        (["restore", "KEPT", "OUT", "--snapshot", "20260131T120000.000Z-0123abcd"], "has no snapshot"),
        (["backup-verify", "STORE"], "holds no backup"),
        (["prune", "KEPT", "--keep", "30 days"], "is not a time"),
        (["prune", "KEPT", "--keep", "9999y"], "thousand years"),
        (["prune", "KEPT", "--keep", "1d", "--keep-last", "0"], "above zero"),
        (["prune", "KEPT"], "--keep"),
    ],
)
def test_bad_input(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(tmp_path / "MODEL")
    assert main(["backup", str(tmp_path / "MODEL"), str(tmp_path / "KEPT"), "--quiet"]) == 0
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    assert main([str(tmp_path / each) if each.isupper() else each for each in arguments]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith("lowbit: error: ")
    assert words in said.err
    assert sorted(tmp_path.rglob("*")) == before
