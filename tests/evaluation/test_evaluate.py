"""Evaluation of checkpoints on disk against whole models in transformers."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit.errors import CheckpointError, UsageError
from lowbit.evaluation.evaluate import describe, evaluate, evaluate_all
from lowbit.evaluation.results import Evaluation

Checkpoints = Callable[[str], Path]


def rounded_copy(source: Path, target: Path, step: float) -> Path:
    """A copy of a checkpoint whose attention and MLP matrices are rounded to multiples of ``step``."""
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        if weight.dim() == 2 and "layers." in name:
            weights[name] = (weight / step).round() * step
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def log_probs(path: Path, windows: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.log_softmax(model(windows).logits[:, :-1].double(), -1)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox", "mixtral"])
def test_figures_are_those_of_transformers(
    model_type: str, checkpoint_of: Checkpoints, tmp_path: Path, calibration_file: Path
) -> None:
    reference = checkpoint_of(model_type)
    candidate = rounded_copy(reference, tmp_path / "rounded", 0.02)
    result = evaluate(candidate, against=reference, text=calibration_file, seq_len=48, max_tokens=960)

    ids = AutoTokenizer.from_pretrained(reference)(calibration_file.read_text())["input_ids"][:960]
    windows = torch.tensor(ids).reshape(-1, 48)
    p, q = log_probs(reference, windows), log_probs(candidate, windows)
    targets = windows[:, 1:, None]
    divergence = (p.exp() * (p - q)).sum(-1)
    assert result.tokens == 20 * 47
    assert result.perplexity == pytest.approx(math.exp(-float(q.gather(2, targets).mean())), rel=1e-4)
    assert result.reference_perplexity == pytest.approx(math.exp(-float(p.gather(2, targets).mean())), rel=1e-4)
    assert result.kl_divergence == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert result.kl_median == pytest.approx(float(divergence.flatten().quantile(0.5)), rel=1e-3)
    assert result.kl_p99 == pytest.approx(float(divergence.flatten().quantile(0.99)), rel=1e-3)
    assert result.kl_max == pytest.approx(float(divergence.max()), rel=1e-3)
    agreement = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert result.top1_agreement == pytest.approx(agreement, abs=2 / result.tokens)
    worst = result.worst_tokens[0]
    flat = int(divergence.argmax())
    assert (worst.window, worst.position) == (flat // 47, flat % 47 + 1)
    probability = float(p.reshape(-1, p.shape[-1])[flat, windows[worst.window, worst.position]].exp())
    assert worst.reference_probability == pytest.approx(probability, rel=1e-3)


def test_a_model_against_itself(tiny_llama: Path, calibration_file: Path) -> None:
    result = evaluate(tiny_llama, against=tiny_llama, text=calibration_file, seq_len=64, max_tokens=400)
    assert (result.kl_divergence, result.kl_max, result.top1_agreement) == (0.0, 0.0, 1.0)
    assert result.perplexity == result.reference_perplexity
    assert result.perplexity_ratio == 1.0
    assert result.bits_per_weight == result.linear_bits_per_weight == 32
    assert result.verdicts == (), "nothing is quantized, so there is no usual cost"


def test_memory_and_company_do_not_change_the_figures(tiny_llama: Path, tmp_path: Path, calibration_file: Path) -> None:
    near, far = (rounded_copy(tiny_llama, tmp_path / str(step), step) for step in (0.01, 0.05))
    together = evaluate_all([near, far], against=tiny_llama, text=calibration_file, seq_len=32, max_tokens=320)
    alone = evaluate(far, against=tiny_llama, text=calibration_file, seq_len=32, max_tokens=320, memory=1)
    assert together[1].kl_divergence == pytest.approx(alone.kl_divergence, rel=1e-4)
    assert together[0].kl_divergence < together[1].kl_divergence  # type: ignore[operator]
    single = evaluate(near, text=calibration_file, seq_len=32, max_tokens=320)
    assert single.perplexity == pytest.approx(together[0].perplexity, rel=1e-5)
    assert single.reference is None
    assert single.kl_divergence is None
    assert "KL" in describe(alone)
    assert "KL" not in describe(single)


def test_json_holds_what_the_command_line_promises(tiny_llama: Path, calibration_file: Path) -> None:
    result = evaluate(tiny_llama, against=tiny_llama, text=calibration_file, seq_len=32, max_tokens=100, stride=16)
    values = result.to_json()
    promised = {"perplexity", "reference_perplexity", "kl_divergence", "top1_agreement", "tokens", "bits_per_weight"}
    assert promised <= set(values)
    assert Evaluation.from_json(values) == result
    assert "worst_tokens" not in result.certificate()


def test_a_tokenizer_that_leads_with_bos_leads_every_window(
    new_checkpoint: Callable[..., Path], tmp_path: Path, calibration_file: Path
) -> None:
    path = new_checkpoint(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(path)
    assert AutoTokenizer.from_pretrained(path)("a")["input_ids"][0] == tokenizer.bos_token_id
    result = evaluate(path, text=calibration_file, seq_len=40, max_tokens=391)
    ids = tokenizer(calibration_file.read_text())["input_ids"][:391]
    windows = torch.tensor(ids[1:]).reshape(10, 39)
    windows = torch.cat([torch.full((10, 1), ids[0]), windows], 1)
    q = log_probs(path, windows).gather(2, windows[:, 1:, None])
    assert result.tokens == 390
    assert result.perplexity == pytest.approx(math.exp(-float(q.mean())), rel=1e-4)


def test_what_cannot_be_evaluated(
    tiny_llama: Path, new_checkpoint: Callable[..., Path], tmp_path: Path, calibration_file: Path
) -> None:
    with pytest.raises(UsageError, match="--text"):
        evaluate(tiny_llama)
    with pytest.raises(UsageError, match="context"):
        evaluate(tiny_llama, text=calibration_file, seq_len=100_000)
    with pytest.raises(CheckpointError):
        evaluate(tmp_path / "absent", text=calibration_file)
    other = new_checkpoint(tmp_path / "other", vocab_size=384)
    with pytest.raises(UsageError, match="vocabulary"):
        evaluate(other, against=tiny_llama, text=calibration_file, max_tokens=200)
