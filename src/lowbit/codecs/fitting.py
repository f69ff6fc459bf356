"""Moving a quantized tensor to another grid that holds the same values exactly.

Exact moves: more bits, finer groups, an explicit zero point for a symmetric weight, no zero point where the codes can
be shifted to the midpoint, and scales in another dtype that holds them. The dequantized weight is the same number for
number.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lowbit.codecs.codec import Codec
from lowbit.errors import UnsupportedError
from lowbit.formats.spec import PER_CHANNEL, PER_TENSOR, IntSpec
from lowbit.formats.tensor import QuantizedTensor

__all__ = ["fit", "fitting_spec", "is_centred", "regrid"]

_FINER_GROUPS = (512, 256, 128, 64, 32, 16)
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def fit(q: QuantizedTensor, codec: Codec) -> QuantizedTensor:
    """``q`` on the cheapest grid that ``codec`` stores and that holds it exactly.

    Raises :class:`UnsupportedError` with the codec's reasons if there is none.
    """
    return regrid(q, fitting_spec(q.spec, q.shape, codec, centred=is_centred(q.spec, q.zero_points)))


def is_centred(spec: IntSpec, zero_points: torch.Tensor | None) -> bool:
    """Whether zero is the middle code everywhere, so that no zero point need be stored."""
    return zero_points is None or bool((zero_points == spec.midpoint).all())


def fitting_spec(spec: IntSpec, shape: tuple[int, int], codec: Codec, *, centred: bool) -> IntSpec:
    """The cheapest spec that ``codec`` stores and that holds weights of ``spec`` and ``shape`` exactly.

    ``centred`` says that all zero points are the midpoint. Scales keep their dtype if the codec stores it. Raises
    :class:`UnsupportedError` with the codec's reasons against ``spec`` itself if there is none.
    """
    forms = (True, False) if centred else (False,)
    dtypes = (spec.scale_dtype, *(dtype for dtype in _SCALE_DTYPES if dtype != spec.scale_dtype))
    for dtype in dtypes:
        candidates = [
            IntSpec(bits, group_size, symmetric, dtype)
            for bits in range(spec.bits, 9)
            for group_size in _finer(spec.group_size, shape[1])
            for symmetric in forms
        ]
        workable = [candidate for candidate in candidates if not codec.supports(candidate, shape)]
        if workable:
            return min(workable, key=lambda candidate: (candidate.bits_per_weight(*shape), not candidate.symmetric))
    wanted = replace(spec, symmetric=True) if centred else spec
    raise UnsupportedError(f"{codec.name} cannot hold {spec} exactly", codec.supports(wanted, shape))


def regrid(q: QuantizedTensor, spec: IntSpec) -> QuantizedTensor:
    """``q`` on the grid of ``spec``, value for value; :class:`UnsupportedError` if that grid cannot hold it."""
    if spec == q.spec:
        return q
    if spec.bits < q.spec.bits:
        raise UnsupportedError(f"{spec} has fewer codes than {q.spec}")
    codes, zeros = _recode(q, spec)
    scales = q.scales.to(spec.scale_dtype)
    if not torch.equal(scales.float(), q.scales.float()):
        raise UnsupportedError(f"the scales are not exact in {spec.scale_dtype}")
    if spec.group_size != q.spec.group_size:
        if q.group_index is not None:
            raise UnsupportedError("columns in activation order (g_idx) cannot be regrouped")
        scales = _regroup(scales, q, spec)
        zeros = None if zeros is None else _regroup(zeros, q, spec)
    return QuantizedTensor(spec, codes, scales, zeros, q.group_index)


def _recode(q: QuantizedTensor, spec: IntSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not spec.symmetric:
        zeros = q.zero_points
        return q.codes, torch.full_like(q.scales, q.spec.midpoint).to(torch.uint8) if zeros is None else zeros
    if q.zero_points is None:
        return (q.codes + (spec.midpoint - q.spec.midpoint), None) if spec.bits != q.spec.bits else (q.codes, None)
    zeros = q.zero_points.to(torch.int16)
    columns = q.columns_to_groups()
    codes = torch.empty_like(q.codes)
    for start in range(0, q.shape[0], 256):
        rows = slice(start, start + 256)
        zero = zeros if q.spec.group_size == PER_TENSOR else zeros[rows][:, columns]
        shifted = q.codes[rows].to(torch.int16) - zero + spec.midpoint
        if int(shifted.min()) < 0 or int(shifted.max()) >= spec.levels:
            raise UnsupportedError(f"zero points other than {q.spec.midpoint} leave codes outside {spec}")
        codes[rows] = shifted.to(torch.uint8)
    return codes, None


def _regroup(values: torch.Tensor, q: QuantizedTensor, spec: IntSpec) -> torch.Tensor:
    rows, columns = q.shape
    if spec.group_size not in _finer(q.spec.group_size, columns):
        raise UnsupportedError(f"groups of {q.spec} do not split into those of {spec}")
    if q.spec.group_size == PER_TENSOR:
        values = values.expand(rows, 1)
    groups = spec.groups(columns)
    times = q.spec.group_size // spec.group_size if q.spec.group_size > 0 else groups
    return values.repeat_interleave(times, dim=1)[:, :groups].contiguous()


def _finer(group_size: int, columns: int) -> list[int]:
    if group_size == PER_TENSOR:
        return [PER_TENSOR, *_finer(PER_CHANNEL, columns)]
    whole = columns if group_size == PER_CHANNEL else group_size
    return [
        group_size,
        *(size for size in _FINER_GROUPS if whole % size == 0 and columns % size == 0 and size < whole),
    ]
