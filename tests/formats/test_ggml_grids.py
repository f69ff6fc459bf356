"""Integer grids in GGUF blocks: decoded by the gguf package, the weights are those of the grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from lowbit.errors import UnsupportedError
from lowbit.formats import IntSpec, QuantizedTensor
from lowbit.formats.ggml.grids import Rounding, from_integer, grid_type, to_integer
from lowbit.formats.ggml.tensor import BlockTensor
from lowbit.formats.ggml.types import GGML_TYPES


def random_grid(spec: IntSpec, rows: int = 48, columns: int = 256, *, centred: bool = False) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(spec.bits)
    shape = (1, 1) if spec.group_size == 0 else (rows, spec.groups(columns))
    codes = torch.randint(0, spec.levels, (rows, columns), dtype=torch.uint8, generator=generator)
    codes[:2, :2] = torch.tensor([[0, spec.levels - 1], [spec.levels - 1, 0]], dtype=torch.uint8)
    scales = (torch.rand(shape, generator=generator) * 0.1 + 0.01).to(spec.scale_dtype)
    zeros = None
    if not spec.symmetric:
        zeros = torch.randint(0, spec.levels, shape, dtype=torch.uint8, generator=generator)
        zeros = torch.full_like(zeros, spec.midpoint) if centred else zeros
    return QuantizedTensor(spec, codes, scales, zeros)


def decoded(tensor: BlockTensor) -> np.ndarray:
    values: np.ndarray = dequantize(tensor.blocks.numpy(), GGMLQuantizationType[tensor.type.name])
    return values


@pytest.mark.parametrize("group_size", [32, 64, 128, -1, 0])
@pytest.mark.parametrize(
    ("bits", "symmetric", "expected"),
    [
        (2, True, "Q4_0"), (3, True, "Q4_0"), (4, True, "Q4_0"), (5, True, "Q5_0"), (6, True, "Q8_0"),
        (8, True, "Q8_0"), (2, False, "Q4_0"), (3, False, "Q4_0"), (6, False, "Q8_0"), (7, False, "Q8_0"),
    ],
)  # fmt: skip
def test_float16_scales_without_minima_are_exact(bits: int, symmetric: bool, expected: str, group_size: int) -> None:
    q = random_grid(IntSpec(bits, group_size, symmetric))
    blocks, rounding = from_integer(q)
    assert blocks.type.name == expected
    assert np.array_equal(decoded(blocks), q.dequantize().numpy())
    assert rounding.exact
    assert (rounding.changed, rounding.relative, rounding.scales) == (0, 0.0, 48 * 8)


@pytest.mark.parametrize(("bits", "expected"), [(4, "Q4_1"), (5, "Q5_1")])
def test_zero_points_become_minima(bits: int, expected: str) -> None:
    q = random_grid(IntSpec(bits, 64, symmetric=False))
    blocks, rounding = from_integer(q)
    assert blocks.type.name == expected
    wanted = q.dequantize(torch.float64).numpy()
    found = decoded(blocks).astype(np.float64)
    assert q.zero_points is not None
    largest_minimum = float((q.scales.float() * q.zero_points.float()).max())
    assert np.abs(found - wanted).max() <= largest_minimum * 2**-11 * 1.01
    assert rounding.relative == pytest.approx(np.sqrt(((found - wanted) ** 2).sum() / (wanted**2).sum()), rel=1e-4)
    assert rounding.changed == 0


def test_zero_points_in_the_middle_need_no_minimum() -> None:
    q = random_grid(IntSpec(4, 128, symmetric=False), centred=True)
    blocks, rounding = from_integer(q)
    assert blocks.type.name == "Q4_0"
    assert rounding.exact
    again, rounding = from_integer(q, GGML_TYPES["Q4_1"])
    assert again.type.name == "Q4_1"
    assert np.allclose(decoded(again), q.dequantize().numpy(), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_rounding_of_other_scales_is_measured(dtype: torch.dtype) -> None:
    q = random_grid(IntSpec(4, 32, scale_dtype=dtype))
    tiny = QuantizedTensor(q.spec, q.codes, q.scales * 1e-4)
    for grid in (q, tiny):
        blocks, rounding = from_integer(grid)
        wanted = grid.dequantize(torch.float64).numpy()
        error = np.sqrt(((decoded(blocks) - wanted) ** 2).sum() / (wanted**2).sum())
        assert rounding.relative == pytest.approx(error, rel=1e-3, abs=1e-9)
        scales = grid.scales.double()
        change = (scales.half().double() - scales).abs() / scales
        assert rounding.largest == pytest.approx(float(change.max()), rel=1e-6)
        assert rounding.changed == int((change > 0).sum())


def test_what_does_not_fit_is_refused_with_the_way_out() -> None:
    for spec, columns, why in (
        (IntSpec(8, 128, symmetric=False), 256, "no GGUF type holds 8 bits with a zero point"),
        (IntSpec(4, 48), 96, "groups of 48 columns"),
        (IntSpec(4, 16), 256, "groups of 16 columns"),
        (IntSpec(4, -1), 80, "rows of 80"),
    ):
        with pytest.raises(UnsupportedError, match=f"{why}.*lowbit quantize"):
            grid_type(spec, columns, centred=False)
    assert grid_type(IntSpec(8, 128, symmetric=False), 256, centred=True).name == "Q8_0"
    q = random_grid(IntSpec(4, 64))
    shuffled = torch.arange(256, dtype=torch.int32) % 4
    with pytest.raises(UnsupportedError, match="activation order"):
        from_integer(QuantizedTensor(q.spec, q.codes, q.scales, None, shuffled))
    wide = IntSpec(4, 64, scale_dtype=torch.float32)
    with pytest.raises(UnsupportedError, match="exceeds float16"):
        from_integer(QuantizedTensor(wide, q.codes, q.scales.float() * 1e7))
    with pytest.raises(UnsupportedError, match="too small for float16"):
        from_integer(QuantizedTensor(wide, q.codes, q.scales.float() * 1e-9))


def test_an_order_that_keeps_blocks_together_fits() -> None:
    q = random_grid(IntSpec(4, 64))
    order = torch.tensor([2, 2, 0, 0, 3, 3, 1, 1], dtype=torch.int32).repeat_interleave(32)
    q = QuantizedTensor(q.spec, q.codes, q.scales, None, order)
    blocks, rounding = from_integer(q)
    assert rounding.exact
    assert np.array_equal(decoded(blocks), q.dequantize().numpy())


@pytest.mark.parametrize(("bits", "name"), [(4, "Q4_0"), (5, "Q5_0"), (8, "Q8_0")])
def test_back_to_the_grid(bits: int, name: str) -> None:
    q = random_grid(IntSpec(bits, 32))
    blocks, _ = from_integer(q)
    back = to_integer(blocks)
    assert (blocks.type.name, back.spec) == (name, q.spec)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scales, q.scales)


def test_types_with_minima_do_not_go_back() -> None:
    blocks, _ = from_integer(random_grid(IntSpec(4, 32, symmetric=False)))
    with pytest.raises(UnsupportedError, match="Q4_1 is no integer grid"):
        to_integer(blocks)


def test_roundings_add_up() -> None:
    total = Rounding(2, 1, 0.5, 1.0, 4.0) + Rounding(3, 0, 0.25, 3.0, 12.0)
    assert (total.scales, total.changed, total.largest, total.relative) == (5, 1, 0.5, 0.5)
