"""ggml's codebook types: how each uses its codebook and where its bits stand in a block."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lowbit.kernels.ggml.lattice import Codes, Layout, search
from lowbit.kernels.ggml.lattice_sums import BLOCK
from lowbit.kernels.ggml.lattice_tables import lattice

__all__ = [
    "IQ1_M",
    "IQ1_S",
    "IQ2_S",
    "IQ2_XS",
    "IQ2_XXS",
    "IQ3_S",
    "IQ3_XXS",
    "iq1_m",
    "iq1_s",
    "iq2_s",
    "iq2_xs",
    "iq2_xxs",
    "iq3_s",
    "iq3_xxs",
]

Rows = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Importance = npt.NDArray[np.float32] | None

IQ3_S = Layout(sub=32, steps=16, unit=1.0, signs="free", guess=0.145, ratio=1.12)
IQ3_XXS = Layout(sub=32, steps=16, unit=0.25, signs="even", guess=0.04, ratio=1.12)
IQ2_S = Layout(sub=16, steps=16, unit=0.125, signs="free", guess=0.05, ratio=1.12)
IQ2_XS = Layout(sub=16, steps=16, unit=0.125, signs="even", guess=0.05, ratio=1.12)
IQ2_XXS = Layout(sub=32, steps=16, unit=0.125, signs="even", guess=0.05, ratio=1.12)
IQ1_S = Layout(sub=32, steps=8, unit=1.0, signs="point", guess=1.2, ratio=1.2, shifts=2, shared=True, exact=False)
IQ1_M = Layout(sub=16, steps=8, unit=1.0, signs="point", guess=1.2, ratio=1.2, shifts=2, exact=False)


def iq3_s(weight: Rows, importance: Importance) -> Bytes:
    """Runs of 4 out of 512 points, a sign bit per weight, a 4-bit scale per 32."""
    found = search(weight, importance, lattice("IQ3_S"), IQ3_S)
    high = _bits(found.points >> np.uint16(8), 1)
    return _rows(_scales(found), _low(found), high, found.signs, _pairs(found.number))


def iq3_xxs(weight: Rows, importance: Importance) -> Bytes:
    """Runs of 4 out of 256 points, 7 sign bits per 8 weights, a 4-bit scale per 32."""
    found = search(weight, importance, lattice("IQ3_XXS"), IQ3_XXS)
    return _rows(_scales(found), _low(found), _little(_signs_and_number(found), np.uint32))


def iq2_s(weight: Rows, importance: Importance) -> Bytes:
    """Runs of 8 out of 1024 points, a sign bit per weight, a 4-bit scale per 16."""
    found = search(weight, importance, lattice("IQ2_S"), IQ2_S)
    high = _bits(found.points >> np.uint16(8), 2)
    return _rows(_scales(found), _low(found), found.signs, high, _pairs(found.number))


def iq2_xs(weight: Rows, importance: Importance) -> Bytes:
    """Runs of 8 out of 512 points, 7 sign bits each, a 4-bit scale per 16."""
    found = search(weight, importance, lattice("IQ2_XS"), IQ2_XS)
    codes = found.points | (found.signs.astype(np.uint16) & 0x7F) << 9
    return _rows(_scales(found), _little(codes, np.uint16), _pairs(found.number))


def iq2_xxs(weight: Rows, importance: Importance) -> Bytes:
    """Runs of 8 out of 256 points, 7 sign bits each, a 4-bit scale per 32."""
    found = search(weight, importance, lattice("IQ2_XXS"), IQ2_XXS)
    points = np.ascontiguousarray(_low(found)).view(np.dtype("<u4"))
    codes = np.stack([points, _signs_and_number(found)], axis=-1)
    return _rows(_scales(found), _little(codes.reshape(*points.shape[:2], -1), np.uint32))


def iq1_s(weight: Rows, importance: Importance) -> Bytes:
    """Runs of 8 out of 2048 points of -1, 0 and 1, a shift of an eighth and a 3-bit scale per 32."""
    found = search(weight, importance, lattice("IQ1_S"), IQ1_S)
    high = (found.points >> 8).reshape(*found.number.shape, 4)
    words = (high << np.array([0, 3, 6, 9], np.uint16)).sum(axis=-1, dtype=np.uint16)
    words |= found.number.astype(np.uint16) << 12
    words |= found.shift[..., ::4].astype(np.uint16) << 15
    return _rows(_scales(found), _low(found), _little(words, np.uint16))


def iq1_m(weight: Rows, importance: Importance) -> Bytes:
    """Runs of 8 out of 2048 points of -1, 0 and 1, each shifted by an eighth, a 3-bit scale per 16."""
    found = search(weight, importance, lattice("IQ1_S"), IQ1_M)
    high = (found.points >> 8).astype(np.uint8) | found.shift << np.uint8(3)
    threes = found.number.astype(np.uint16).reshape(*found.number.shape[:2], 4, 4)
    words = (threes << np.array([0, 3, 6, 9], np.uint16)).sum(axis=-1, dtype=np.uint16)
    # the float16 is spread over the top four bits of the four words
    scale = found.scale.view(np.uint16)[..., None] >> np.array([0, 4, 8, 12], np.uint16) & 0xF
    return _rows(_low(found), _pairs(high), _little(words | scale << 12, np.uint16))


def _rows(*parts: Bytes) -> Bytes:
    """The parts of every block one after the other, blocks in rows."""
    joined = np.concatenate(parts, axis=2)
    return joined.reshape(joined.shape[0], -1)


def _scales(found: Codes) -> Bytes:
    return _little(found.scale[..., None], np.float16)


def _low(found: Codes) -> Bytes:
    return (found.points & 0xFF).astype(np.uint8)


def _little(values: npt.NDArray[np.generic], kind: type[np.generic]) -> Bytes:
    """``values`` ``[rows, blocks, n]`` as the bytes of ``kind``, the lowest first."""
    return np.ascontiguousarray(values, dtype=np.dtype(kind).newbyteorder("<")).view(np.uint8)


def _bits(fields: npt.NDArray[np.uint16], width: int) -> Bytes:
    """Fields of ``width`` bits, 8 / width to a byte, the first lowest."""
    split = fields.reshape(*fields.shape[:2], -1, 8 // width)
    places = np.arange(0, 8, width, dtype=np.uint16)
    joined: Bytes = (split << places).sum(axis=-1, dtype=np.uint16).astype(np.uint8)
    return joined


def _pairs(fields: Bytes) -> Bytes:
    return fields[..., ::2] | fields[..., 1::2] << np.uint8(4)


def _signs_and_number(found: Codes) -> npt.NDArray[np.uint32]:
    """For every 32 weights: four times 7 sign bits, then the scale number."""
    signs = (found.signs & 0x7F).astype(np.uint32).reshape(*found.signs.shape[:2], BLOCK // 32, 4)
    packed: npt.NDArray[np.uint32] = (signs << np.array([0, 7, 14, 21], np.uint32)).sum(axis=-1, dtype=np.uint32)
    return packed | found.number.astype(np.uint32) << np.uint32(28)
