"""Putting codes, scales and steps together to the bytes of ggml's blocks: the inverse of its decoding.

``codes`` are uint8 ``[n, block_size]``, one per weight in order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def as_rows(weight: Floats, *fields: Bytes) -> Bytes:
    """uint8 ``[rows, row_bytes]``: the ``fields`` uint8 ``[blocks, bytes]`` of each block side by side."""
    return np.concatenate(fields, axis=1).reshape(len(weight), -1)


def half_bytes(values: Floats) -> Bytes:
    """uint8 ``[n, 2]``: float32 ``[n]`` as float16."""
    return values.astype(np.float16)[:, None].view(np.uint8)


def join_nibbles(codes: Bytes, half_run: int) -> Bytes:
    """uint8 ``[n, codes / 2]``: of each run of ``2 * half_run`` codes the first half low, the second high."""
    runs = codes.reshape(len(codes), -1, 2, half_run)
    return ((runs[:, :, 0] & np.uint8(15)) | (runs[:, :, 1] << np.uint8(4))).reshape(len(codes), -1)


def join_pairs(codes: Bytes) -> Bytes:
    """uint8 ``[n, codes / 4]``: the low 2 bits of four runs of 32 codes in a byte each."""
    runs = codes.reshape(len(codes), -1, 4, 32) & np.uint8(3)
    joined: Bytes = (
        runs[:, :, 0] | (runs[:, :, 1] << np.uint8(2)) | (runs[:, :, 2] << np.uint8(4)) | (runs[:, :, 3] << np.uint8(6))
    )
    return joined.reshape(len(codes), -1)


def join_planes(bits: Bytes) -> Bytes:
    """uint8 ``[n, 32]``: 256 values of 0 and 1, those of run ``i`` of 32 as bits ``i``."""
    runs = bits.reshape(len(bits), 8, 32)
    joined = runs[:, 0].copy()
    for plane in range(1, 8):
        joined |= runs[:, plane] << np.uint8(plane)
    return joined


def fifth_bits(codes: Bytes) -> Bytes:
    """uint8 ``[n, 4]``: bit 4 of 32 codes, in order from the lowest."""
    return np.packbits(codes >> np.uint8(4), axis=1, bitorder="little")


def scales_and_minima(scales: Bytes, minima: Bytes) -> Bytes:
    """uint8 ``[n, 12]``: eight 6-bit scales and minima as Q4_K and Q5_K hold them."""
    four = np.uint8(4)
    first = (scales[:, :4] & np.uint8(63)) | (scales[:, 4:] >> four << np.uint8(6))
    second = (minima[:, :4] & np.uint8(63)) | (minima[:, 4:] >> four << np.uint8(6))
    third = (scales[:, 4:] & np.uint8(15)) | (minima[:, 4:] << four)
    return np.concatenate([first, second, third], axis=1)


def three_k_scales(scales: npt.NDArray[np.int8]) -> Bytes:
    """uint8 ``[n, 12]``: sixteen scales from -32 to 31 as Q3_K holds them."""
    shifted = (scales + np.int8(32)).view(np.uint8)
    high = (shifted >> np.uint8(4)).reshape(-1, 4, 4)
    joined = high[:, 0] | (high[:, 1] << np.uint8(2)) | (high[:, 2] << np.uint8(4)) | (high[:, 3] << np.uint8(6))
    return np.concatenate([join_nibbles(shifted, 8), joined], axis=1)


def four_xs_scales(scales: npt.NDArray[np.int8]) -> Bytes:
    """uint8 ``[n, 6]``: eight scales from -32 to 31 as IQ4_XS holds them."""
    shifted = (scales + np.int8(32)).view(np.uint8)
    high = np.bitwise_or.reduce(
        (shifted >> np.uint8(4)).astype(np.uint16) << np.arange(0, 16, 2, dtype=np.uint16), axis=1
    )
    return np.concatenate([high[:, None].view(np.uint8), join_nibbles(shifted, 1)], axis=1)
