"""The encoder of every type: how wide each search is and how its result is packed.

An encoder takes some rows, ``weight`` float32 ``[rows, columns]``, finite and contiguous, and the importance of their
columns as :func:`lowbit.kernels.ggml.prepare_importance` returns it, or None; it returns uint8 ``[rows, row_bytes]``.
It works on one thread: :func:`lowbit.kernels.ggml.quantize_rows` calls it for parts of a matrix on several threads at
once. A scale beyond float16 is stored as infinity, which the caller refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from lowbit.kernels.ggml import floats, iq, legacy, super_blocks
from lowbit.kernels.ggml.direct import encode_direct, encode_ranges, encode_weighted
from lowbit.kernels.ggml.direct_levels import encode_mxfp4, encode_ternary

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Weights: TypeAlias = "npt.NDArray[np.float32] | npt.NDArray[np.uint16]"

_PLACES_8 = np.array([-128.4, -127.2, 127.2, 126.0], dtype=np.float32)

ENCODERS: dict[str, Callable[[Floats, Floats | None], Bytes]] = {
    "F32": floats.f32,
    "F16": floats.f16,
    "BF16": floats.bf16,
    "Q4_0": legacy.q4_0,
    "Q4_1": legacy.q4_1,
    "Q5_0": legacy.q5_0,
    "Q5_1": legacy.q5_1,
    "IQ4_NL": legacy.iq4_nl,
    "NVFP4": floats.nvfp4,
    "Q2_K": super_blocks.q2_k,
    "Q3_K": super_blocks.q3_k,
    "Q4_K": super_blocks.q4_k,
    "Q5_K": super_blocks.q5_k,
    "Q6_K": super_blocks.q6_k,
    "IQ4_XS": super_blocks.iq4_xs,
    "IQ3_S": iq.iq3_s,
    "IQ3_XXS": iq.iq3_xxs,
    "IQ2_S": iq.iq2_s,
    "IQ2_XS": iq.iq2_xs,
    "IQ2_XXS": iq.iq2_xxs,
    "IQ1_S": iq.iq1_s,
    "IQ1_M": iq.iq1_m,
}
"""By type name; the types that are not here have :func:`direct_encoder`."""


_PLAIN: dict[str, Callable[[Weights, Bytes], int]] = {
    "Q4_0": lambda weight, blocks: encode_direct(weight, 8, 2, blocks),
    "Q5_0": lambda weight, blocks: encode_direct(weight, 16, 2, blocks),
    "Q8_0": lambda weight, blocks: encode_direct(weight, 128, 1, blocks),
    "Q4_1": lambda weight, blocks: encode_ranges(weight, 15, blocks),
    "Q5_1": lambda weight, blocks: encode_ranges(weight, 31, blocks),
    "MXFP4": lambda weight, blocks: encode_mxfp4(weight, None, blocks),
    "TQ1_0": lambda weight, blocks: encode_ternary(weight, None, blocks),
    "TQ2_0": lambda weight, blocks: encode_ternary(weight, None, blocks),
}

_WEIGHTED: dict[str, Callable[[Weights, Floats, Bytes], int]] = {
    "Q8_0": lambda weight, importance, blocks: encode_weighted(weight, importance, 128, _PLACES_8, blocks),
    "MXFP4": encode_mxfp4,
    "TQ1_0": encode_ternary,
    "TQ2_0": encode_ternary,
}


def direct_encoder(name: str, importance: Floats | None) -> Callable[[Weights, Bytes], int] | None:
    """What takes the place of the encoder of the type ``name``, or None: at the speed of memory instead of a search.

    It takes float32 or the bits of bfloat16 ``[n]``, rows of the length of ``importance``, and fills blocks; see
    :func:`lowbit.kernels.ggml.direct.encode_direct`.
    """
    if importance is None:
        return _PLAIN.get(name)
    weighted, shares = _WEIGHTED.get(name), importance
    return None if weighted is None else lambda weight, blocks: weighted(weight, shares, blocks)
