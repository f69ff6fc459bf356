"""Small floats: elements against ml_dtypes' and gguf's tables, scales, rounding to nearest, and simulated inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.errors import NumericsError, UsageError
from lowbit.formats import ActivationSpec, FloatSpec, fake_quantize, parse_spec
from lowbit.formats.activations import static_scale
from lowbit.formats.floating import decode_elements, encode_elements, microscale_exponents, quantize, round_elements
from lowbit.formats.rounding import blank_weight

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
"""The element table of the OCP microscaling specification 1.0."""
NAMES = ("fp8-tensor", "fp8-channel", "fp8-g32", "fp8-block", "nvfp4", "mxfp4", "mxfp8")


def e4m3_table() -> np.ndarray:
    """float64 ``[256]`` from the definition: 4 bits of exponent with bias 7, 3 of mantissa, no infinity."""
    values = np.empty(256)
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        magnitude = 2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
        values[code] = -magnitude if code & 128 else magnitude
    values[[127, 255]] = np.nan
    return values


def reference(weight: np.ndarray, spec: FloatSpec) -> np.ndarray:
    """Rounding to nearest from the definitions alone, in float64, one scale at a time."""
    table = e4m3_table()[:128] if spec.element == "e4m3" else np.array(E2M1[:8])
    table = table[np.isfinite(table)]
    rows, columns = weight.shape
    high = rows if spec.group_size == 0 else spec.rows
    wide = spec.group_size if spec.group_size > 0 else columns
    out = np.empty_like(weight, dtype=np.float64)
    whole = 448.0 * 6.0 / np.abs(weight).max()
    for top in range(0, rows, high):
        for left in range(0, columns, wide):
            part = weight[top : top + high, left : left + wide].astype(np.float64)
            largest = np.abs(part).max()
            if spec.scale == "e8m0":
                power = np.floor(np.log2(largest)) if largest else 0.0
                carry = largest >= 1.75 * 2.0**power
                scale = 2.0 ** (power + carry - np.floor(np.log2(table[-1]))) if largest else 1.0
            elif spec.scale == "e4m3":
                scales = e4m3_table()[1:127]
                scale = scales[np.abs(scales - largest / table[-1] * whole).argmin()] / whole
            else:
                scale = float(torch.tensor(largest / table[-1]).to(spec.scale_dtype)) or 1.0
            codes = np.abs(np.abs(part)[..., None] / scale - table).argmin(-1)
            out[top : top + high, left : left + wide] = np.sign(part) * table[codes] * scale
    return out


@pytest.mark.parametrize("element", ["e4m3", "e2m1"])
def test_elements_are_those_of_the_specification(element: str) -> None:
    table = e4m3_table() if element == "e4m3" else np.array(E2M1)
    codes = torch.arange(len(table), dtype=torch.uint8)
    assert np.array_equal(decode_elements(codes, element).numpy(), table, equal_nan=True)  # type: ignore[arg-type]


def test_fp4_is_twice_what_gguf_reads() -> None:
    """gguf keeps MXFP4's elements doubled, as integers."""
    gguf = pytest.importorskip("gguf.quants")
    assert [2 * value for value in E2M1] == [float(value) for value in gguf.MXFP4.kvalues]


@pytest.mark.parametrize("element", ["e4m3", "e2m1"])
@given(values=st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=64))
@settings(max_examples=60, deadline=None)
def test_nearest_elements(element: str, values: list[float]) -> None:
    x = torch.tensor(values)
    table = e4m3_table() if element == "e4m3" else np.array(E2M1)
    table = table[np.isfinite(table)]
    rounded = decode_elements(encode_elements(x, element), element)  # type: ignore[arg-type]
    errors = np.abs(rounded.numpy().astype(np.float64) - x.numpy())
    best = np.abs(x.numpy().astype(np.float64)[:, None] - table).min(1)
    assert np.array_equal(errors, best)
    assert torch.equal(round_elements(x, element), rounded)  # type: ignore[arg-type]


@pytest.mark.parametrize("element", ["e4m3", "e2m1"])
def test_ties_go_to_even_codes(element: str) -> None:
    codes = torch.arange(126 if element == "e4m3" else 7, dtype=torch.uint8)
    values = decode_elements(codes, element)  # type: ignore[arg-type]
    middles = (values + decode_elements(codes + 1, element)) / 2  # type: ignore[arg-type]
    expected = torch.where(codes % 2 == 0, codes, codes + 1)
    assert torch.equal(encode_elements(middles, element), expected)  # type: ignore[arg-type]
    assert torch.equal(round_elements(-middles, element), -decode_elements(expected, element))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_rounding_is_that_of_the_definitions(name: str) -> None:
    spec = FloatSpec.parse(name)
    assert spec is not None
    assert str(spec) == name == str(parse_spec(name))
    weight = torch.randn(130, 256, generator=torch.Generator().manual_seed(3)) * 0.1
    weight[5] = 0.0
    weight[7, 11] = 30.0
    found = quantize(weight, spec)
    found.validate("w")
    expected = reference(weight.numpy(), spec)
    # argmin takes the lower of two as near, so values half-way may differ by a step: none does here.
    assert np.allclose(found.dequantize().numpy(), expected, rtol=1e-6, atol=0)
    blank = blank_weight(spec, (130, 256))
    assert (blank.scales.shape, blank.scales.dtype) == (found.scales.shape, found.scales.dtype)  # type: ignore[union-attr]
    size = found.codes.numel() * spec.bits // 8 + found.scales.nbytes
    size += 0 if found.global_scale is None else found.global_scale.nbytes
    assert found.bits_per_weight == pytest.approx(8 * size / weight.numel(), rel=1e-12)


@pytest.mark.parametrize("exponent", [-120, -3, 0, 100])
def test_powers_of_two_carry_from_one_and_three_quarters(exponent: int) -> None:
    largest = torch.tensor([1.0, 1.5, 1.7499, 1.75, 1.99]) * 2.0**exponent
    assert microscale_exponents(largest, "e2m1").tolist() == [max(-127, exponent - 2 + up) for up in (0, 0, 0, 1, 1)]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_refused(name: str) -> None:
    weight = torch.randn(128, 128)
    weight[3, 5] = float("inf")
    with pytest.raises(NumericsError, match="NaN or infinite"):
        quantize(weight, parse_spec(name))  # type: ignore[arg-type]


SIMULATED = {
    "int8-token": ActivationSpec("int8"),
    "int8-tensor-static": ActivationSpec("int8", "tensor", dynamic=False),
    "e4m3-token": ActivationSpec("e4m3"),
    "e4m3-g128": ActivationSpec("e4m3", "group", group_size=128),
    "nvfp4": ActivationSpec("e2m1", "group", group_size=16, scale="e4m3"),
    "mxfp4": ActivationSpec("e2m1", "group", group_size=32, scale="e8m0"),
    "mxfp8": ActivationSpec("e4m3", "group", group_size=32, scale="e8m0"),
}


@pytest.mark.parametrize("name", SIMULATED)
def test_simulated_inputs_are_near_and_stay_what_they_become(name: str) -> None:
    spec = SIMULATED[name]
    x = torch.randn(3, 7, 256, generator=torch.Generator().manual_seed(1)) * 3
    scale = static_scale(float(x.abs().max()), spec) if spec.needs_calibration else None
    rounded = fake_quantize(x, spec, scale)
    assert rounded.shape == x.shape
    assert rounded.dtype == x.dtype
    share = {"int8": 0.03, "e4m3": 0.05, "e2m1": 0.3}[spec.element]
    assert float((rounded - x).norm() / x.norm()) < share
    if spec.needs_calibration:
        with pytest.raises(UsageError, match="calibrated scale"):
            fake_quantize(x, spec)
    if spec.granularity != "tensor":
        alone = torch.stack([fake_quantize(row, spec, scale) for row in x.flatten(0, 1)]).view_as(x)
        assert torch.equal(alone, rounded), "a token's rounding depends on others"


def test_inputs_of_zero_stay_zero() -> None:
    for spec in SIMULATED.values():
        scale = static_scale(0.0, spec) if spec.needs_calibration else None
        assert torch.equal(fake_quantize(torch.zeros(2, 256), spec, scale), torch.zeros(2, 256))
