"""Folding a scaling into the producer of a linear's input leaves the block's function unchanged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lowbit.checkpoint import open_checkpoint
from lowbit.pipeline.folding import fold_into_norm, fold_target, has_unit_offset
from lowbit.pipeline.stages import discover_stages
from lowbit.pipeline.streamed import StreamedModel

FOLDS = {
    "llama": {"q_proj": "input_layernorm", "gate_proj": "post_attention_layernorm", "down_proj": "mlp.up_proj"},
    "qwen3": {"q_proj": "input_layernorm", "gate_proj": "post_attention_layernorm", "down_proj": "mlp.up_proj"},
    "gemma": {"q_proj": "input_layernorm", "gate_proj": "post_attention_layernorm", "down_proj": "mlp.up_proj"},
    "phi": {"q_proj": "input_layernorm"},
    "gpt_neox": {"query_key_value": "input_layernorm", "dense_h_to_4h": "post_attention_layernorm"},
    "opt": {"q_proj": "self_attn_layer_norm", "out_proj": "self_attn.v_proj", "fc1": "final_layer_norm"},
    "mixtral": {"q_proj": "input_layernorm"},
}


@pytest.mark.parametrize("model_type", sorted(FOLDS))
def test_folding_keeps_the_function(model_type: str, checkpoint_of: Callable[[str], Path]) -> None:
    model = StreamedModel(open_checkpoint(checkpoint_of(model_type)))
    block = model.load_block(0)
    for name, parameter in block.named_parameters():
        if parameter.ndim == 1:  # norms are all ones in a fresh model: make their gains differ
            parameter.data += 0.3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    hidden = model.embed(torch.randint(3, 320, (1, 24), generator=torch.Generator().manual_seed(1)))
    before = model.run_block(block, 0, hidden)
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    found = {}
    with torch.no_grad():
        for stage in discover_stages(block, names, lambda: model.run_block(block, 0, hidden)):
            for group in stage.groups:
                target = fold_target(block, model.family, group[0])
                if target is None:
                    continue
                last = group[0].rpartition(".")[2]
                if ".experts." not in group[0]:
                    found[last] = target
                width = block.get_submodule(group[0]).in_features
                scales = 0.5 + torch.rand(width, generator=torch.Generator().manual_seed(2))
                producer = block.get_submodule(target)
                if isinstance(producer, nn.Linear):
                    producer.weight.div_(scales[:, None])
                    if producer.bias is not None:
                        producer.bias.div_(scales)
                else:
                    bias = getattr(producer, "bias", None)
                    weight, bias, scales = fold_into_norm(
                        producer.weight, bias, scales, unit_offset=has_unit_offset(producer)
                    )
                    producer.weight.copy_(weight)
                    if bias is not None:
                        producer.bias.copy_(bias)
                for name in group:
                    block.get_submodule(name).weight.mul_(scales)
    assert found == FOLDS[model_type]
    torch.testing.assert_close(model.run_block(block, 0, hidden), before, rtol=1e-4, atol=1e-4)


def test_scales_in_effect_are_those_of_the_rounded_gain() -> None:
    gain = torch.tensor([1.0, 0.7, 0.0, -0.3, 2.0]).bfloat16()
    stored, bias, effective = fold_into_norm(gain, gain, torch.tensor([1.3, 0.9, 2.0, 1.1, 3.0]), unit_offset=False)
    assert stored.dtype is torch.bfloat16
    torch.testing.assert_close(stored.float() * effective, gain.float(), rtol=1e-6, atol=0)
    assert effective[2] == 1
    assert bias is not None
    assert float((effective / torch.tensor([1.3, 0.9, 1.0, 1.1, 3.0]) - 1).abs().max()) < 2**-8


def test_value_projection_of_grouped_query_attention_is_no_target(checkpoint_of: Callable[[str], Path]) -> None:
    model = StreamedModel(open_checkpoint(checkpoint_of("llama")))
    assert fold_target(model.empty_block(0), model.family, "self_attn.o_proj") is None
