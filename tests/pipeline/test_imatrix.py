"""Importance matrices of streamed models against a plain forward of the whole transformers model in float64."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lowbit.checkpoint import open_checkpoint
from lowbit.codecs.gguf.architectures import export_plan
from lowbit.codecs.gguf.imatrix import read_imatrix
from lowbit.errors import NumericsError, UsageError
from lowbit.pipeline.imatrix import collect, imatrix, unseen_experts
from lowbit.pipeline.progress import Silent
from lowbit.pipeline.streamed import StreamedModel

IDS = torch.randint(3, 320, (6, 40), generator=torch.Generator().manual_seed(3))


def naive_sums(path: Path) -> dict[str, np.ndarray]:
    """Sums of squared inputs of every linear of the whole model, by module name."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(()))

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def add(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0].detach().double().numpy().reshape(-1, arguments[0].shape[-1])
            sums[name] = sums[name] + (x**2).sum(0)

        return add

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    return sums


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3", "gpt_neox"])
def test_dense_models(checkpoint_of: Callable[[str], Path], model_type: str) -> None:
    path = checkpoint_of(model_type)
    with open_checkpoint(path) as checkpoint:
        plan = export_plan(checkpoint)
        matrix = collect(StreamedModel(checkpoint), IDS, plan.tensors, "text", Silent())
    sums = naive_sums(path)
    inside = [t for t in plan.tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    assert set(matrix.values) == {tensor.name for tensor in inside}
    for tensor in inside:
        expected = sums[tensor.sources[0].removesuffix(".weight")]
        np.testing.assert_allclose(matrix.values[tensor.name], expected[None], rtol=1e-4)
        assert matrix.counts[tensor.name].tolist() == [IDS.numel()]
    assert (matrix.chunks, matrix.chunk_size, matrix.datasets) == (6, 40, ("text",))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_experts_count_the_tokens_that_chose_them(checkpoint_of: Callable[[str], Path], model_type: str) -> None:
    with open_checkpoint(checkpoint_of(model_type)) as checkpoint:
        plan = export_plan(checkpoint)
        model = StreamedModel(checkpoint)
        matrix = collect(model, IDS, plan.tensors, "text", Silent())
    for block in range(2):
        gate, up, down = (f"blk.{block}.ffn_{kind}_exps.weight" for kind in ("gate", "up", "down"))
        assert matrix.values[gate].shape == (4, 128)
        assert matrix.counts[gate].sum() == 2 * IDS.numel()  # two experts a token
        assert np.array_equal(matrix.counts[gate], matrix.counts[down])
        assert np.array_equal(matrix.values[gate], matrix.values[up])
        # every token's squares are counted once for each expert that it chose
        attention = matrix.values[f"blk.{block}.attn_q.weight"]
        assert attention.shape == (1, 128)
        assert np.isfinite(matrix.values[gate]).all()
        assert "ffn_gate_inp" not in "".join(matrix.values)


def test_the_verb(tiny_llama: Path, calibration_file: Path, tmp_path: Path) -> None:
    settings = {"calibration": calibration_file, "samples": 4, "seq_len": 64}
    result = imatrix(tiny_llama, tmp_path / "m.imatrix.gguf", **settings)  # type: ignore[arg-type]
    assert (result.tensors, result.tokens, result.unseen) == (14, 256, ())
    first = read_imatrix(tmp_path / "m.imatrix.gguf")
    imatrix(tiny_llama, tmp_path / "m.dat", **settings)  # type: ignore[arg-type]
    second = read_imatrix(tmp_path / "m.dat")
    for name, values in first.values.items():
        shape = values.shape
        np.testing.assert_allclose(first.importance(name, *shape), second.importance(name, *shape), rtol=1e-6)
    assert second.datasets == ("calibration.txt",)
    with pytest.raises(UsageError, match="exists already"):
        imatrix(tiny_llama, tmp_path / "m.dat", **settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is a directory"):
        imatrix(tiny_llama, tmp_path, **settings)  # type: ignore[arg-type]


def test_activations_that_overflow_are_named(new_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = new_checkpoint(tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1e38
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with open_checkpoint(path) as checkpoint, pytest.raises(NumericsError, match=r"layers\.0\.mlp\.down_proj"):
        collect(StreamedModel(checkpoint), IDS, export_plan(checkpoint).tensors, "text", Silent())


def test_experts_without_tokens_are_told() -> None:
    from lowbit.codecs.gguf.imatrix import ImportanceMatrix

    name = "blk.0.ffn_up_exps.weight"
    matrix = ImportanceMatrix({name: np.ones((3, 4), np.float32)}, {name: np.array([2, 0, 1], np.int64)})
    assert unseen_experts(matrix) == (f"{name}[1]",)
