"""Calibrated scales of FP8 key-value caches against the caches that transformers fills."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowbit.calibration import load_calibration, load_tokenizer
from lowbit.checkpoint import open_checkpoint
from lowbit.codecs.conversion import convert_checkpoint
from lowbit.errors import CheckpointError, UnsupportedError, UsageError
from lowbit.evaluation.evaluate import evaluate
from lowbit.pipeline.cache_hooks import CACHE_HOOKS, model_cache, parse_cache
from lowbit.pipeline.kv_scales import KvScales, round_with_scales
from lowbit.pipeline.quantize import quantize
from lowbit.pipeline.streamed import StreamedModel

SETTINGS: dict[str, Any] = {
    "scheme": "W8A16",
    "group_size": 64,
    "samples": 8,
    "seq_len": 64,
    "held_out_tokens": 0,
}


@torch.no_grad()
def filled(model: Path, source: Path, text: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer that transformers has in its cache after the calibration text."""
    ids = load_calibration(text, load_tokenizer(source), samples=8, seq_len=64, seed=42).ids
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    cache = loaded(ids.long(), use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize(
    ("family", "method", "kind"),
    [
        ("llama", "rtn", "fp8"),
        ("phi", "rtn", "fp8-head"),
        ("opt", "awq", "fp8-head"),  # folds a scaling into the values
        ("mixtral", "gptq", "fp8"),
    ],
)
def test_scales_are_those_of_the_quantized_model_s_cache(
    family: str,
    method: str,
    kind: str,
    checkpoint_of: Callable[[str], Path],
    calibration_file: Path,
    tmp_path: Path,
) -> None:
    source, out, dense = checkpoint_of(family), tmp_path / "out", tmp_path / "dense"
    quantize(source, out, calibration=calibration_file, method=method, kv_cache=kind, **SETTINGS)
    convert_checkpoint(out, dense, "dense", dtype="float32")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).kv_cache_scheme
    assert scheme is not None
    assert scheme.strategy == ("tensor" if kind == "fp8" else "attn_head")
    tensors = load_file(out / "model.safetensors")
    names = sorted({name.rpartition(".")[0] for name in tensors if name.endswith(".k_scale")})
    assert len(names) == 2
    for name, pair in zip(names, filled(dense, source, calibration_file), strict=True):
        for local, vectors in zip(("k_scale", "v_scale"), pair, strict=True):
            largest = vectors.abs().amax((0, 2, 3))
            expected = largest.amax().reshape(1) if kind == "fp8" else largest.reshape(-1, 1, 1)
            found = tensors[f"{name}.{local}"]
            assert found.shape == expected.shape
            # bfloat16 scales; what is calibrated are the blocks as they are quantized one after the other
            assert torch.allclose(found, expected / 448, rtol=0.02), (name, local)


def test_rounding_is_that_of_the_definition() -> None:
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0)) * 4
    scale = torch.tensor([0.5, 0.01, 0.001]).reshape(3, 1, 1)
    expected = torch.empty_like(x)
    for head in range(3):
        step = float(scale[head])
        expected[:, head] = (x[:, head] / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step
    assert torch.equal(round_with_scales(x, scale), expected)
    assert float(expected[:, 2].abs().max()) == pytest.approx(0.448), "saturates"


def test_evaluation_takes_the_cache_that_the_checkpoint_asks_for(
    tiny_llama: Path, calibration_file: Path, tmp_path: Path
) -> None:
    plain, scaled = tmp_path / "plain", tmp_path / "scaled"
    quantize(tiny_llama, plain, calibration=calibration_file, method="rtn", **SETTINGS)
    quantize(tiny_llama, scaled, calibration=calibration_file, method="rtn", kv_cache="fp8", **SETTINGS)

    def divergence(model: Path, **cache: str) -> float:
        found = evaluate(model, against=tiny_llama, text=calibration_file, seq_len=64, max_tokens=1024, **cache)
        assert found.kl_divergence is not None
        return found.kl_divergence

    weights = divergence(plain)
    assert divergence(scaled) > weights
    assert divergence(scaled) == pytest.approx(divergence(scaled, kv_dtype="fp8"))
    costs = {name: divergence(plain, kv_dtype=name) for name in CACHE_HOOKS}
    assert all(cost > weights for cost in costs.values())
    assert costs["q4_0"] > 4 * costs["q8_0"]
    assert costs["int8_per_token_head"] < costs["fp8_per_token_head"]


def test_models_are_left_as_they_were(tiny_llama: Path) -> None:
    ids = torch.arange(3, 40)[None]
    with open_checkpoint(tiny_llama) as checkpoint, torch.no_grad():
        model = StreamedModel(checkpoint)
        block, hidden = model.load_block(0), model.embed(ids)
        before = model.run_block(block, 0, hidden)
        with model_cache(model, "q4_0"):
            assert not torch.equal(model.run_block(block, 0, hidden), before)
        with model_cache(model):
            assert torch.equal(model.run_block(block, 0, hidden), before)
        assert torch.equal(model.run_block(block, 0, hidden), before)


def test_what_cannot_be_is_refused(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for kind, fmt, error, told in (
        ("fp8", "gptq", UnsupportedError, "no place for scales"),
        ("fp4", "compressed-tensors", UsageError, "fp8 or fp8-head"),
    ):
        with pytest.raises(error, match=told):
            quantize(tiny_llama, out, calibration=calibration_file, kv_cache=kind, format=fmt, **SETTINGS)
    assert not out.exists()
    with pytest.raises(UsageError, match="did you mean 'q8_0'"):
        parse_cache("q8")
    assert parse_cache("INT8") == "int8_per_token_head"


def test_damaged_scales_are_told(tiny_llama: Path, tmp_path: Path) -> None:
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    attention = "model.layers.0.self_attn"
    bad = {f"{attention}.k_scale": torch.tensor([0.0]), f"{attention}.v_scale": torch.tensor([1.0])}
    save_file(tensors | bad, tmp_path / "model.safetensors", {"format": "pt"})
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match="positive and finite"):
        KvScales.read(checkpoint, attention)
