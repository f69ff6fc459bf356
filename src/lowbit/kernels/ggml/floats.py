"""Encoding in the float types of ggml (rounding to nearest, ties to even) and in its 4-bit floats, MXFP4 and NVFP4.

Signatures and rules are those of :mod:`lowbit.kernels.ggml.encoders`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lowbit.formats.ggml.codebooks import fp4_values
from lowbit.formats.ggml.decode_legacy import e4m3_halves
from lowbit.kernels.ggml import packing
from lowbit.kernels.ggml.blocks import in_blocks, level_table
from lowbit.kernels.ggml.direct import to_bfloat16, to_float16
from lowbit.kernels.ggml.listed import solve_listed

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def f32(weight: Floats, importance: Floats | None) -> Bytes:
    """The bytes as they stand."""
    return weight.view(np.uint8)


def f16(weight: Floats, importance: Floats | None) -> Bytes:
    """IEEE half precision; values beyond it become infinite, which the caller refuses."""
    rounded = np.empty(weight.shape, dtype=np.uint16)
    to_float16(weight.reshape(-1), weight.reshape(-1).view(np.uint32), rounded.reshape(-1))
    return rounded.view(np.uint8)


def bf16(weight: Floats, importance: Floats | None) -> Bytes:
    """The upper half of a float32; values beyond the greatest bfloat16 become infinite, which the caller refuses."""
    rounded = np.empty(weight.shape, dtype=np.uint16)
    to_bfloat16(weight.reshape(-1).view(np.uint32), rounded.reshape(-1))
    return rounded.view(np.uint8)


def nvfp4(weight: Floats, importance: Floats | None) -> Bytes:
    """Four scales E4M3, four runs of codes E2M1."""
    codes, chosen = _four_bit_floats(weight, importance, (64, 16), e4m3_halves()[:127], (4, 6))
    return packing.as_rows(weight, chosen, packing.join_nibbles(codes, 8))


def _four_bit_floats(
    weight: Floats, importance: Floats | None, sizes: tuple[int, int], scales: Floats, reach: tuple[int, int]
) -> tuple[Bytes, Bytes]:
    blocks, shares = in_blocks(weight, importance, sizes[0])
    codes = np.empty(blocks.shape, dtype=np.uint8)
    chosen = np.empty((len(blocks), sizes[0] // sizes[1]), dtype=np.uint8)
    levels = fp4_values()
    table = level_table(levels.tobytes())
    largest = np.float32(levels.max())
    solve_listed(blocks, shares, sizes[1], *table, largest, np.ascontiguousarray(scales), *reach, codes, chosen)
    return codes, chosen
