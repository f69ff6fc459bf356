"""Rotated checkpoints compute what the originals do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.checkpoint import Checkpoint, open_checkpoint
from lowbit.errors import UnsupportedError, UsageError
from lowbit.pipeline.quantize import quantize
from lowbit.pipeline.rotate import ROTATABLE, RotatedCheckpoint
from lowbit.pipeline.streamed import StreamedModel
from lowbit.quant.rotation import hadamard, random_rotation


@pytest.fixture
def uneven(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint whose norms and biases are not those of a fresh model."""

    def make(model_type: str) -> Path:
        path = tmp_path / model_type
        shutil.copytree(checkpoint_of(model_type), path)
        weights = load_file(path / "model.safetensors")
        generator = torch.Generator().manual_seed(3)
        for name, tensor in weights.items():
            if tensor.ndim == 1:
                weights[name] = tensor + 0.3 * torch.rand(tensor.shape, generator=generator)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return make


def _logits(checkpoint: Checkpoint) -> torch.Tensor:
    model = StreamedModel(checkpoint)
    hidden = model.embed(torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(1)))
    for index in range(len(model.block_names)):
        hidden = model.run_block(model.load_block(index), index, hidden)
    return model.logits(hidden)


@pytest.mark.parametrize("model_type", ROTATABLE)
def test_outputs_are_unchanged_to_rounding(model_type: str, uneven: Callable[[str], Path]) -> None:
    with open_checkpoint(uneven(model_type)) as source:
        before = _logits(source)
        rotated = RotatedCheckpoint(source, "hadamard", seed=7)
        after = _logits(rotated)
        changed = [n for n in source.tensors if not torch.equal(source.read(n).float(), rotated.read(n).float())]
    assert float((after - before).abs().max()) < 2e-4 * float(before.abs().max())
    assert len(changed) > len(source.tensors) // 2


def test_a_rotated_model_goes_through_every_step(
    uneven: Callable[[str], Path], calibration_file: Path, tmp_path: Path
) -> None:
    """Tied embeddings come out as two; the 8-bit model is the float one but for rounding."""
    source, out = uneven("llama"), tmp_path / "out"
    settings: dict[str, Any] = {
        "calibration": calibration_file,
        "samples": 8,
        "seq_len": 64,
        "group_size": 64,
        "bits": 8,
    }
    quantize(source, out, rotate="hadamard", transform="awq", **settings)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    with open_checkpoint(source) as a, open_checkpoint(out) as b:
        assert "lm_head.weight" in b.tensors
        p, q = (torch.log_softmax(_logits(checkpoint).double(), -1) for checkpoint in (a, b))
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 5e-3


@pytest.mark.parametrize("model_type", ["gemma2", "opt", "gpt_neox"])
def test_what_would_not_be_exact_is_refused(model_type: str, checkpoint_of: Callable[[str], Path]) -> None:
    with open_checkpoint(checkpoint_of(model_type)) as source, pytest.raises(UnsupportedError, match="exact only"):
        RotatedCheckpoint(source, "hadamard", 0)


def test_other_rotations_are_refused(tiny_llama: Path) -> None:
    with open_checkpoint(tiny_llama) as source, pytest.raises(UsageError, match="hadamard"):
        RotatedCheckpoint(source, "givens", 0)


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 28, 36, 44, 56, 96, 128, 160, 384, 896, 1152])
def test_hadamard_matrices_are(size: int) -> None:
    matrix = hadamard(size).double()
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size, dtype=torch.float64))
    turned = random_rotation(size, seed=1).double()
    torch.testing.assert_close(turned @ turned.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-5)


def test_an_order_without_a_construction_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="order 6"):
        hadamard(6)
