"""What a source can be: directory, hub id, demo."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from lowbit.checkpoint import locate, open_checkpoint
from lowbit.errors import CheckpointError


def test_directory(tiny_llama: Path) -> None:
    assert locate(tiny_llama) == tiny_llama
    assert locate(str(tiny_llama)) == tiny_llama


@pytest.mark.parametrize("source", ["/no/such/place", "./model", "a/b/c", "~/no-such-model", "two words", ""])
def test_no_such_directory(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if source == "":
        assert locate(source) == Path()
        return
    with pytest.raises(CheckpointError, match="no such directory"):
        locate(source)


def test_a_path_is_never_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        locate(Path("organisation/model"))


def test_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"'organisation/nothing' is no local directory.*HF_HUB_OFFLINE.*directory"
    ) as caught:
        open_checkpoint("organisation/nothing")
    assert "\n" not in str(caught.value)


def test_from_the_hub_cache_while_offline(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "models--organisation--tiny"
    shutil.copytree(tiny_llama, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **more: real(name, cache_dir=tmp_path, **more)
    )
    assert len(open_checkpoint("organisation/tiny").tensors) > 0
    assert open_checkpoint("organisation/tiny", revision="main").path == home / "snapshots" / commit


def _hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    error.args = ("refused",)
    return error


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (errors.GatedRepoError, "gated: accept its terms.*hf auth login"),
        (errors.RepositoryNotFoundError, "no such public model"),
        (errors.RevisionNotFoundError, "no revision 'v9'"),
        (errors.LocalEntryNotFoundError, "cannot be reached"),
        (errors.OfflineModeIsEnabled, "cannot be reached"),
        (errors.HfHubHTTPError, "cannot be reached"),
        (errors.HFValidationError, "no valid hub id"),
        (ConnectionError, "cannot be reached"),
        (TimeoutError, "cannot be reached"),
        (PermissionError, "download failed"),
    ],
)
def test_what_the_hub_may_answer(
    kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(*arguments: object, **options: object) -> None:
        raise _hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=message):
        locate("organisation/model", revision="v9")


def test_only_what_is_asked_for_is_downloaded(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str], **options: object) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    locate("organisation/model")
    assert not {"*.py", "*.bin"} & set(asked[0])
    locate("organisation/model", trust_remote_code=True, allow_pickle=True)
    assert "*.py" in asked[1]
    assert asked[2] == ["*.bin"]


def test_demo_names_the_embedded_model(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("lowbit.checkpoint.location.DEMO_DIRECTORY", tiny_llama)
    assert locate("demo") == tiny_llama
    monkeypatch.setattr("lowbit.checkpoint.location.DEMO_DIRECTORY", tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"lowbit\.demo\.train"):
        locate("demo")
