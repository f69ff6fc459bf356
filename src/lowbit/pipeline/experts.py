"""Mixture-of-experts blocks with one linear per expert.

transformers 5 keeps all experts of a block in one 3-D parameter; quantization needs a matrix, an input and a
statistic per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from lowbit.errors import UnsupportedError

StagePoint = Callable[[str, Mapping[tuple[str, ...], torch.Tensor]], None]
"""Told ``(stage name, {linears that share an input: that input})`` before those linears run."""


class _OnDemand(Mapping[tuple[str, ...], torch.Tensor]):
    """Inputs that are computed when they are looked at and not kept."""

    def __init__(self, names: Sequence[tuple[str, ...]], compute: Callable[[int], torch.Tensor]) -> None:
        self._index = {name: index for index, name in enumerate(names)}
        self._compute = compute

    def __getitem__(self, name: tuple[str, ...]) -> torch.Tensor:
        return self._compute(self._index[name])

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


class UnfusedExperts(nn.Module):
    """Drop-in for transformers' fused experts: the same forward, with ``nn.Linear`` modules named as on disk.

    All gate and up projections run before any down projection, so that a pass can pause once for each kind. With
    ``all_tokens`` a pause is told of the inputs that each expert would have if every token chose it; the outputs are
    still those of the router's choice.
    """

    def __init__(
        self, count: int, hidden: int, ffn: int, act: Callable[[torch.Tensor], torch.Tensor], names: Sequence[str]
    ) -> None:
        super().__init__()
        self.count = count
        self.names = tuple(names)
        self._act = act
        self.stage_point: StagePoint | None = None
        self.all_tokens = False
        gate, up, down = self.names
        for index in range(count):
            expert = nn.Module()
            expert.add_module(gate, nn.Linear(hidden, ffn, bias=False, device="meta"))
            expert.add_module(up, nn.Linear(hidden, ffn, bias=False, device="meta"))
            expert.add_module(down, nn.Linear(ffn, hidden, bias=False, device="meta"))
            self.add_module(str(index), expert)

    def _linear(self, index: int, kind: int) -> nn.Module:
        return self.get_submodule(f"{index}.{self.names[kind]}")

    def _middle(self, index: int, x: torch.Tensor) -> torch.Tensor:
        gated: torch.Tensor = self._act(self._linear(index, 0)(x)) * self._linear(index, 1)(x)
        return gated

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Sum over the chosen experts; ``hidden`` ``[tokens, hidden]``, the others ``[tokens, k]``."""
        gate, up, down = self.names
        chosen = {
            index: torch.where(top_k_index == index)
            for index in range(self.count)
            if bool((top_k_index == index).any())
        }
        if self.stage_point is not None:
            inputs: dict[tuple[str, ...], torch.Tensor] = {}
            for i in range(self.count) if self.all_tokens else chosen:
                inputs[f"{i}.{gate}", f"{i}.{up}"] = hidden if self.all_tokens else hidden[chosen[i][0]]
            self.stage_point("in", inputs)
            del inputs
        middle = {}
        for i, (tokens, _) in chosen.items():
            x = hidden[tokens]
            middle[i] = self._middle(i, x)
        if self.stage_point is not None and self.all_tokens:
            names = [(f"{i}.{down}",) for i in range(self.count)]
            self.stage_point("out", _OnDemand(names, lambda i: self._middle(i, hidden)))
        elif self.stage_point is not None:
            self.stage_point("out", {(f"{i}.{down}",): x for i, x in middle.items()})
        total = torch.zeros_like(hidden)
        for i, (tokens, places) in chosen.items():
            out = self._linear(i, 2)(middle.pop(i)) * top_k_weights[tokens, places, None]
            total.index_add_(0, tokens, out.to(total.dtype))
        return total


def unfuse_experts(block: nn.Module, names: Sequence[str]) -> None:
    """Replace every fused experts module below ``block`` (on the meta device) by :class:`UnfusedExperts`.

    Raises :class:`UnsupportedError` for a fused layout with biases, which no supported family has.
    """
    for path, module in list(block.named_modules()):
        fused = getattr(module, "gate_up_proj", None)
        if not isinstance(fused, nn.Parameter) or fused.ndim != 3:
            continue
        if getattr(module, "gate_up_proj_bias", None) is not None:
            raise UnsupportedError(f"{path}: experts with biases are not supported")
        count, double_ffn, hidden = fused.shape
        parent, _, last = path.rpartition(".")
        replacement = UnfusedExperts(count, hidden, double_ffn // 2, module.act_fn, names)
        setattr(block.get_submodule(parent), last, replacement)
