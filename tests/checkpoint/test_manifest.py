from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowbit.checkpoint import (
    FileRecord,
    Manifest,
    manifest_path,
    read_manifest,
    update_quality,
    write_manifest,
)
from lowbit.errors import CheckpointError

MANIFEST = Manifest(
    fingerprint="f" * 64,
    lowbit_version="0.1.0",
    source={"path": "model", "config_sha256": "0" * 64},
    recipe={"bits": 4, "rules": [{"match": "lm_head", "skip": True}]},
    calibration={"name": "文本", "sha256": "1" * 64, "samples": 3, "tokens": 96},
    modules={"model.layers.0.self_attn.q_proj": {"spec": "int4-g128-sym", "error": 0.001}},
    expert_coverage={"model.layers.0": [3, 4]},
    files={"model.safetensors": FileRecord("a" * 64, 10), "config.json": FileRecord("b" * 64, 2)},
)


def test_round_trip(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST
    first = (tmp_path / "lowbit.json").read_bytes()
    write_manifest(tmp_path, Manifest.from_json(json.loads(first)))
    assert (tmp_path / "lowbit.json").read_bytes() == first
    assert "文本".encode() in first


def test_beside_a_gguf_file(tmp_path: Path) -> None:
    model = tmp_path / "model.Q4_K_M.gguf"
    assert read_manifest(model) is None
    write_manifest(model, MANIFEST)
    assert manifest_path(model) == tmp_path / "model.Q4_K_M.lowbit.json"
    assert read_manifest(model) == MANIFEST
    assert manifest_path(tmp_path / "model.Q4_K_M-00002-of-00003.gguf") == manifest_path(model)
    (tmp_path / "odd.gguf").mkdir()
    assert manifest_path(tmp_path / "odd.gguf") == tmp_path / "odd.gguf" / "lowbit.json"


def test_update_quality(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no lowbit\.json"):
        update_quality(tmp_path, {})
    write_manifest(tmp_path, MANIFEST)
    updated = update_quality(tmp_path, {"kl_divergence": 0.01})
    assert read_manifest(tmp_path) == updated
    assert updated.quality == {"kl_divergence": 0.01}
    assert updated.files == MANIFEST.files


def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    with pytest.raises(ValueError, match="JSON compliant"):
        update_quality(tmp_path, {"perplexity": float("nan")})
    assert read_manifest(tmp_path) == MANIFEST


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2 is not 1"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"recipe": None}, "'recipe' has the wrong type"),
        ({"fingerprint": 3}, "'fingerprint' has the wrong type"),
        ({"modules": {"a": 1}}, r"modules\['a'\]"),
        ({"files": {"a": {"sha256": "x", "bytes": 1}}}, r"files\['a'\] is not a sha256"),
        ({"files": {"a": {"sha256": "0" * 64, "bytes": True}}}, r"files\['a'\] is not a sha256"),
        ({"files": {"a": 1}}, r"files\['a'\] must hold"),
        ({"files": {"../a": {"sha256": "0" * 64, "bytes": 1}}}, "not a plain file name"),
    ],
)
def test_damaged(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "lowbit.json").write_text(json.dumps(MANIFEST.to_json() | change))
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", [name for name in MANIFEST.to_json() if name != "version"])
def test_missing_fields(name: str) -> None:
    value = MANIFEST.to_json()
    del value[name]
    with pytest.raises(CheckpointError, match=f"field '{name}' is missing"):
        Manifest.from_json(value)
