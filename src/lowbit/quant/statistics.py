"""What a calibration run leaves behind for one input of a block: the Gram matrix of its rows, and a few sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from lowbit.errors import NumericsError

__all__ = ["InputStatistics", "InputSums", "add_to_panel", "panel_starts"]

_BLOCK = 512
_ROWS = 4096
_CACHED_ROWS = 256
_SAMPLE = 256


class InputSums:
    """What is counted of the rows ``x`` of one input beside their Gram matrix, in the order in which they come.

    ``tokens``     rows counted
    ``nonfinite``  rows left out because they held NaN or infinity
    ``abs_sum``    float32 ``[in]``, sum of ``|x|``
    ``abs_max``    float32 ``[in]``, largest ``|x|``
    ``sample``     float32 ``[n, in]``, evenly spaced rows: all of the first 128, then between 128 and 256 of them
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.in_features = in_features
        self.tokens = 0
        self.nonfinite = 0
        self.abs_sum = torch.zeros(in_features, device=device)
        self.abs_max = torch.zeros(in_features, device=device)
        self.sample = torch.zeros(0, in_features, device=device)
        self._stride = 1

    def rows(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """The rows of ``x`` ``[..., in]`` of any floating dtype, float32 and as many at a time as count at once."""
        for rows in torch.split(x.reshape(-1, self.in_features), _ROWS):
            yield rows.to(self.abs_sum)

    @torch.no_grad()
    def count(self, rows: torch.Tensor) -> torch.Tensor:
        """Count float32 ``rows`` ``[n, in]``; returns the finite ones among them."""
        totals, largest = _magnitudes(rows)
        # one bad value anywhere shows in the sums, so that good rows cost no pass of their own
        if not bool(torch.isfinite(totals).all()):
            good = torch.isfinite(rows).all(dim=1)
            self.nonfinite += int((~good).sum())
            rows = rows[good]
            totals, largest = _magnitudes(rows)
        self._take_sample(rows)
        self.tokens += rows.shape[0]
        self.abs_sum += totals
        self.abs_max = torch.maximum(self.abs_max, largest)
        return rows

    def _take_sample(self, rows: torch.Tensor) -> None:
        """Keep every ``stride``-th row of all; when there are too many, every other of those."""
        self.sample = torch.cat([self.sample, rows[-self.tokens % self._stride :: self._stride]])
        while len(self.sample) > _SAMPLE:
            self.sample = self.sample[::2].clone()
            self._stride *= 2


def panel_starts(in_features: int) -> range:
    """First row of each panel of a Gram matrix: 512 rows (the last may have fewer), from the diagonal rightwards."""
    return range(0, in_features, _BLOCK)


@torch.no_grad()
def add_to_panel(panel: torch.Tensor, start: int, rows: torch.Tensor) -> None:
    """Add the products of ``rows`` float32 ``[n, in]`` to the panel ``[up to 512, in - start]`` that begins there."""
    panel.addmm_(rows[:, start : start + len(panel)].T, rows[:, start:])


class InputStatistics(InputSums):
    """Accumulates ``G = sum x xᵀ`` over the rows ``x`` of one input, shared by every linear that reads that input.

    Only the blocks on and above the diagonal are computed while rows come in; :attr:`gram` mirrors them in place, so
    the memory is one float32 ``[in, in]`` matrix at all times. How rows are cut into calls changes only the last bits.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(in_features, device)
        self._gram = torch.zeros(in_features, in_features, device=device)
        self._mirrored = True

    @classmethod
    def joined(cls, sums: InputSums, panels: Sequence[torch.Tensor]) -> InputStatistics:
        """The statistics of rows whose :class:`InputSums` and panels (:func:`panel_starts`) were summed apart."""
        whole = cls(sums.in_features, sums.abs_sum.device)
        for start, panel in zip(panel_starts(sums.in_features), panels, strict=True):
            whole._gram[start : start + len(panel), start:] = panel
        whole._mirrored = sums.in_features <= _BLOCK
        vars(whole).update(vars(sums))
        return whole

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
        for rows in self.rows(x):
            finite = self.count(rows)
            for start in panel_starts(self.in_features):
                add_to_panel(self._gram[start : start + _BLOCK, start:], start, finite)
            self._mirrored = self.in_features <= _BLOCK

    def divide_(self, scales: torch.Tensor) -> InputStatistics:
        """Become the statistics of ``x / scales`` (``scales`` float32 ``[in]``), in place; returns itself."""
        self._gram /= scales
        self._gram /= scales[:, None]
        self.abs_sum /= scales
        self.abs_max /= scales
        self.sample /= scales
        return self

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors to save; :meth:`from_state` takes them back. The Gram matrix is not copied."""
        counts = torch.tensor([self.tokens, self.nonfinite, self._stride], dtype=torch.int64)
        sums = {"abs_sum": self.abs_sum, "abs_max": self.abs_max, "sample": self.sample}
        return {"gram": self.gram, "counts": counts, **sums}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> InputStatistics:
        """The statistics that :meth:`state` came from; raises :class:`NumericsError` if the shapes disagree."""
        gram, abs_sum, abs_max = state["gram"], state["abs_sum"], state["abs_max"]
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or {abs_sum.shape, abs_max.shape} != {gram.shape[:1]}:
            shapes = f"gram is {tuple(gram.shape)}, abs_sum {tuple(abs_sum.shape)}, abs_max {tuple(abs_max.shape)}"
            raise NumericsError(f"saved statistics: {shapes}")
        restored = cls.__new__(cls)
        restored.in_features = gram.shape[0]
        restored.tokens, restored.nonfinite, restored._stride = (int(count) for count in state["counts"])
        restored.abs_sum, restored.abs_max, restored.sample = abs_sum, abs_max, state["sample"]
        restored._gram, restored._mirrored = gram, True
        return restored


def _magnitudes(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 ``[in]`` each: sum and largest of ``|x|`` over ``rows``."""
    total = torch.zeros_like(rows[0]) if len(rows) else rows.sum(0)
    largest = torch.zeros_like(total)
    for part in torch.split(rows, _CACHED_ROWS) if len(rows) else ():
        magnitudes = part.abs()
        total += magnitudes.sum(0)
        largest = torch.maximum(largest, magnitudes.amax(0))
    return total, largest
