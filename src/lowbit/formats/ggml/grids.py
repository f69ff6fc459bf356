"""Integer grids carried over to ggml's blocks of 32 and back, code for code.

A group-wise integer grid is what Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 store too, except that their scale and minimum are
float16 per 32 columns. So the codes can be kept as they are; what changes is the scale's rounding, which is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch

from lowbit.errors import UnsupportedError
from lowbit.formats.ggml.tensor import BlockTensor
from lowbit.formats.ggml.types import GGML_TYPES, GgmlType
from lowbit.formats.spec import PER_TENSOR, IntSpec
from lowbit.formats.tensor import QuantizedTensor

__all__ = ["Rounding", "from_integer", "grid_spec", "grid_type", "to_integer"]

BLOCK = 32
"""Columns that share a scale in every type that an integer grid fits."""
_CHUNK = 1 << 22
_SYMMETRIC = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 7: "Q8_0", 8: "Q8_0"}
_ASYMMETRIC = {2: "Q4_0", 3: "Q4_0", 4: "Q4_1", 5: "Q5_1", 6: "Q8_0", 7: "Q8_0"}
"""Types by bits. With few bits, code minus zero point fits a signed type, which needs no minimum."""
_BITS = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}
_WAY_OUT = "requantize it with lowbit quantize"


@dataclass(frozen=True, slots=True)
class Rounding:
    """What storing scales as float16 did: ``scales`` in all, ``changed`` of them, the ``largest`` relative change, and
    the squared change of the weights (``error``) beside their squares (``energy``)."""

    scales: int = 0
    changed: int = 0
    largest: float = 0.0
    error: float = 0.0
    energy: float = 0.0

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(
            self.scales + other.scales,
            self.changed + other.changed,
            max(self.largest, other.largest),
            self.error + other.error,
            self.energy + other.energy,
        )

    @property
    def exact(self) -> bool:
        """Whether every weight is the same number as before."""
        return self.error == 0.0

    @property
    def relative(self) -> float:
        """Root mean squared change of the weights over their root mean square."""
        return sqrt(self.error / self.energy) if self.energy else 0.0


def grid_type(spec: IntSpec, columns: int, *, centred: bool) -> GgmlType:
    """The smallest type that holds codes of ``spec``; ``centred`` says that all zero points are the midpoint.

    Raises :class:`UnsupportedError` with the reasons where none does.
    """
    reasons = []
    if columns % BLOCK:
        reasons.append(f"rows of {columns} are no whole blocks of {BLOCK}")
    if spec.group_size > 0 and spec.group_size % BLOCK and spec.groups(columns) > 1:
        reasons.append(f"groups of {spec.group_size} columns are no whole blocks of {BLOCK}")
    name = (_SYMMETRIC if spec.symmetric or centred else _ASYMMETRIC).get(spec.bits)
    if name is None:
        reasons.append(f"no GGUF type holds {spec.bits} bits with a zero point")
    if reasons or name is None:
        raise UnsupportedError(f"{spec} does not fit the blocks of GGUF", [*reasons, _WAY_OUT])
    return GGML_TYPES[name]


def from_integer(q: QuantizedTensor, kind: GgmlType | None = None) -> tuple[BlockTensor, Rounding]:
    """``q`` in blocks of ``kind`` (default: :func:`grid_type`), every code as it is, and what the scales' rounding did.

    Raises :class:`UnsupportedError` where the grid does not fit: groups that are no multiple of 32 columns, columns in
    activation order, 8 bits with zero points, a scale beyond float16.
    """
    rows, columns = q.shape
    centred = q.zero_points is None or bool((q.zero_points == q.spec.midpoint).all())
    kind = kind or grid_type(q.spec, columns, centred=centred)
    groups = _block_groups(q)
    blocks = torch.empty(rows, kind.row_bytes(columns), dtype=torch.uint8)
    rounding = Rounding()
    step = max(1, _CHUNK // columns)
    for first in range(0, rows, step):
        part = slice(first, min(first + step, rows))
        codes = q.codes[part].cpu().view(-1, columns // BLOCK, BLOCK)
        scales = _of_blocks(q.scales, q.spec, part, groups).expand(codes.shape[:2])
        zeros: torch.Tensor | None = None
        if q.zero_points is not None:
            zeros = _of_blocks(q.zero_points, q.spec, part, groups).expand(codes.shape[:2])
        encoded, change = _encode(codes, scales.float(), zeros, kind, q.spec)
        blocks[part] = encoded.view(part.stop - part.start, -1)
        rounding += change
    return BlockTensor(kind, blocks), rounding


def grid_spec(kind: GgmlType) -> IntSpec:
    """The integer grid of :func:`to_integer`; :class:`UnsupportedError` for a type that is none."""
    bits = _BITS.get(kind.name)
    if bits is None:
        raise UnsupportedError(
            f"{kind} is no integer grid with whole zero points",
            ["only Q4_0, Q5_0 and Q8_0 are", "convert to --format dense and quantize that"],
        )
    return IntSpec(bits, BLOCK, symmetric=True, scale_dtype=torch.float16)


def to_integer(tensor: BlockTensor) -> QuantizedTensor:
    """The symmetric integer grid of Q4_0, Q5_0 or Q8_0 blocks: the same codes and float16 scales in groups of 32.

    Raises :class:`UnsupportedError` for other types: their minima or codebooks are no integer zero points.
    """
    spec = grid_spec(tensor.type)
    bits = spec.bits
    rows, columns = tensor.shape
    split = tensor.blocks.cpu().view(rows, columns // BLOCK, tensor.type.block_bytes)
    scales = split[:, :, :2].contiguous().view(torch.float16)[:, :, 0]
    if bits == 8:
        codes = split[:, :, 2:] ^ 0x80
    else:
        nibbles = split[:, :, -16:]
        codes = torch.cat([nibbles & 15, nibbles >> 4], 2)
        if bits == 5:
            codes |= _bits_of(split[:, :, 2:6]) << 4
    return QuantizedTensor(spec, codes.reshape(rows, columns), scales.contiguous())


def _block_groups(q: QuantizedTensor) -> torch.Tensor:
    """int64 ``[columns / 32]``: the group that each block of 32 columns lies in."""
    columns = q.columns_to_groups().cpu().view(-1, BLOCK)
    if not bool((columns == columns[:, :1]).all()):
        raise UnsupportedError(
            "columns are in activation order (g_idx), so that a block of 32 has several scales", [_WAY_OUT]
        )
    return columns[:, 0]


def _of_blocks(values: torch.Tensor, spec: IntSpec, rows: slice, groups: torch.Tensor) -> torch.Tensor:
    """The values of some rows, one for each block: ``[rows, columns / 32]``, or ``[1, …]`` if all rows share them."""
    return (values if spec.group_size == PER_TENSOR else values[rows]).cpu()[:, groups]


def _encode(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, kind: GgmlType, spec: IntSpec
) -> tuple[torch.Tensor, Rounding]:
    """Bytes ``[rows, blocks, block_bytes]`` of codes ``[rows, blocks, 32]`` with a scale (and zero point) per block."""
    halves = scales.half()
    _check_scales(scales, halves, codes)
    steps = halves.float()
    centre = torch.full_like(scales, spec.midpoint) if zeros is None else zeros.float()
    shifted = codes.to(torch.int16) - centre.to(torch.int16)[..., None]
    before = shifted.double() * scales.double()[..., None]
    parts = [halves[..., None].view(torch.uint8)]
    if kind.name in _BITS:
        bits = _BITS[kind.name]
        stored = (shifted + (1 << (bits - 1))).to(torch.uint8)
        after = shifted.double() * steps.double()[..., None]
    else:
        bits = 4 if kind.name == "Q4_1" else 5
        minima = (-steps * centre).half()
        parts.append(minima[..., None].view(torch.uint8))
        stored = codes
        after = codes.double() * steps.double()[..., None] + minima.double()[..., None]
    if bits == 8:
        parts.append(stored ^ 0x80)
    else:
        if bits == 5:
            parts.append(_packed_bits(stored >> 4))
        parts.append((stored[..., :16] & 15) | (stored[..., 16:] & 15) << 4)
    change = (halves.double() - scales.double()).abs() / scales.double().abs().clamp(
        min=torch.finfo(torch.float64).tiny
    )
    rounding = Rounding(
        scales.numel(),
        int((change > 0).sum()),
        float(change.max()),
        float((after - before).square().sum()),
        float(before.square().sum()),
    )
    return torch.cat(parts, 2), rounding


def _check_scales(scales: torch.Tensor, halves: torch.Tensor, codes: torch.Tensor) -> None:
    if not bool(torch.isfinite(halves).all()):
        raise UnsupportedError(f"a scale of {float(scales.abs().max()):.3g} exceeds float16", [_WAY_OUT])
    lost = (halves == 0) & (scales != 0)
    if bool(lost.any()) and bool((codes[lost] != codes[lost][:, :1]).any()):
        smallest = float(scales[lost].abs().min())
        raise UnsupportedError(f"a scale of {smallest:.3g} is too small for float16", [_WAY_OUT])


def _packed_bits(bits: torch.Tensor) -> torch.Tensor:
    """Bytes ``[…, 4]`` of bits ``[…, 32]``, the first in the lowest place."""
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)
    return (bits.view(*bits.shape[:-1], 4, 8) * places).sum(-1, dtype=torch.int32).to(torch.uint8)


def _bits_of(data: torch.Tensor) -> torch.Tensor:
    """Invert :func:`_packed_bits`."""
    return (data[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)
