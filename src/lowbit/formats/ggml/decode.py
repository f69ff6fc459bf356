"""From the blocks of any ggml type to float32 values, bit for bit those of the ``gguf`` package."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from lowbit.errors import CheckpointError
from lowbit.formats.ggml import decode_codebooks, decode_legacy, decode_super
from lowbit.formats.ggml.types import GgmlType

__all__ = ["DECODERS", "decode"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "F32": decode_legacy.f32,
    "F16": decode_legacy.f16,
    "BF16": decode_legacy.bf16,
    "Q4_0": decode_legacy.q4_0,
    "Q4_1": decode_legacy.q4_1,
    "Q5_0": decode_legacy.q5_0,
    "Q5_1": decode_legacy.q5_1,
    "Q8_0": decode_legacy.q8_0,
    "TQ1_0": decode_legacy.tq1_0,
    "TQ2_0": decode_legacy.tq2_0,
    "MXFP4": decode_legacy.mxfp4,
    "NVFP4": decode_legacy.nvfp4,
    "IQ4_NL": decode_legacy.iq4_nl,
    "Q2_K": decode_super.q2_k,
    "Q3_K": decode_super.q3_k,
    "Q4_K": decode_super.q4_k,
    "Q5_K": decode_super.q5_k,
    "Q6_K": decode_super.q6_k,
    "IQ4_XS": decode_super.iq4_xs,
    "IQ3_S": decode_codebooks.iq3_s,
    "IQ3_XXS": decode_codebooks.iq3_xxs,
    "IQ2_S": decode_codebooks.iq2_s,
    "IQ2_XS": decode_codebooks.iq2_xs,
    "IQ2_XXS": decode_codebooks.iq2_xxs,
    "IQ1_S": decode_codebooks.iq1_s,
    "IQ1_M": decode_codebooks.iq1_m,
}
"""By type name: blocks uint8 ``[n, block_bytes]``, contiguous, to float32 of ``n * block_size`` values in order."""

_CHUNK = 1 << 16
"""Weights decoded at a time: the intermediate arrays stay in the cache."""


def decode(blocks: Bytes, kind: GgmlType) -> Floats:
    """float32 ``[rows, columns]``: the values of ``blocks`` uint8 ``[rows, kind.row_bytes(columns)]``.

    Scales that are not finite give values that are not finite. Raises :class:`CheckpointError` for rows that are no
    whole number of blocks.
    """
    rows, width = blocks.shape
    if width % kind.block_bytes:
        raise CheckpointError(
            f"rows of {width} bytes are no whole number of {kind} blocks of {kind.block_bytes}: the file is damaged"
        )
    columns = kind.columns(width)
    flat = np.ascontiguousarray(blocks).reshape(-1, kind.block_bytes)
    decoded = np.empty(rows * columns, dtype=np.float32)
    step = max(1, _CHUNK // kind.block_size)
    decoder = DECODERS[kind.name]
    with np.errstate(all="ignore"):
        for begin in range(0, len(flat), step):
            values = decoder(flat[begin : begin + step])
            decoded[begin * kind.block_size : begin * kind.block_size + values.size] = values.reshape(-1)
    return decoded.reshape(rows, columns)
