"""The codebooks of ggml's non-linear types, taken from the ``gguf`` package."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

import gguf.quants
import numpy as np
import numpy.typing as npt

__all__ = ["fp4_values", "grid", "iq4_values", "sign_patterns"]

_Array = TypeVar("_Array", bound=np.ndarray[Any, Any])


@cache
def grid(name: str) -> npt.NDArray[np.int8]:
    """int8 ``[entries, 4 or 8]``: the codebook of ``IQ1_S``, ``IQ1_M``, ``IQ2_*`` or ``IQ3_*``, read-only.

    An entry holds the magnitudes (IQ1: the signed values -1, 0, 1) of 4 or 8 consecutive weights in units of the scale.
    """
    source = getattr(gguf.quants, name)
    entries, width = source.grid_shape
    values = np.asarray(source.grid_map, dtype=np.int8)
    packed = np.frombuffer(bytes.fromhex(source.grid_hex.decode("ascii")), dtype=np.uint8)
    bits = 8 * packed.size // (entries * width)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    fields = (packed[:, None] >> shifts) & np.uint8((1 << bits) - 1)
    return _frozen(values[fields].reshape(entries, width))


@cache
def sign_patterns() -> npt.NDArray[np.uint8]:
    """uint8 ``[128]``: the 8 sign bits (1 is minus) that 7 stored bits stand for; their number is always even."""
    return _frozen(np.frombuffer(gguf.quants.IQ2_XXS.ksigns, dtype=np.uint8).copy())


@cache
def iq4_values() -> npt.NDArray[np.int8]:
    """int8 ``[16]``: the levels of ``IQ4_NL`` and ``IQ4_XS``, ascending."""
    return _frozen(np.asarray(gguf.quants.IQ4_NL.kvalues, dtype=np.int8))


@cache
def fp4_values() -> npt.NDArray[np.int8]:
    """int8 ``[16]``: twice the values of the 4-bit float E2M1, by code (code 8 is minus zero)."""
    return _frozen(np.asarray(gguf.quants.MXFP4.kvalues, dtype=np.int8))


def _frozen(array: _Array) -> _Array:
    array.setflags(write=False)
    return array
