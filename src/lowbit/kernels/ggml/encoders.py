"""The encoder of every type: how wide each search is and how its result is packed.

An encoder takes some rows, ``weight`` float32 ``[rows, columns]``, finite and contiguous, and the importance of their
columns as :func:`lowbit.kernels.ggml.prepare_importance` returns it, or None; it returns uint8 ``[rows, row_bytes]``.
It works on one thread: :func:`lowbit.kernels.ggml.quantize_rows` calls it for parts of a matrix on several threads at
once. A scale beyond float16 is stored as infinity, which the caller refuses.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from lowbit.kernels.ggml import floats, iq, legacy, super_blocks

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

ENCODERS: dict[str, Callable[[Floats, Floats | None], Bytes]] = {
    "F32": floats.f32,
    "F16": floats.f16,
    "BF16": floats.bf16,
    "Q4_0": legacy.q4_0,
    "Q4_1": legacy.q4_1,
    "Q5_0": legacy.q5_0,
    "Q5_1": legacy.q5_1,
    "Q8_0": legacy.q8_0,
    "IQ4_NL": legacy.iq4_nl,
    "MXFP4": floats.mxfp4,
    "NVFP4": floats.nvfp4,
    "TQ1_0": legacy.tq1_0,
    "TQ2_0": legacy.tq2_0,
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
"""By type name."""
