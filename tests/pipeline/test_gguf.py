"""Quantizing to and converting to GGUF files: what is in them, what is refused, and that nothing half-written stays."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizerFast

import lowbit
from lowbit.checkpoint import known_hashes, read_manifest
from lowbit.codecs import dense_names, module_plan, open_model, read_dense
from lowbit.codecs.gguf.architectures import export_plan
from lowbit.codecs.gguf.container import open_gguf
from lowbit.codecs.gguf.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from lowbit.engines.llama_cpp import LlamaCpp
from lowbit.errors import CheckpointError, NumericsError, ResourceError, UnsupportedError, UsageError
from lowbit.formats.ggml import GGML_TYPES
from lowbit.pipeline import gguf_output, gguf_stream
from lowbit.pipeline.gguf import quantize_gguf
from lowbit.pipeline.gguf_convert import convert
from lowbit.pipeline.gguf_stream import Task, read_ahead
from lowbit.pipeline.streamed import StreamedModel

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
TEXT = {"samples": 4, "seq_len": 64, "held_out_tokens": 0}


@pytest.fixture(scope="session")
def wide_llama(new_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows are whole super-blocks, stored as bfloat16. Read only."""
    path = tmp_path_factory.mktemp("wide") / "model"
    return new_checkpoint(path, dtype=torch.bfloat16, tie_word_embeddings=False, num_key_value_heads=2, **WIDE)


def dense(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model by their names in Hugging Face's form, as float32."""
    with open_model(path) as checkpoint:
        plan = module_plan(checkpoint)
        return {name: read_dense(checkpoint, plan, name).float() for name in dense_names(checkpoint, plan)}


def test_a_mix_is_in_the_file_and_the_manifest(wide_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    result = quantize_gguf(wide_llama, out, scheme="q4_k_m", types=["attn_output=Q5_0"])
    file = open_gguf(out)
    kinds = {name: str(tensor.type) for name, tensor in file.tensors.items()}
    assert kinds["output.weight"] == "Q6_K"
    assert kinds["token_embd.weight"] == "Q4_K"
    assert kinds["blk.1.attn_output.weight"] == "Q5_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert file.metadata["general.file_type"] == 15
    assert file.metadata["general.quantization_version"] == 2
    assert "quantize.imatrix.file" not in file.metadata
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.recipe == {"format": "gguf", "scheme": "Q4_K_M", "pure": False, "types": ["attn_output=Q5_0"]}
    assert set(manifest.source["sha256"]) == {"config.json", "model.safetensors"}
    assert list(manifest.files) == ["model.gguf"]
    assert manifest.modules["model.layers.0.self_attn.o_proj"]["spec"] == "Q5_0"
    with open_model(out) as checkpoint:
        assert {name: str(entry.spec) for name, entry in module_plan(checkpoint).items()} == {
            name: module["spec"] for name, module in manifest.modules.items()
        }
    assert (result.format, result.scheme, len(result.modules)) == ("gguf", "Q4_K_M", 16)
    original, found = dense(wide_llama), dense(out)
    for report in result.modules:
        weight, decoded = original[f"{report.name}.weight"], found[f"{report.name}.weight"]
        error = float((decoded - weight).square().sum() / weight.square().sum())
        assert 0 < error < 0.01
        assert report.weight_error == pytest.approx(error, rel=0.5)
    again = tmp_path / "again.gguf"
    quantize_gguf(wide_llama, again, scheme="q4_k_m", types=["attn_output=Q5_0"])
    assert again.read_bytes() == out.read_bytes()
    assert [finding for finding in lowbit.verify(out).findings if finding.severity == "error"] == []


@pytest.mark.parametrize("scheme", ["Q8_0", "Q2_K"])
def test_slices_and_threads_change_nothing(
    wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    quantize_gguf(wide_llama, tmp_path / "a.gguf", scheme=scheme)
    monkeypatch.setattr(gguf_stream, "SLICE", 5000)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 2)
    try:
        quantize_gguf(wide_llama, tmp_path / "b.gguf", scheme=scheme)
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_importance_is_used(wide_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "auto.gguf"
    result = quantize_gguf(wide_llama, out, scheme="Q4_K_M", imatrix="auto", calibration=calibration_file, **TEXT)
    metadata = open_gguf(out).metadata
    assert metadata["quantize.imatrix.dataset"] == "calibration.txt"
    assert (metadata["quantize.imatrix.entries_count"], metadata["quantize.imatrix.chunks_count"]) == (14, 4)
    assert result.calibration is not None
    assert result.calibration["tokens"] == 256
    lowbit.imatrix(wide_llama, tmp_path / "m.gguf", calibration=calibration_file, samples=4, seq_len=64)
    quantize_gguf(wide_llama, tmp_path / "file.gguf", scheme="Q4_K_M", imatrix=tmp_path / "m.gguf")
    quantize_gguf(wide_llama, tmp_path / "plain.gguf", scheme="Q4_K_M")
    importance = read_imatrix(tmp_path / "m.gguf").importance("blk.0.ffn_down.weight", 1, 512)
    assert importance is not None
    name = "model.layers.0.mlp.down_proj.weight"
    weight = dense(wide_llama)[name]
    errors = {
        kind: float(((dense(tmp_path / f"{kind}.gguf")[name] - weight).square() * torch.from_numpy(importance)).sum())
        for kind in ("auto", "file", "plain")
    }
    assert errors["auto"] == errors["file"] < errors["plain"]


def test_importance_that_is_missing_or_foreign(wide_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(UnsupportedError, match=r"IQ2_XS is worthless without .*--imatrix auto"):
        quantize_gguf(wide_llama, out, scheme="IQ2_XS")
    ones = {"blk.0.attn_q.weight": np.ones((1, 256), np.float32)}
    counts = {name: np.ones(1, np.int64) for name in ones}
    write_imatrix(tmp_path / "part.gguf", ImportanceMatrix(ones, counts))
    with pytest.raises(UnsupportedError, match=r"has no entry for blk\.0\.attn_k\.weight"):
        quantize_gguf(wide_llama, out, scheme="IQ2_XS", imatrix=tmp_path / "part.gguf")
    result = quantize_gguf(wide_llama, out, scheme="Q4_0", imatrix=tmp_path / "part.gguf")
    assert any("13 of 14 matrices are not in the importance matrix" in note for note in result.notes)
    other = {"blk.0.attn_qkv.weight": np.ones((1, 256), np.float32)}
    write_imatrix(tmp_path / "other.gguf", ImportanceMatrix(other, {name: np.ones(1, np.int64) for name in other}))
    with pytest.raises(CheckpointError, match="it was made for another one"):
        quantize_gguf(wide_llama, tmp_path / "x.gguf", imatrix=tmp_path / "other.gguf")
    wrong = {"blk.0.attn_q.weight": np.ones((1, 128), np.float32)}
    write_imatrix(tmp_path / "wrong.gguf", ImportanceMatrix(wrong, counts))
    with pytest.raises(CheckpointError, match=r"wrong\.gguf: .*attn_q.weight has 128 values .*another model"):
        quantize_gguf(wide_llama, tmp_path / "x.gguf", imatrix=tmp_path / "wrong.gguf")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"scheme": "Q4_KM"}, UsageError, "did you mean 'Q4_K_M'"),
        ({"types": ["ffn_dwn=Q4_K"]}, UsageError, "matches no tensor"),
        ({"types": ["ffn_down=Q4"]}, UsageError, "unknown type 'Q4'"),
        ({"method": "gptq"}, UsageError, "--method has no meaning for a GGUF file"),
        ({"symmetric": False}, UsageError, "--sym/--asym has no meaning"),
        ({"group_size": 64}, UsageError, "--group-size has no meaning"),
        ({"resume": True}, UsageError, "--resume has no meaning"),
        ({"sampels": 3}, UsageError, "did you mean 'samples'"),
        ({"imatrix": "absent.gguf"}, CheckpointError, "no such file"),
        ({"imatrix": "auto", "calibration": "absent.txt"}, lowbit.LowbitError, "absent.txt"),
    ],
)
def test_settings_that_cannot_work(
    wide_llama: Path, tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quantize_gguf(wide_llama, tmp_path / "out.gguf", **settings)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_cannot_be(wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"name it out\.gguf"):
        lowbit.quantize(wide_llama, tmp_path / "out", scheme="Q4_K_M")
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(UsageError, match="is a directory"):
        quantize_gguf(wide_llama, tmp_path / "d.gguf")
    out = tmp_path / "out.gguf"
    quantize_gguf(wide_llama, out, scheme="Q8_0")
    with pytest.raises(UsageError, match="exists already"):
        quantize_gguf(wide_llama, out)
    with pytest.raises(UsageError, match="is the source itself"):
        quantize_gguf(out, out, overwrite=True)
    with pytest.raises(UsageError, match="--imatrix is for GGUF files"):
        lowbit.quantize(wide_llama, tmp_path / "directory", imatrix="auto")
    monkeypatch.setattr("lowbit.pipeline.gguf_output.free_disk", lambda path: 1000)
    with pytest.raises(ResourceError, match="free some disk space"):
        quantize_gguf(wide_llama, tmp_path / "big.gguf")


@pytest.mark.parametrize("scheme", ["Q4_K_M", "F32", "F16"])
def test_a_weight_that_is_not_finite_is_named(wide_llama: Path, tmp_path: Path, scheme: str) -> None:
    source = tmp_path / "source"
    shutil.copytree(wide_llama, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 7] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        quantize_gguf(source, tmp_path / "out.gguf", scheme=scheme)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_weight_too_large_for_its_type_is_named(wide_llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(wide_llama, source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 7] = 1e30
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for scheme in ("F16", "Q8_0", "Q4_K_M"):
        with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.* too large"):
            quantize_gguf(source, tmp_path / "out.gguf", scheme=scheme)
    quantize_gguf(source, tmp_path / "out.gguf", scheme="BF16")


def test_split_files(wide_llama: Path, tmp_path: Path) -> None:
    result = quantize_gguf(wide_llama, tmp_path / "m.gguf", scheme="Q8_0", split_bytes=1_000_000)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names[:2] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    assert names[2:] == ["m.lowbit.json"]
    assert result.out == tmp_path / names[0]
    quantize_gguf(wide_llama, tmp_path / "whole.gguf", scheme="Q8_0")
    split, whole = dense(result.out), dense(tmp_path / "whole.gguf")
    assert all(torch.equal(split[name], whole[name]) for name in whole)
    manifest = read_manifest(result.out)
    assert manifest is not None
    assert sorted(manifest.files) == names[:2]


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3", "phi3", "gemma2", "gpt_neox"])
def test_families(checkpoint_of: Callable[[str], Path], model_type: str, tmp_path: Path) -> None:
    source, out = checkpoint_of(model_type), tmp_path / "model.gguf"
    quantize_gguf(source, out, scheme="Q4_K_M")  # rows of 128: everything falls back
    original, found = dense(source), dense(out)
    for name, weight in found.items():
        assert float((weight - original[name]).square().sum()) <= 0.01 * float(original[name].square().sum()), name
    kinds = {str(tensor.type) for tensor in open_gguf(out).tensors.values()}
    assert kinds <= {"F32", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "Q5_K", "Q5_1"}


def test_the_certificate_is_in_the_manifest(wide_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    result = lowbit.quantize(
        wide_llama, out, scheme="Q6_K", calibration=calibration_file, samples=4, seq_len=64, certify_tokens=128
    )
    assert result.quality is not None
    assert 0 < result.quality["kl_divergence"] < 0.1
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.quality == json.loads(json.dumps(result.quality))


def test_a_gguf_source_keeps_the_tensors_that_already_have_their_type(wide_llama: Path, tmp_path: Path) -> None:
    quantize_gguf(wide_llama, tmp_path / "a.gguf", scheme="Q8_0")
    quantize_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", scheme="Q8_0")
    first, second = open_gguf(tmp_path / "a.gguf"), open_gguf(tmp_path / "b.gguf")
    readers = [{t.name: t for t in GGUFReader(tmp_path / f"{name}.gguf").tensors} for name in "ab"]
    assert all(np.array_equal(tensor.data, readers[1][name].data) for name, tensor in readers[0].items())
    tokens = {key: value for key, value in first.metadata.items() if key.startswith("tokenizer.")}
    assert tokens == {key: value for key, value in second.metadata.items() if key.startswith("tokenizer.")}
    quantize_gguf(tmp_path / "a.gguf", tmp_path / "c.gguf", scheme="Q4_0")
    assert str(open_gguf(tmp_path / "c.gguf").tensors["blk.0.attn_q.weight"].type) == "Q4_0"


@pytest.mark.parametrize(
    ("dtype", "kind", "exact"),
    [(None, "BF16", True), ("f32", "F32", True), ("f16", "F16", False), ("q8_0", "Q8_0", False)],
)
def test_dense_sources(wide_llama: Path, tmp_path: Path, dtype: str | None, kind: str, exact: bool) -> None:
    out = tmp_path / "m.gguf"
    result = convert(wide_llama, out, dtype=dtype)
    assert (result.format, result.exact, result.modules) == ("gguf", exact, 0)
    assert str(open_gguf(out).tensors["blk.0.attn_q.weight"].type) == kind
    original, found = dense(wide_llama), dense(out)
    assert set(original) == set(found)
    for name, weight in original.items():
        if exact:
            assert torch.equal(found[name], weight), name
        else:
            assert torch.allclose(found[name], weight, atol=float(weight.abs().max()) / 100), name


@pytest.mark.parametrize(
    ("format", "settings", "kind", "exact"),
    [
        ("gptq", {"bits": 4, "group_size": 32}, "Q4_0", True),
        ("gptq", {"bits": 4, "group_size": 128}, "Q4_0", True),
        ("gptq", {"bits": 8, "group_size": 64}, "Q8_0", True),
        ("awq", {"bits": 4, "group_size": 64, "symmetric": False}, "Q4_1", False),
        ("compressed-tensors", {"bits": 8, "group_size": -1}, "Q8_0", True),
        ("compressed-tensors", {"bits": 4, "group_size": 32, "symmetric": False}, "Q4_1", False),
    ],
)
def test_grids_are_carried_over_code_by_code(
    checkpoint_of: Callable[[str], Path], tmp_path: Path, format: str, settings: dict[str, Any], kind: str, exact: bool
) -> None:
    grid, out = tmp_path / "grid", tmp_path / "m.gguf"
    lowbit.quantize(checkpoint_of("llama"), grid, method="rtn", format=format, certify_tokens=0, **settings)
    result = convert(grid, out)
    tensors = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == kind
    expected = dense(grid)
    up = tensors["blk.0.ffn_up.weight"]
    decoded = torch.from_numpy(dequantize(up.data, up.tensor_type))
    original, found = expected["model.layers.0.mlp.up_proj.weight"], dense(out)
    if exact:
        assert torch.equal(decoded, original)
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())
        assert any("carried over as they are" in note for note in result.notes)
    else:
        assert torch.allclose(decoded, original, atol=float(original.abs().max()) * 2**-10)
        assert any("rounded to float16" in note for note in result.notes)
    assert (result.exact, result.modules, result.source_format) == (exact, 14, format)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.recipe["convert"]["scales"]["count"] > 0
    assert [finding for finding in lowbit.verify(out).findings if finding.severity == "error"] == []


def test_grids_that_do_not_fit(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    grid = tmp_path / "grid"
    lowbit.quantize(
        checkpoint_of("llama"), grid, method="rtn", bits=8, group_size=64, symmetric=False,
        certify_tokens=0,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"no GGUF type holds 8 bits with a zero point.*lowbit quantize"):
        convert(grid, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
    quantize_gguf(grid, tmp_path / "m.gguf", scheme="Q8_0")  # the way out


def test_which_conversion_is_meant(wide_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which --format"):
        convert(wide_llama, tmp_path / "out")
    with pytest.raises(UsageError, match="makes a directory"):
        convert(wide_llama, tmp_path / "out.gguf", "gptq")
    with pytest.raises(UsageError, match="--resume has no meaning"):
        convert(wide_llama, tmp_path / "out.gguf", resume=True)
    with pytest.raises(UsageError, match="unknown dtype 'int4'"):
        convert(wide_llama, tmp_path / "out.gguf", dtype="int4")
    with pytest.raises(UsageError, match="--split-size is for GGUF files"):
        convert(wide_llama, tmp_path / "out", "dense", split_bytes=10)


def test_reading_ahead_hands_errors_on_and_stops_with_its_reader() -> None:
    produced = []

    def items(count: int, fail: bool = False) -> Any:
        for number in range(count):
            produced.append(number)
            yield number
        if fail:
            raise ValueError("at the end")

    assert list(read_ahead(items(20), 2)) == list(range(20))
    with pytest.raises(ValueError, match="at the end"):
        list(read_ahead(items(3, fail=True), 2))
    produced.clear()
    reader = read_ahead(items(1000), 2)
    assert next(reader) == 0
    reader.close()
    assert len(produced) < 10


def test_encoding_ends_with_its_reader(wide_llama: Path) -> None:
    checkpoint = open_model(wide_llama)
    tasks = [Task(tensor, GGML_TYPES["F32"]) for tensor in export_plan(checkpoint).tensors]
    pieces = gguf_stream.encoded(checkpoint, {}, tasks)
    next(pieces)
    assert _own_threads()
    pieces.close()
    assert not _own_threads()


def _own_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith(("lowbit-worker", "lowbit-read-ahead"))]


def test_the_source_is_hashed_meanwhile(wide_llama: Path, tmp_path: Path) -> None:
    made = quantize_gguf(wide_llama, tmp_path / "out.gguf", scheme="Q8_0").out
    manifest = json.loads(made.with_name("out.lowbit.json").read_text())
    expected = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (wide_llama / "config.json", *wide_llama.glob("*.safetensors"))
    }
    assert manifest["source"]["sha256"] == expected


def test_hashing_stops_with_the_run_that_wanted_it(wide_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal does not wait for the hashes of a large source."""
    hashed = threading.Event()

    def endless(path: Path, progress: Callable[[int], None]) -> None:
        while True:
            hashed.set()
            progress(1)

    monkeypatch.setattr(known_hashes, "hash_file", endless)
    with open_model(wide_llama) as checkpoint, gguf_output.SourceHashes(checkpoint) as hashes:
        assert hashed.wait(60)
    with pytest.raises(CancelledError):
        hashes.result()


def test_encoders_have_no_importance(tmp_path: Path, calibration_file: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "##s", "."]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words += [*letters, *(f"##{letter}" for letter in letters if letter != "s")]
    source = tmp_path / "bert"
    source.mkdir()
    (source / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(source / "vocab.txt")).save_pretrained(source)
    BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
        )
    ).save_pretrained(source)
    result = quantize_gguf(source, tmp_path / "bert.gguf", scheme="Q8_0", calibration=calibration_file)
    assert len(result.modules) == 13
    assert str(open_gguf(tmp_path / "bert.gguf").tensors["position_embd.weight"].type) == "F32"
    with pytest.raises(UnsupportedError, match=r"an encoder.*use a scheme that needs none"):
        quantize_gguf(source, tmp_path / "x.gguf", imatrix="auto", calibration=calibration_file)
    with pytest.raises(UnsupportedError, match="an encoder"):
        lowbit.imatrix(source, tmp_path / "x.gguf", calibration=calibration_file)


@pytest.mark.parametrize("scheme", ["F32", "Q8_0", "Q4_K_M", "Q3_K_S"])
def test_llama_cpp_goes_on_as_lowbit_does(scheme: str, tmp_path: Path) -> None:
    out = tmp_path / "demo.gguf"
    quantize_gguf("demo", out, scheme=scheme)
    with LlamaCpp(out, context=128, threads=1) as engine:
        prompt = engine.tokenize("def main(self):\n    ")
        said = engine.greedy(prompt, 16)
    ids = torch.tensor([[*prompt, *(token.id for token in said)]])
    with open_model(out) as checkpoint, torch.no_grad():
        model = StreamedModel(checkpoint)
        hidden = model.embed(ids)
        for index in range(len(model.block_names)):
            hidden = model.run_block(model.load_block(index), index, hidden)
        expected = model.logits(hidden).log_softmax(-1)[0, len(prompt) - 1 : -1]
    # llama.cpp rounds activations to 8 bits where weights are quantized
    margin = 0.01 if scheme == "F32" else 0.3
    for token, row in zip(said, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=margin)
        assert float(row[token.id]) >= float(row.max()) - margin
