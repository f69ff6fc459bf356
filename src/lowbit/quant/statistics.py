"""What a calibration run leaves behind for one input of a block: the Gram matrix of its rows, and a few sums."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lowbit.errors import NumericsError

__all__ = ["InputStatistics"]

_BLOCK = 512
_ROWS = 4096
_CACHED_ROWS = 256


class InputStatistics:
    """Accumulates ``G = sum x xᵀ`` over the rows ``x`` of one input, shared by every linear that reads that input.

    ``tokens``     rows counted
    ``nonfinite``  rows left out because they held NaN or infinity
    ``abs_sum``    float32 ``[in]``, sum of ``|x|``

    Only the blocks on and above the diagonal are computed while rows come in; :attr:`gram` mirrors them in place, so
    the memory is one float32 ``[in, in]`` matrix at all times. How rows are cut into calls changes only the last bits.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.in_features = in_features
        self.tokens = 0
        self.nonfinite = 0
        self.abs_sum = torch.zeros(in_features, device=device)
        self._gram = torch.zeros(in_features, in_features, device=device)
        self._mirrored = True

    @property
    def gram(self) -> torch.Tensor:
        """float32 ``[in, in]``, symmetric: the storage itself, not a copy."""
        if not self._mirrored:
            for start in range(0, self.in_features, _BLOCK):
                end = min(start + _BLOCK, self.in_features)
                self._gram[end:, start:end] = self._gram[start:end, end:].T
            self._mirrored = True
        return self._gram

    @property
    def upper_gram(self) -> torch.Tensor:
        """float32 ``[in, in]`` of which only the upper triangle and the 512-wide diagonal blocks hold numbers."""
        return self._gram

    @property
    def abs_mean(self) -> torch.Tensor:
        """float32 ``[in]``: mean of ``|x|`` (zeros before the first row)."""
        return self.abs_sum / max(self.tokens, 1)

    @property
    def diagonal(self) -> torch.Tensor:
        """float32 ``[in]``: sum of ``x²``."""
        return self._gram.diagonal()

    @torch.no_grad()
    def add(self, x: torch.Tensor) -> None:
        """Count the rows of ``x`` ``[..., in]`` of any floating dtype."""
        for rows in torch.split(x.reshape(-1, self.in_features), _ROWS):
            self._add_rows(rows.to(self._gram))

    def _add_rows(self, rows: torch.Tensor) -> None:
        totals = _abs_sum(rows)
        # one bad value anywhere shows in the sums, so that good rows cost no pass of their own
        if not bool(torch.isfinite(totals).all()):
            good = torch.isfinite(rows).all(dim=1)
            self.nonfinite += int((~good).sum())
            rows = rows[good]
            totals = _abs_sum(rows)
        self.tokens += rows.shape[0]
        self.abs_sum += totals
        for start in range(0, self.in_features, _BLOCK):
            end = min(start + _BLOCK, self.in_features)
            self._gram[start:end, start:].addmm_(rows[:, start:end].T, rows[:, start:])
        self._mirrored = self.in_features <= _BLOCK

    def divide_(self, scales: torch.Tensor) -> InputStatistics:
        """Become the statistics of ``x / scales`` (``scales`` float32 ``[in]``), in place; returns itself."""
        self._gram /= scales
        self._gram /= scales[:, None]
        self.abs_sum /= scales
        return self

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors to save; :meth:`from_state` takes them back. The Gram matrix is not copied."""
        counts = torch.tensor([self.tokens, self.nonfinite], dtype=torch.int64)
        return {"gram": self.gram, "abs_sum": self.abs_sum, "counts": counts}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> InputStatistics:
        """The statistics that :meth:`state` came from; raises :class:`NumericsError` if the shapes disagree."""
        gram, abs_sum = state["gram"], state["abs_sum"]
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or abs_sum.shape != gram.shape[:1]:
            raise NumericsError(f"saved statistics: gram is {tuple(gram.shape)}, abs_sum {tuple(abs_sum.shape)}")
        restored = cls.__new__(cls)
        restored.in_features = gram.shape[0]
        restored.tokens, restored.nonfinite = (int(count) for count in state["counts"])
        restored._gram, restored.abs_sum, restored._mirrored = gram, abs_sum, True
        return restored


def _abs_sum(rows: torch.Tensor) -> torch.Tensor:
    """float32 ``[in]``: sum of ``|x|`` over ``rows``."""
    total = torch.zeros_like(rows[0]) if len(rows) else rows.sum(0)
    for part in torch.split(rows, _CACHED_ROWS):
        total += part.abs().sum(0)
    return total
