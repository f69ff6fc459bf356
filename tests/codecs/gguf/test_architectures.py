"""Architectures: names as the gguf package has them, and the same probabilities from llama.cpp as from transformers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from lowbit.checkpoint import open_checkpoint
from lowbit.codecs import CODECS, module_plan
from lowbit.codecs.gguf.architectures import ExportPlan, export_plan, load_tensor
from lowbit.codecs.gguf.container import write_gguf
from lowbit.errors import CheckpointError, UnsupportedError
from lowbit.formats import IntSpec

LENGTH = 100
VOCABULARY = 320
DECODERS = (
    "llama", "llama-biases", "llama-llama3", "llama-linear", "llama-yarn-attention", "mistral", "mixtral", "qwen2",
    "qwen2-yarn", "qwen2_moe", "qwen2_moe-tied", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3", "gemma3-pattern",
    "phi3", "phi3-partial", "phi3-longrope", "gpt_neox", "gpt_neox-serial",
)  # fmt: skip
ENCODERS = ("bert", "roberta", "xlm-roberta")
HALF_PRECISION_GELU = ("gemma", "gpt_neox")
"""llama.cpp looks GELU up in a table of float16 values."""


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_names_are_those_of_the_gguf_package(model_of: Callable[[str], Path], name: str) -> None:
    checkpoint = open_checkpoint(model_of(name))
    plan = export_plan(checkpoint)
    architecture = {value: kind for kind, value in gguf.MODEL_ARCH_NAMES.items()}[plan.architecture]
    mapping = gguf.get_tensor_name_map(architecture, checkpoint.config["num_hidden_layers"])
    allowed = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[architecture]}
    for tensor in plan.tensors:
        stem, _, suffix = tensor.name.rpartition(".")
        assert re.sub(r"^blk\.\d+", "blk.{bid}", stem) in allowed
        assert suffix in ("weight", "bias")
        single = len(tensor.sources) == 1 and stem != "output"  # the head may be a copy of the embedding
        if single:
            assert mapping.get_name(tensor.sources[0], (".weight", ".bias")) == tensor.name
    assert len({tensor.name for tensor in plan.tensors}) == len(plan.tensors)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_rows_that_make_scores_are_those_of_queries_and_keys(model_of: Callable[[str], Path], name: str) -> None:
    checkpoint = open_checkpoint(model_of(name))
    config = checkpoint.config
    heads, keys = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    expected = {"attn_q": heads * size, "attn_k": keys * size, "attn_qkv": (heads + keys) * size}
    found = 0
    for tensor in export_plan(checkpoint).tensors:
        stem = tensor.name.removesuffix(".weight").rpartition(".")[2]
        assert tensor.score_rows == expected.get(stem, 0), tensor.name
        found += tensor.score_rows
        if stem in ("attn_q", "attn_k"):
            assert tensor.score_rows == tensor.shape[0]
    assert found == config["num_hidden_layers"] * (heads + keys) * size


def serve(path: Path, context: int, *, embedding: bool = False) -> Any:
    """A llama.cpp server over ``path`` that computes in float32 throughout."""
    xllamacpp = pytest.importorskip("xllamacpp")
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = context
    parameters.n_parallel = parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.n_gpu_layers = parameters.verbosity = 0
    parameters.warmup = parameters.fit_params = False
    parameters.embedding = embedding
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(parameters)


def answer(reply: Any) -> Any:
    return json.loads(reply) if isinstance(reply, str) else reply


def log_probabilities(server: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    """Of every token after ``ids``, as llama.cpp sees them."""
    request = {"prompt": ids, "n_predict": 1, "logprobs": VOCABULARY, "n_probs": VOCABULARY, "cache_prompt": False}
    reply = answer(server.handle_completions(request))
    found = np.full(VOCABULARY, np.nan)
    for entry in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


@pytest.mark.parametrize("name", DECODERS)
def test_llama_cpp_predicts_the_same(
    model_of: Callable[[str], Path], write_model: Callable[..., ExportPlan], tmp_path: Path, name: str
) -> None:
    directory = model_of(name)
    write_model(directory, tmp_path / "model.gguf")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(3, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    server = serve(tmp_path / "model.gguf", 256)
    with torch.no_grad():
        expected = torch.log_softmax(model(ids).logits[0, -1], -1).numpy()
    found = log_probabilities(server, ids[0].tolist())
    tolerance = 2e-3 if name.startswith(HALF_PRECISION_GELU) else 2e-5
    assert np.abs(found - expected).max() < tolerance


@pytest.mark.parametrize("name", ENCODERS)
def test_llama_cpp_embeds_the_same(
    model_of: Callable[[str], Path], write_model: Callable[..., ExportPlan], tmp_path: Path, name: str
) -> None:
    directory = model_of(name)
    plan = write_model(directory, tmp_path / "model.gguf")
    assert plan.metadata["bert.pooling_type"] == 1
    server = serve(tmp_path / "model.gguf", 128, embedding=True)
    ids = torch.randint(5, VOCABULARY, (1, 60), generator=torch.Generator().manual_seed(1))
    found = np.array(answer(server.handle_embeddings({"input": ids[0].tolist()}))["data"][0]["embedding"])
    model = AutoModel.from_pretrained(directory).eval()
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].mean(0)
    assert np.abs(found - (states / states.norm()).numpy()).max() < 1e-3


def changed(
    source: Path,
    out: Path,
    *,
    config: dict[str, Any] | None = None,
    rename: Callable[[str], str] | None = None,
    **tensors: Any,
) -> Path:
    """A copy of a checkpoint with another config, names or tensors."""
    shutil.copytree(source, out)
    if config is not None:
        values = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(values | config))
    if rename or tensors:
        found = load_file(out / "model.safetensors") | tensors
        found = {(rename or str)(key): value for key, value in found.items() if value is not None}
        save_file(found, out / "model.safetensors", {"format": "pt"})
    return out


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "activation": ("llama", {"hidden_act": "gelu"}, "computes silu in llama, not gelu"),
    "attention scale": ("gemma2", {"query_pre_attn_scalar": 100}, "scales attention by 64, the model by 100"),
    "soft caps": ("gemma3", {"attn_logit_softcapping": 50.0}, "takes attn_logit_softcapping to be None"),
    "router": ("qwen3_moe", {"norm_topk_prob": False}, "takes norm_topk_prob to be True, it is False"),
    "dense layers": ("qwen3_moe", {"mlp_only_layers": [1]}, r"takes mlp_only_layers to be \[\]"),
    "partial rotary": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "rotates the whole head",
    ),
    "decoder bert": ("bert", {"is_decoder": True}, "takes is_decoder to be False"),
    "yarn turns": (
        "qwen2",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 16,
                             "original_max_position_embeddings": 128}},
        "between 32 turns and 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_computes_differently_is_refused(
    model_of: Callable[[str], Path], tmp_path: Path, case: str
) -> None:
    name, config, reason = REFUSED[case]
    checkpoint = open_checkpoint(changed(model_of(name), tmp_path / "model", config=config))
    with pytest.raises(UnsupportedError, match=reason):
        export_plan(checkpoint)


def test_an_unknown_family_is_refused(checkpoint_of: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedError, match=r"'opt' models cannot be made: lowbit writes.*xlm-roberta"):
        export_plan(open_checkpoint(checkpoint_of("opt")))


def test_missing_and_superfluous_tensors(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        export_plan(open_checkpoint(changed(model_of("llama"), tmp_path / "less", **{name: None})))
    extra = {"model.layers.0.self_attn.lora_A.weight": torch.ones(2, 2)}
    with pytest.raises(UnsupportedError, match=r"lora_A.weight has no place"):
        export_plan(open_checkpoint(changed(model_of("llama"), tmp_path / "more", **extra)))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is missing and not tied"):
        export_plan(open_checkpoint(changed(model_of("qwen2"), tmp_path / "untied", **{"lm_head.weight": None})))
    heads = {"num_attention_heads": 4}
    with pytest.raises(CheckpointError, match=r"q_proj.weight has 128 rows, its heads make up 256"):
        export_plan(open_checkpoint(changed(model_of("llama"), tmp_path / "heads", config=heads)))


def test_the_text_half_of_a_multimodal_model(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = model_of("gemma3")
    text = json.loads((source / "config.json").read_text())
    for base in ("language_model.model.", "model.language_model."):
        out = changed(
            source,
            tmp_path / base.rstrip("."),
            rename=lambda name, base=base: name.replace("model.", base, 1),
            **{"vision_tower.patch.weight": torch.ones(2, 2), "multi_modal_projector.weight": torch.ones(2)},
        )
        (out / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
        with open_checkpoint(out) as checkpoint, open_checkpoint(source) as original:
            found, expected = export_plan(checkpoint), export_plan(original)
        assert found.architecture == "gemma3"
        assert [tensor.name for tensor in found.tensors] == [tensor.name for tensor in expected.tensors]


def test_norms_of_old_bert_checkpoints(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    def old(name: str) -> str:
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        return f"bert.{name}"

    plans = [
        export_plan(open_checkpoint(path))
        for path in (model_of("bert"), changed(model_of("bert"), tmp_path / "old", rename=old))
    ]
    assert [tensor.name for tensor in plans[0].tensors] == [tensor.name for tensor in plans[1].tensors]
    assert "bert.embeddings.LayerNorm.gamma" in [tensor.sources[0] for tensor in plans[1].tensors]


def test_metadata_of_a_llama(model_of: Callable[[str], Path]) -> None:
    plan = export_plan(open_checkpoint(model_of("llama-llama3")))
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "llama.context_length": 256,
        "llama.embedding_length": 128,
        "llama.block_count": 2,
        "llama.feed_forward_length": 256,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.key_length": 64,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": VOCABULARY,
    }
    assert plan.metadata.items() >= expected.items()
    assert plan.notes == ()
    names = {tensor.name: tensor for tensor in plan.tensors}
    assert "output.weight" not in names
    assert names["rope_freqs.weight"].keep_float
    assert names["blk.0.attn_norm.weight"].keep_float
    assert not names["token_embd.weight"].keep_float


def test_a_sliding_window_that_llama_cpp_ignores_is_noted(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    with open_checkpoint(changed(model_of("mistral"), tmp_path / "m", config={"sliding_window": 64})) as checkpoint:
        assert "beyond 64 tokens results differ" in export_plan(checkpoint).notes[0]


ODD: list[Any] = [
    "abc",
    -1,
    0,
    None,
    1.5,
    [1],
    {},
    {"rope_type": "yarn"},
    {"rope_type": "linear", "factor": "x"},
    10**30,
]
FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
    "max_position_embeddings", "rope_parameters", "hidden_act", "tie_word_embeddings", "sliding_window", "layer_types",
    "model_type",
)  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_odd_configs_are_typed_errors(model_of: Callable[[str], Path], tmp_path: Path, field: str) -> None:
    for name in ("llama", "gemma2", "phi3"):
        model = changed(model_of(name), tmp_path / name)
        config = json.loads((model / "config.json").read_text())
        for value in ODD:
            (model / "config.json").write_text(json.dumps(config | {field: value}))
            with suppress(CheckpointError, UnsupportedError):
                plan = export_plan(open_checkpoint(model))
                write_gguf(tmp_path / "model.gguf", plan.metadata, [], [], overwrite=True)


def test_a_quantized_checkpoint_has_the_same_plan(
    model_of: Callable[[str], Path], tmp_path: Path, write_quantized: Callable[..., dict[str, torch.Tensor]]
) -> None:
    source = model_of("llama")
    dense = write_quantized(source, tmp_path / "gptq", CODECS["gptq"], {r".*layers.*": IntSpec(4, 32)})
    original, found = open_checkpoint(source), open_checkpoint(tmp_path / "gptq")
    modules = module_plan(found)
    expected, plan = export_plan(original), export_plan(found, modules)
    assert [(tensor.name, tensor.shape) for tensor in plan.tensors] == [(t.name, t.shape) for t in expected.tensors]
    for tensor in plan.tensors:
        values = dense[tensor.sources[0]]
        order = slice(None) if tensor.row_order is None else torch.from_numpy(tensor.row_order)
        assert torch.equal(load_tensor(found, modules, tensor), values[order]), tensor.name
