"""Stages are found by running the block, and a staged forward equals a plain one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from lowbit.checkpoint import open_checkpoint
from lowbit.pipeline.stages import OnInput, Reference, Stage, StagedForward, discover_stages, split_stages
from lowbit.pipeline.streamed import StreamedModel

EXPECTED = {
    "llama": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
    "phi": [{"q_proj", "k_proj", "v_proj", "fc1"}, {"dense"}, {"fc2"}],
    "gpt_neox": [{"query_key_value"}, {"dense"}, {"dense_h_to_4h"}, {"dense_4h_to_h"}],
    "opt": [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}],
    "mixtral": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"w1", "w3"}, {"w2"}],
}


def _block(path: Path) -> tuple[StreamedModel, nn.Module, list[str], torch.Tensor]:
    model = StreamedModel(open_checkpoint(path))
    block = model.load_block(0)
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    ids = torch.randint(3, 320, (4, 16), generator=torch.Generator().manual_seed(1))
    return model, block, names, model.embed(ids)


def run(
    forward: StagedForward,
    stages: Sequence[Stage],
    on_input: OnInput,
    on_stage: Callable[[Stage], None],
    on_output: Callable[[int, torch.Tensor, torch.Tensor | None], None],
) -> None:
    """The whole of a staged forward over four batches."""
    with forward:
        for stage in stages:
            forward.advance(stage, on_input)
            on_stage(stage)
            forward.close(stage)
        for index in range(4):
            on_output(index, *forward.output(index))


@pytest.mark.parametrize("model_type", sorted(EXPECTED))
def test_linears_are_grouped_by_their_input(model_type: str, checkpoint_of: Callable[[str], Path]) -> None:
    model, block, names, hidden = _block(checkpoint_of(model_type))
    stages = discover_stages(block, names, lambda: model.run_block(block, 0, hidden[:1]))
    found = [{name.rpartition(".")[2] for group in stage.groups for name in group} for stage in stages]
    assert found == EXPECTED[model_type]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_each_stage_sees_inputs_through_the_weights_solved_before(
    model_type: str, keep: bool, checkpoint_of: Callable[[str], Path]
) -> None:
    """Every solved linear is halved; the inputs delivered must be those of a block halved so far, by plain hooks."""
    model, block, names, hidden = _block(checkpoint_of(model_type))
    stages = split_stages(discover_stages(block, names, lambda: model.run_block(block, 0, hidden[:1])), 3)
    delivered: dict[str, list[torch.Tensor]] = {}
    outputs: dict[int, torch.Tensor] = {}
    solved: list[str] = []
    forwards = [lambda i=i: model.run_block(block, 0, hidden[i : i + 1]) for i in range(4)]

    def solve(stage: Stage) -> None:
        for group in stage.groups:
            for name in group:
                block.get_submodule(name).weight.data.mul_(0.5)
                solved.append(name)

    with torch.no_grad():
        run(
            StagedForward(block, stages, forwards, keep=keep),
            stages,
            lambda group, x, _: delivered.setdefault(group[0], []).append(x.clone()),
            solve,
            lambda index, output, _: outputs.__setitem__(index, output),
        )
    assert sorted(solved) == sorted(names)

    plain = model.load_block(0)
    for stage in stages:
        seen: dict[str, list[torch.Tensor]] = {}
        handles = [
            plain.get_submodule(group[0]).register_forward_pre_hook(
                lambda _, a, name=group[0], seen=seen: seen.setdefault(name, []).append(a[0].clone())
            )
            for group in stage.groups
        ]
        for i in range(4):
            model.run_block(plain, 0, hidden[i : i + 1])
        for handle in handles:
            handle.remove()
        for group in stage.groups:
            expected = [x.flatten(0, -2) for x in seen.get(group[0], [])]
            got = [x.flatten(0, -2) for x in delivered.get(group[0], [])]
            assert len(expected) == len(got)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)
            for name in group:
                plain.get_submodule(name).weight.data.mul_(0.5)
    for i in range(4):
        torch.testing.assert_close(outputs[i], model.run_block(plain, 0, hidden[i : i + 1]))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_the_float_block_runs_beside_to_the_same_inputs(
    model_type: str, keep: bool, checkpoint_of: Callable[[str], Path]
) -> None:
    """Each input arrives with that of a block whose weights nobody changes; inputs of experts arrive alone."""
    model, block, names, hidden = _block(checkpoint_of(model_type))
    stages = discover_stages(block, names, lambda: model.run_block(block, 0, hidden[:1]))
    other = hidden + 0.1
    beside = model.load_block(0)
    delivered: dict[str, list[torch.Tensor | None]] = {}
    outputs: dict[int, torch.Tensor] = {}

    def solve(stage: Stage) -> None:
        for group in stage.groups:
            for name in group:
                block.get_submodule(name).weight.data.mul_(0.5)

    def forwards(owner: nn.Module, states: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
        return [lambda i=i: model.run_block(owner, 0, states[i : i + 1]) for i in range(4)]  # type: ignore[misc]

    with torch.no_grad():
        reference = Reference(beside, forwards(beside, other))
        run(
            StagedForward(block, stages, forwards(block, hidden), keep=keep, reference=reference),
            stages,
            lambda group, _, r: delivered.setdefault(group[0], []).append(r),
            solve,
            lambda index, _, found: outputs.__setitem__(index, found),  # type: ignore[arg-type]
        )
    plain = model.load_block(0)
    seen: dict[str, list[torch.Tensor]] = {}
    for group in (group for stage in stages for group in stage.groups):
        plain.get_submodule(group[0]).register_forward_pre_hook(
            lambda _, a, name=group[0]: seen.setdefault(name, []).append(a[0].clone())
        )
    expected = [model.run_block(plain, 0, other[i : i + 1]) for i in range(4)]
    for name, inputs in delivered.items():
        if ".experts." in name:
            assert set(inputs) == {None}
            continue
        for found, wanted in zip(inputs, seen[name], strict=True):
            assert found is not None
            torch.testing.assert_close(found, wanted)
    for index in range(4):
        torch.testing.assert_close(outputs[index], expected[index])
