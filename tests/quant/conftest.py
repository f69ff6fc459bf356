"""Weights and inputs like those of language models: correlated inputs, a few channels that are far larger."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from lowbit.quant import InputStatistics


@dataclass(frozen=True)
class Problem:
    """Inputs ``[rows, in]``, a weight ``[out, in]`` and the statistics of the inputs."""

    inputs: torch.Tensor
    weight: torch.Tensor
    statistics: InputStatistics

    def forward_error(self, quantized: torch.Tensor) -> float:
        """Relative squared output error by forwards in float64."""
        x = self.inputs.double()
        expected = x @ self.weight.double().T
        return float((x @ quantized.double().T - expected).square().sum() / expected.square().sum())


class Problems:
    """Makes them."""

    @staticmethod
    def inputs(rows: int, features: int, *, outliers: int = 2, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        rank = max(2, features // 4)
        mixing = torch.randn(rank, features, generator=generator) / rank**0.5
        inputs = torch.randn(rows, rank, generator=generator) @ mixing
        inputs += 0.3 * torch.randn(rows, features, generator=generator)
        inputs[:, torch.randperm(features, generator=generator)[:outliers]] *= 15
        return inputs

    def __call__(self, out: int, features: int, *, rows: int = 600, outliers: int = 2, seed: int = 0) -> Problem:
        inputs = self.inputs(rows, features, outliers=outliers, seed=seed)
        weight = 0.02 * torch.randn(out, features, generator=torch.Generator().manual_seed(100 + seed))
        statistics = InputStatistics(features)
        statistics.add(inputs)
        return Problem(inputs, weight, statistics)


@pytest.fixture
def problems() -> Problems:
    return Problems()
