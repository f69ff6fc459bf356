"""Opening directories: whole, sharded, damaged, pickled, quantized."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lowbit.checkpoint import open_checkpoint
from lowbit.errors import CheckpointError

A = torch.arange(12, dtype=torch.float32).reshape(3, 4)
B = torch.arange(5, dtype=torch.bfloat16)


def write_config(path: Path, **fields: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **fields}))
    return path


def save(path: Path, **tensors: torch.Tensor) -> None:
    safetensors.torch.save_file({name.replace("_", "."): tensor for name, tensor in tensors.items()}, path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    path = write_config(tmp_path / "model")
    save(path / "model-00001-of-00002.safetensors", a=A)
    save(path / "model-00002-of-00002.safetensors", b=B)
    write_index(path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    return path


def write_index(path: Path, weight_map: object) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path, **options)
    assert "\n" not in str(caught.value)


def test_agrees_with_the_reference_library(tiny_llama: Path) -> None:
    expected = safetensors.torch.load_file(tiny_llama / "model.safetensors")
    with open_checkpoint(tiny_llama) as checkpoint:
        assert set(checkpoint.tensors) == set(expected)
        assert checkpoint.total_bytes == sum(item.nbytes for item in expected.values())
        for name, tensor in expected.items():
            assert torch.equal(checkpoint.read(name), tensor)
            assert bytes(checkpoint.copy_bytes(name)) == tensor.numpy().tobytes()
        rows = torch.tensor([[7, 7], [0, 319]])
        table = "model.embed_tokens.weight"
        assert torch.equal(checkpoint.read_rows(table, rows), expected[table][rows.reshape(-1)])
        assert checkpoint.has_tokenizer
        assert checkpoint.quantization_config is None
        assert checkpoint.description.hidden == 128
        assert checkpoint.description.tied


def test_sharded(sharded: Path) -> None:
    checkpoint = open_checkpoint(str(sharded))
    assert list(checkpoint.tensors) == ["a", "b"]
    assert torch.equal(checkpoint.read("b"), B)
    assert checkpoint.problems == ()
    assert not checkpoint.has_tokenizer
    with pytest.raises(CheckpointError, match="tensor c is missing"):
        checkpoint.read("c")


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert set(open_checkpoint(sharded).tensors) == {"a", "b"}
    (sharded / "model-00001-of-00002.safetensors").unlink()
    refused(sharded, "model-00001-of-00002.safetensors: shard is missing")


def test_shards_that_repeat_a_tensor(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    save(sharded / "model-00002-of-00002.safetensors", a=A)
    refused(sharded, "tensor 'a' is in both model-00001")


def test_index_names_an_absent_tensor(sharded: Path) -> None:
    write_index(sharded, {"a": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"})
    refused(sharded, "model-00002-of-00002.safetensors: tensor 'x' is absent")


def test_index_names_an_absent_file(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, "model-00002-of-00002.safetensors: shard is missing")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "", 3, None, "a/b.safetensors", "model.bin", ".."]
)
def test_index_that_points_elsewhere(sharded: Path, name: object) -> None:
    write_index(sharded, {"a": name})
    refused(sharded, "is no safetensors file name")


@pytest.mark.parametrize("weight_map", [None, {}, [], "a"])
def test_index_without_a_map(sharded: Path, weight_map: object) -> None:
    write_index(sharded, weight_map)
    refused(sharded, "index.json: weight_map must be")


def test_index_names_a_tensor_twice(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x", "a": "y"}}')
    refused(sharded, "key 'a' appears twice")


def test_tensors_that_the_index_leaves_out(sharded: Path) -> None:
    write_index(sharded, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    save(sharded / "model-00002-of-00002.safetensors", b=B, a=A + 1)
    checkpoint = open_checkpoint(sharded)
    assert torch.equal(checkpoint.read("a"), A)
    assert "1 tensors that" in checkpoint.problems[0]


def test_truncated_shard(sharded: Path) -> None:
    path = sharded / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(sharded, "model-00002-of-00002.safetensors: truncated")


def test_every_truncation_is_refused(sharded: Path) -> None:
    path = sharded / "model-00001-of-00002.safetensors"
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        refused(sharded, "model-00001-of-00002.safetensors")


def test_config_problems(sharded: Path) -> None:
    config = sharded / "config.json"
    for text, message in (("", "not valid JSON"), ("[]", "expected a JSON object"), ("{'a'", "not valid JSON")):
        config.write_text(text)
        refused(sharded, f"config.json: {message}")
    config.write_bytes(b"\xff\xfe")
    refused(sharded, "config.json: not valid JSON")
    config.unlink()
    refused(sharded, "config.json: no such file")


def test_directories_without_usable_weights(tmp_path: Path) -> None:
    path = write_config(tmp_path / "model")
    refused(path, "no weights found")
    (path / "model.gguf").touch()
    refused(path, "GGUF")
    (path / "adapter_model.safetensors").touch()
    refused(path, "adapter")
    save(path / "x.safetensors", a=A)
    assert torch.equal(open_checkpoint(path).read("a"), A)
    save(path / "y.safetensors", b=B)
    refused(path, "2 safetensors files and no model.safetensors.index.json")


def test_a_file_instead_of_a_directory(tiny_llama: Path) -> None:
    refused(tiny_llama / "model.safetensors", "is a file; name the directory")


def test_unfinished_run(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").touch()
    refused(tmp_path, "unfinished run.*--resume")


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle(tmp_path: Path, legacy: bool) -> None:
    path = write_config(tmp_path / "model")
    torch.save(
        {"a": torch.nn.Parameter(A.t()), "b": B, "step": 3},
        path / "pytorch_model.bin",
        _use_new_zipfile_serialization=not legacy,
    )
    refused(path, "pickle file can run any code.*--allow-pickle")
    with open_checkpoint(path, allow_pickle=True) as checkpoint:
        assert set(checkpoint.tensors) == {"a", "b"}
        assert checkpoint.tensors["a"].shape == (4, 3)
        read = checkpoint.read("a")
        assert torch.equal(read, A.t())
        assert read.is_contiguous()
        assert not read.requires_grad
        assert torch.equal(checkpoint.read_rows("a", [3, 0, 3]), A.t()[[3, 0, 3]])
        assert bytes(checkpoint.copy_bytes("b")) == B.view(torch.uint8).numpy().tobytes()
        with pytest.raises(CheckpointError, match="row 4 was asked"):
            checkpoint.read_rows("a", [4])


def test_safetensors_are_preferred_to_pickle(sharded: Path) -> None:
    (sharded / "pytorch_model.bin").write_bytes(b"never opened")
    assert torch.equal(open_checkpoint(sharded).read("a"), A)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickle_that_runs_code(tmp_path: Path) -> None:
    path = write_config(tmp_path / "model")
    torch.save({"a": A, "bomb": Bomb(tmp_path / "ran")}, path / "pytorch_model.bin")
    refused(path, "holds more than tensors", allow_pickle=True)
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
    refused(path, "pytorch_model.bin", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_corrupt_pickle(tmp_path: Path) -> None:
    path = write_config(tmp_path / "model")
    torch.save({"a": A}, path / "pytorch_model.bin")
    data = (path / "pytorch_model.bin").read_bytes()
    for broken in (b"", b"PK\x03\x04", data[: len(data) // 2], b"x" * 100):
        (path / "pytorch_model.bin").write_bytes(broken)
        refused(path, "pytorch_model.bin", allow_pickle=True)
    torch.save([A], path / "pytorch_model.bin")
    refused(path, "holds no dictionary of tensors", allow_pickle=True)


@pytest.mark.parametrize(
    ("fields", "file"),
    [
        ({"quantization_config": {"bits": 4}}, None),
        ({"compression_config": {"bits": 4}}, None),
        ({"text_config": {"quantization_config": {"bits": 4}}}, None),
        ({"quantization_config": None}, "quantize_config.json"),
        ({}, "quant_config.json"),
    ],
)
def test_quantization_config(sharded: Path, fields: dict[str, Any], file: str | None) -> None:
    write_config(sharded, **fields)
    if file:
        (sharded / file).write_text('{"bits": 4}')
    assert open_checkpoint(sharded).quantization_config == {"bits": 4}


def test_quantization_config_of_the_wrong_kind(sharded: Path) -> None:
    write_config(sharded, quantization_config="gptq")
    with pytest.raises(CheckpointError, match="quantization_config must be an object"):
        _ = open_checkpoint(sharded).quantization_config


def test_auxiliary_files(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(tiny_llama, path)
    for name in ("LICENSE", "README.md", "modeling_x.py", "merges.txt", "spiece.model", "quantize_config.json"):
        (path / name).touch()
    (path / "tokenizer_folder").mkdir()
    names = {file.name for file in open_checkpoint(path).auxiliary_files()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "LICENSE", "merges.txt", "spiece.model"}
    assert not names & {"README.md", "modeling_x.py", "config.json", "model.safetensors", "quantize_config.json"}
    assert "modeling_x.py" in {file.name for file in open_checkpoint(path, trust_remote_code=True).auxiliary_files()}
