"""Encoding weights in the blocks of ggml: lowbit's own searches, compiled with numba.

The encoders are imported by the first call: numba is slow to load.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lowbit.errors import NumericsError, UsageError
from lowbit.formats.ggml import GgmlType, decode, finite_scales, scale_rows
from lowbit.kernels.threads import over_rows

__all__ = ["prepare_importance", "quantize_rows", "round_to_half"]

_PART = 1 << 17
"""Weights that an encoder gets at a time: few enough to stay in the cache between its passes."""

_TEMPER = 0.75
"""Power of the importance that is searched with. It is measured on some text and knows nothing of how inputs vary
together: taken at its word, it spends on a few columns what others need. The weighted error rises by about 1 %, the
divergence of the embedded model's 2- and 3-bit files falls by 2 to 10 %."""

_FLOOR = np.float32(1e-9)
"""The least importance, in units of the mean: columns without importance are still encoded sensibly."""

_COARSE = 4.0
"""Types of fewer bits lose enough of a weight for its size to matter."""
_LEAST_SLOPE = np.float32(0.5)
"""Rows are made no larger than by the inverse of this."""

_INFINITE = 0x7F80
"""The upper 16 bits of infinity; those of NaNs are no less."""
_INFINITE_HALF = 0x7C00
"""Infinity in float16."""


def quantize_rows(
    weight: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    kind: GgmlType,
    importance: npt.NDArray[np.float32] | None = None,
    *,
    full_size: int = 0,
) -> npt.NDArray[np.uint8]:
    """uint8 ``[rows, kind.row_bytes(columns)]``: ``weight`` ``[rows, columns]`` in the blocks of ``kind``.

    ``weight`` is float32, or uint16 with the bits of bfloat16, for which the result is that of the same values in
    float32, without a copy of them all.
    Minimises the squared error of each row, that of column ``j`` times its share of ``importance`` (float32
    ``[columns]``, not negative; see :func:`prepare_importance`), with the scales as they are stored. Rows are
    independent of each other and spread over torch's threads; the result does not depend on their number.

    The least error makes a row smaller than its weights by the share of their energy that is lost, all in one
    direction. The first ``full_size`` rows are made as large as their weights again (``sum(importance * row * weight)``
    is that of the weights): right for queries and keys, which smaller ones make attend to everything alike.

    Raises :class:`UsageError` for a shape that ``kind`` cannot hold or importance of another length, and
    :class:`NumericsError` naming the row for weights that are not finite or too large for the scales of ``kind``, and
    for importance that is negative or not finite.
    """
    from lowbit.kernels.ggml.direct import greatest_bits, widened
    from lowbit.kernels.ggml.encoders import ENCODERS, direct_encoder

    rows, columns = weight.shape
    if not kind.fits(columns):
        raise UsageError(
            f"{kind} wants rows of a multiple of {kind.block_size} weights, not {columns}: use another type"
        )
    prepared = None if importance is None else prepare_importance(importance, columns)
    direct = direct_encoder(kind.name, prepared)
    encoder = ENCODERS[kind.name] if direct is None else None
    blocks = np.empty((rows, kind.row_bytes(columns)), dtype=np.uint8)
    step = max(1, _PART // max(1, columns))

    def encode(begin: int, end: int) -> None:
        for start in range(begin, end, step):
            stop = min(start + step, end)
            # one layout only, writable and aligned: numba compiles its loops anew for every other
            part = np.require(weight[start:stop], weight.dtype, ["C", "A", "W"])
            if direct is not None:
                greatest = direct(part.reshape(-1), blocks[start:stop].reshape(-1, kind.block_bytes))
                _require_finite(part, greatest, start)
            elif encoder is not None:
                _require_finite(part, greatest_bits(part), start)
                with np.errstate(over="ignore", under="ignore"):
                    blocks[start:stop] = encoder(widened(part), prepared)
            if start < full_size and kind.bits < _COARSE:
                _enlarge(part[: full_size - start], blocks[start : min(stop, full_size)], kind, prepared)
            if not finite_scales(blocks[start:stop], kind):
                _refuse(blocks[start:stop], kind, start)

    if blocks.size:
        over_rows(rows, 1, encode)
    return blocks


def _enlarge(
    weight: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    blocks: npt.NDArray[np.uint8],
    kind: GgmlType,
    importance: npt.NDArray[np.float32] | None,
) -> None:
    """Scale the rows of ``blocks`` to the size of their weights."""
    from lowbit.kernels.ggml.direct import widened

    values = widened(weight)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        decoded = decode(blocks, kind)
        shares = values if importance is None else values * importance
        slopes = (shares * decoded).sum(axis=1) / (shares * values).sum(axis=1)
    slopes[~((slopes > _LEAST_SLOPE) & (slopes < 1))] = 1.0
    scale_rows(blocks, kind, 1 / slopes)


def round_to_half(
    weight: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
) -> tuple[npt.NDArray[np.uint16], float, float]:
    """The bits of float16 nearest to ``weight`` ``[rows, columns]``, float32 or the bits of bfloat16.

    Also returns the squared error of the rounding, over everything, and the sum of squares. Raises
    :class:`NumericsError` for weights that are not finite or too large for float16.
    """
    from lowbit.kernels.ggml.direct import greatest_bits, to_halves

    halves = np.empty(weight.shape, np.uint16)
    sums: dict[int, tuple[float, float]] = {}

    def encode(begin: int, end: int) -> None:
        part = np.require(weight[begin:end], weight.dtype, ["C", "A", "W"])
        greatest, error, energy = to_halves(part.reshape(-1), halves[begin:end].reshape(-1))
        sums[begin] = error, energy
        if greatest >= _INFINITE:
            raise NumericsError("a weight is not finite: the source is damaged")
        if greatest_bits(halves[begin:end]) >= _INFINITE_HALF:
            raise NumericsError("a weight is too large for F16: use BF16 or F32")

    over_rows(len(weight), 1, encode)
    in_order = [sums[begin] for begin in sorted(sums)]
    return halves, sum(error for error, _ in in_order), sum(energy for _, energy in in_order)


def prepare_importance(importance: npt.NDArray[np.float32], columns: int) -> npt.NDArray[np.float32]:
    """float32 ``[columns]``: ``importance``, tempered, with mean 1 and no zeros; all 1 where it is zero everywhere."""
    values = np.asarray(importance, dtype=np.float64)
    if values.shape != (columns,):
        raise UsageError(f"importance of shape {values.shape} does not belong to rows of {columns} weights")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise NumericsError("importance must be finite and not negative: compute the importance matrix again")
    values = (values / (values.max(initial=0.0) or 1.0)) ** _TEMPER
    mean = values.mean() if columns else 0.0
    scaled = (values / mean).astype(np.float32) if mean > 0 else np.ones(columns, dtype=np.float32)
    return np.maximum(scaled, _FLOOR)


def _require_finite(part: npt.NDArray[np.float32] | npt.NDArray[np.uint16], greatest: int, first: int) -> None:
    """Raise :class:`NumericsError` naming the row of the first value that is not finite, from the bits of the greatest
    magnitude: unlike comparisons of floats they meet every NaN."""
    if greatest < _INFINITE:
        return
    bits = part.view(np.uint16) if part.dtype == np.uint16 else part.view(np.uint16)[:, 1::2]
    bad = ((bits & 0x7FFF) >= _INFINITE).any(axis=1)
    raise NumericsError(f"row {first + int(bad.argmax())} holds weights that are not finite: check the checkpoint")


def _refuse(blocks: npt.NDArray[np.uint8], kind: GgmlType, first: int) -> None:
    for row, block in enumerate(blocks):
        if not finite_scales(block[None], kind):
            raise NumericsError(f"row {first + row} holds weights too large for {kind}: keep the tensor in BF16 or F32")
