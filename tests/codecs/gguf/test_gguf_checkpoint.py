"""A GGUF file as a checkpoint: the tensors, config and predictions of the model it was made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lowbit.checkpoint import Checkpoint, locate, open_checkpoint
from lowbit.codecs import dense_names, module_plan, open_model, read_dense, read_dense_rows, read_weight
from lowbit.codecs.conversion import convert_checkpoint
from lowbit.codecs.gguf.architectures import ExportPlan
from lowbit.codecs.gguf.checkpoint import GgufCheckpoint
from lowbit.codecs.gguf.container import write_gguf
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.evaluation.inspect import inspect_checkpoint
from lowbit.evaluation.verify import verify_checkpoint
from lowbit.formats import IntSpec, QuantizedTensor
from lowbit.formats.ggml import BlockTensor
from lowbit.pipeline.streamed import StreamedModel, build_empty

DECODERS = (
    "llama", "llama-biases", "llama-llama3", "llama-linear", "llama-yarn-attention", "mixtral", "qwen2", "qwen2-yarn",
    "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3", "gemma3-pattern", "phi3", "phi3-partial",
    "phi3-longrope", "gpt_neox",
)  # fmt: skip
ENCODERS = ("bert", "roberta", "xlm-roberta")
LENGTH = 80
Write = Callable[..., ExportPlan]


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    model = StreamedModel(checkpoint)
    hidden = model.embed(torch.arange(3, 3 + LENGTH)[None])
    for index in range(len(model.block_names)):
        hidden = model.run_block(model.load_block(index), index, hidden)
    return model.logits(hidden)


@pytest.mark.parametrize("name", DECODERS)
def test_there_and_back(model_of: Callable[[str], Path], write_model: Write, tmp_path: Path, name: str) -> None:
    write_model(model_of(name), tmp_path / "model.gguf")
    with open_checkpoint(model_of(name)) as original, open_model(tmp_path / "model.gguf") as found:
        assert set(found.tensors) == set(original.tensors)
        for tensor in original.tensors:
            expected = original.read(tensor)
            assert found.tensors[tensor].shape == tuple(expected.shape)
            assert torch.allclose(found.read(tensor).float(), expected.float(), atol=1e-7, rtol=0), tensor
            rows = torch.tensor([len(expected) - 1, 0, 0])
            assert torch.equal(found.read_rows(tensor, rows), found.read(tensor)[rows]), tensor
            assert bytes(found.copy_bytes(tensor)) == found.read(tensor).numpy().tobytes()
        ignored = {"pad_token_id", "head_dim", "rope_theta", "partial_rotary_factor", "rotary_pct"}
        ours, theirs = (build_empty(checkpoint).config.to_dict() for checkpoint in (found, original))
        if name in ("llama-llama3", "phi3-longrope"):
            ignored.add("rope_parameters")  # the same frequencies from other numbers
        differing = {key for key in ours | theirs if ours.get(key) != theirs.get(key)} - ignored
        assert differing == set()
        assert torch.allclose(logits(found), logits(original), atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_moe-tied", "gpt_neox-serial"])
def test_a_tied_head_that_gguf_must_hold_comes_back_untied(
    model_of: Callable[[str], Path], write_model: Write, tmp_path: Path, name: str
) -> None:
    write_model(model_of(name), tmp_path / "model.gguf")
    with open_checkpoint(model_of(name)) as original, open_model(tmp_path / "model.gguf") as found:
        (head,) = set(found.tensors) - set(original.tensors)
        assert head in ("lm_head.weight", "embed_out.weight")
        assert found.config["tie_word_embeddings"] is False
        assert torch.allclose(logits(found), logits(original), atol=1e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_there_and_back(
    model_of: Callable[[str], Path], write_model: Write, tmp_path: Path, name: str
) -> None:
    write_model(model_of(name), tmp_path / "model.gguf")
    original, found = open_checkpoint(model_of(name)), open_model(tmp_path / "model.gguf")
    assert {key for key in set(original.tensors) - set(found.tensors) if "pooler" not in key} == set()
    for tensor in found.tensors:
        expected = original.read(tensor)
        if "position_embeddings" in tensor and name != "bert" and found.config["model_type"] != "bert":
            expected[:2] = 0  # never looked up, and not stored
        if found.tensors[tensor].shape == tuple(expected.shape):
            assert torch.equal(found.read(tensor), expected), tensor


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "Q4_0"), ("qwen3_moe", "Q8_0"), ("gpt_neox", "Q5_0"), ("gemma2", "Q4_1")]
)
def test_quantized_weights(
    model_of: Callable[[str], Path], write_model: Write, tmp_path: Path, name: str, kind: str
) -> None:
    path = tmp_path / "model.gguf"
    write_model(model_of(name), path, kind)
    code = gguf.GGMLQuantizationType[kind]
    with open_checkpoint(model_of(name)) as original, open_model(path) as found:
        plan = module_plan(found)
        assert set(dense_names(found, plan)) == set(original.tensors)
        assert plan
        for module, entry in plan.items():
            values = original.read(f"{module}.weight").numpy()
            expected = gguf.quants.dequantize(gguf.quants.quantize(values, code), code)
            assert str(entry.spec) == kind
            assert entry.shape == values.shape
            assert np.array_equal(read_dense(found, plan, f"{module}.weight").numpy(), expected)
            weight = read_weight(found, plan, module)
            assert isinstance(weight, BlockTensor)
            assert found.info(f"{module}.weight").shape == tuple(weight.blocks.shape)
            rows = [5, 0, 5]
            assert np.array_equal(read_dense_rows(found, plan, f"{module}.weight", rows).numpy(), expected[rows])
        assert bool(torch.isfinite(logits(found)).all())


def test_split_files_are_one_checkpoint(model_of: Callable[[str], Path], write_model: Write, tmp_path: Path) -> None:
    write_model(model_of("qwen3_moe"), tmp_path / "model.gguf", "Q8_0", split_bytes=200_000)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    assert locate(tmp_path) == parts[0]
    with open_model(tmp_path) as found, open_model(parts[1]) as again, open_checkpoint(model_of("qwen3_moe")) as model:
        assert found.files == again.files == tuple(parts)
        assert set(found.tensors) == set(model.tensors)
        verified = verify_checkpoint(parts[1])
        assert verified.modules == len(module_plan(found))


def test_locating(model_of: Callable[[str], Path], write_model: Write, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_model(model_of("llama"), path)
    assert locate(path) == locate(str(path)) == locate(tmp_path) == path
    (tmp_path / "b.gguf").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match="holds 2 GGUF models"):
        locate(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert locate(tmp_path) == tmp_path
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"or a \.gguf file"):
        locate(tmp_path / "text.txt")


def test_inspect_and_verify(model_of: Callable[[str], Path], write_model: Write, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_model(model_of("mixtral"), path, "Q4_0")
    inspection = inspect_checkpoint(path)
    assert (inspection.format, inspection.model_type) == ("gguf", "mixtral")
    assert inspection.specs == {"Q4_0": 34}
    assert inspection.linear_bits_per_weight == 4.5
    assert set(inspection.kinds) == {"embedding", "head", "norm", "router", "experts", "attention"}
    assert inspection.files == {"model.gguf": path.stat().st_size}
    verification = verify_checkpoint(path)
    assert (verification.modules, verification.tensors) == (34, 41)
    data = bytearray(path.read_bytes())
    (tensor,) = [t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_v.weight"]
    data[tensor.data_offset : tensor.data_offset + 2] = b"\x00\x7c"  # infinity
    path.write_bytes(data)
    findings = [finding for finding in verify_checkpoint(path).findings if finding.severity == "error"]
    assert any("self_attn.v_proj" in finding.where and "not finite" in finding.message for finding in findings)
    path.write_bytes(data[:-5000])
    assert inspect_checkpoint(path).problems[0].severity == "error"
    assert not verify_checkpoint(path).ok


@pytest.mark.parametrize("target", ["gptq", "awq", "compressed-tensors"])
def test_codes_are_carried_over(
    model_of: Callable[[str], Path], write_model: Write, tmp_path: Path, target: str
) -> None:
    write_model(model_of("qwen2"), tmp_path / "model.gguf", "Q4_0")
    result = convert_checkpoint(tmp_path / "model.gguf", tmp_path / "out", target, "fp32")
    assert result.source_format == "gguf"
    with open_model(tmp_path / "model.gguf") as source, open_checkpoint(tmp_path / "out") as found:
        before, after = module_plan(source), module_plan(found)
        assert set(after) == {module for module in before if "layers" in module}
        for name in dense_names(source, before):
            assert torch.equal(read_dense(source, before, name).float(), read_dense(found, after, name).float()), name
        for module, entry in after.items():
            assert isinstance(entry.spec, IntSpec)
            assert (entry.spec.bits, entry.spec.group_size) == (4, 32)
            assert isinstance(read_weight(found, after, module), QuantizedTensor)


def test_values_are_written_out(model_of: Callable[[str], Path], write_model: Write, tmp_path: Path) -> None:
    write_model(model_of("gemma"), tmp_path / "model.gguf", "Q4_1")
    with pytest.raises(UnsupportedError, match=r"Q4_1 is no integer grid.*--format dense"):
        convert_checkpoint(tmp_path / "model.gguf", tmp_path / "out", "gptq")
    assert not (tmp_path / "out").exists()
    result = convert_checkpoint(tmp_path / "model.gguf", tmp_path / "out", "dense", "fp32")
    assert result.exact
    with open_model(tmp_path / "model.gguf") as source, open_checkpoint(tmp_path / "out") as found:
        plan = module_plan(source)
        tensors = load_file(tmp_path / "out" / "model.safetensors")
        assert set(tensors) == set(dense_names(source, plan))
        for name, values in tensors.items():
            assert torch.equal(values, read_dense(source, plan, name)), name
        assert torch.equal(logits(found), logits(source))


def test_the_vocabulary_becomes_a_tokenizer(
    model_of: Callable[[str], Path], write_model: Write, tmp_path: Path
) -> None:
    write_model(model_of("llama"), tmp_path / "model.gguf")
    with open_model(tmp_path / "model.gguf") as found:
        files = found.auxiliary_files()
        assert found.has_tokenizer
        assert "tokenizer.json" in [file.name for file in files]
        assert files == found.auxiliary_files()
    assert not files[0].exists()
    convert_checkpoint(tmp_path / "model.gguf", tmp_path / "dense", "dense")
    assert (tmp_path / "dense" / "tokenizer.json").is_file()
    strange = rewritten(
        tmp_path / "model.gguf", tmp_path / "odd.gguf", lambda found: found.update({"tokenizer.ggml.model": "rwkv"})
    )
    result = convert_checkpoint(strange, tmp_path / "bare", "dense")
    assert "no tokenizer written" in result.notes[0]
    assert not (tmp_path / "bare" / "tokenizer.json").exists()


def rewritten(source: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a GGUF file with other metadata, tensors as they are."""
    reader = gguf.GGUFReader(source)
    metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    change(metadata)
    from lowbit.codecs.gguf.container import TensorHeader, read_blocks, read_gguf

    tensors = read_gguf(source).tensors.values()
    headers = [TensorHeader(tensor.name, tensor.type, tensor.shape) for tensor in tensors]
    write_gguf(out, metadata, headers, (read_blocks(tensor) for tensor in tensors))
    return out


BROKEN: dict[str, tuple[str, Any, str]] = {
    "architecture": ("general.architecture", "mamba", "'mamba' cannot be read as a checkpoint"),
    "layers": ("llama.block_count", 3, r"blk\.2\.attn_norm\.weight is missing"),
    "many layers": ("llama.block_count", 2**31, "contradicts its"),
    "fewer layers": ("llama.block_count", 1, r"'blk\.1\..* has no place"),
    "heads": ("llama.attention.head_count", 4, "has 128 rows, its heads make up 256"),
    "no heads": ("llama.attention.head_count", 0, "num_attention_heads must be positive"),
    "rotary": ("llama.rope.dimension_count", 32, "32 of a head's 64 features"),
    "text": ("llama.embedding_length", "128", "embedding_length must be a number"),
    "scaling": ("llama.rope.scaling.type", "su", "no counterpart in transformers"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_models(model_of: Callable[[str], Path], write_model: Write, tmp_path: Path, case: str) -> None:
    key, value, message = BROKEN[case]
    write_model(model_of("llama"), tmp_path / "model.gguf")
    broken = rewritten(tmp_path / "model.gguf", tmp_path / "broken.gguf", lambda found: found.update({key: value}))
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        open_model(broken)


def test_optional_keys_have_llama_cpps_defaults(
    model_of: Callable[[str], Path], write_model: Write, tmp_path: Path
) -> None:
    write_model(model_of("qwen2"), tmp_path / "model.gguf")

    def strip(metadata: dict[str, Any]) -> None:
        for key in ("rope.freq_base", "rope.dimension_count", "attention.key_length", "vocab_size"):
            del metadata[f"qwen2.{key}"]

    with open_model(tmp_path / "model.gguf") as whole:
        found = open_model(rewritten(tmp_path / "model.gguf", tmp_path / "short.gguf", strip))
        assert isinstance(found, GgufCheckpoint)
        assert json.dumps(found.config, sort_keys=True) == json.dumps(whole.config, sort_keys=True)


def test_where_only_a_directory_will_do_the_way_out_is_named(
    model_of: Callable[[str], Path], write_model: Write, tmp_path: Path
) -> None:
    write_model(model_of("llama"), tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"lowbit convert model\.gguf OUT --format dense"):
        open_checkpoint(tmp_path / "model.gguf")
