"""Statistics of an input of the quantized model beside the same input of the float model."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lowbit.errors import NumericsError
from lowbit.quant.statistics import InputStatistics

__all__ = ["PairedStatistics"]

_ROWS = 4096


class PairedStatistics(InputStatistics):
    """What :class:`InputStatistics` says of the rows ``x``, and how the float model's rows ``r`` differ from them.

    ``cross``   float32 ``[in, in]``, sum of ``(r - x) xᵀ``
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(in_features, device)
        self.cross = torch.zeros(in_features, in_features, device=device)

    @torch.no_grad()
    def add_pair(self, x: torch.Tensor, reference: torch.Tensor) -> None:
        """Count the rows of ``x`` ``[..., in]`` and of ``reference``, of the same shape; only finite pairs count."""
        flat, others = x.reshape(-1, self.in_features), reference.reshape(-1, self.in_features)
        for rows, wanted in zip(torch.split(flat, _ROWS), torch.split(others, _ROWS), strict=True):
            rows, difference = rows.to(self.cross), wanted.to(self.cross) - rows.to(self.cross)
            if not bool(torch.isfinite(difference.sum())):
                good = torch.isfinite(rows).all(1) & torch.isfinite(difference).all(1)
                self.nonfinite += int((~good).sum())
                rows, difference = rows[good], difference[good]
            self.add(rows)
            self.cross.addmm_(difference.T, rows)

    def divide_(self, scales: torch.Tensor) -> PairedStatistics:
        """Become the statistics of inputs divided by ``scales`` (float32 ``[in]``), in place; returns itself."""
        super().divide_(scales)
        self.cross /= scales
        self.cross /= scales[:, None]
        return self

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors to save; :meth:`from_state` takes them back."""
        return super().state() | {"cross": self.cross}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> PairedStatistics:
        """The statistics that :meth:`state` came from; raises :class:`NumericsError` if the shapes disagree."""
        restored = super().from_state(state)
        assert isinstance(restored, cls)
        if state["cross"].shape != state["gram"].shape:
            raise NumericsError(f"saved statistics: cross is {tuple(state['cross'].shape)}")
        restored.cross = state["cross"]
        return restored
