"""NF4 and FP4 against naive searches, and the tables against their definitions."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from lowbit.errors import NumericsError, UsageError
from lowbit.formats import CodebookSpec, parse_scheme
from lowbit.formats.codebook import CODEBOOKS, NESTED_BLOCK, NestedScales, dynamic_table, quantize
from lowbit.formats.rounding import round_weight


def normal_float() -> list[float]:
    """NF4 as its paper defines it: quantiles of a normal distribution, 8 on one side and 7 on the other, and zero."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    positive = [(NormalDist().inv_cdf(offset + (0.5 - offset) * i / 8)) for i in range(8)]
    negative = [-(NormalDist().inv_cdf(offset + (0.5 - offset) * i / 7)) for i in range(7)]
    return sorted(value / max(positive) for value in [*positive, 0.0, *negative])


def naive_codes(weight: torch.Tensor, table: tuple[float, ...], size: int) -> tuple[list[int], list[float], list[bool]]:
    """Nearest code of each weight by trying all in float64, the block maxima, and which weights lie between two."""
    flat = weight.double().flatten().tolist()
    codes, maxima, ties = [], [], []
    for start in range(0, len(flat), size):
        block = flat[start : start + size]
        largest = max(map(abs, block))
        maxima.append(largest)
        for value in block:
            gaps = sorted((abs(value / largest - entry), code) for code, entry in enumerate(table)) if largest else []
            codes.append(gaps[0][1] if gaps else table.index(0.0))
            ties.append(bool(gaps) and gaps[1][0] - gaps[0][0] < 1e-6)
    return codes, maxima, ties


def test_nf4_holds_normal_quantiles() -> None:
    assert CODEBOOKS["nf4"] == pytest.approx(normal_float(), abs=3e-5)
    assert sorted(CODEBOOKS["nf4"]) == list(CODEBOOKS["nf4"])
    assert all(value == float(torch.tensor(value)) for value in CODEBOOKS["nf4"])


def test_fp4_is_sign_and_magnitude() -> None:
    magnitudes = CODEBOOKS["fp4"][:8]
    assert [-value for value in magnitudes] == list(CODEBOOKS["fp4"][8:])
    assert sorted(round(12 * value, 4) for value in magnitudes) == [0, 0.0625, 2, 3, 4, 6, 8, 12]


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(7, 96), (3, 50), (1, 5)])
def test_codes_are_the_nearest(name: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))
    q = quantize(weight, CodebookSpec("nf4" if name == "nf4" else "fp4", 32))
    table = CODEBOOKS[name]
    codes, maxima, ties = naive_codes(weight, table, 32)
    found = q.codes.flatten().tolist()
    wrong = [i for i, (a, b) in enumerate(zip(found, codes, strict=True)) if table[a] != table[b] and not ties[i]]
    assert not wrong
    assert q.maxima().tolist() == pytest.approx(maxima)
    expected = [table[code] * maxima[i // 32] for i, code in enumerate(found)]
    assert q.dequantize().flatten().tolist() == pytest.approx(expected, abs=1e-7)
    q.validate("w")


def test_a_block_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 64)
    weight[1] = torch.linspace(-1, 1, 64)
    for name in ("NF4", "NF4_DQ", "FP4"):
        q = round_weight(weight, parse_scheme(name).weights)
        assert bool(torch.isfinite(q.dequantize()).all())
        if name != "NF4_DQ":
            assert not bool(q.dequantize()[0].any())


def test_dynamic_table() -> None:
    """Sign, seven decades and the bits that a decade leaves for its fraction; 0 and 1."""
    values = {0.0, 1.0}
    for exponent in range(7):
        steps = 2 ** (6 - exponent)
        for k in range(steps):
            value = 10.0**-exponent * (0.1 + 0.9 * (k + 0.5) / steps)
            values |= {value, -value}
    assert dynamic_table().tolist() == pytest.approx(sorted(values), rel=1e-6)


@pytest.mark.parametrize("blocks", [1, 255, 600])
def test_double_quantization(blocks: int) -> None:
    """Each maximum is the nearest of the table's values under the largest deviation of its 256, by float64 search."""
    weight = torch.randn(blocks, 64, generator=torch.Generator().manual_seed(blocks))
    weight *= torch.linspace(0.1, 1, blocks)[:, None]
    plain = quantize(weight, CodebookSpec("nf4"))
    q = quantize(weight, CodebookSpec("nf4", double_quant=True))
    assert isinstance(q.absmax, NestedScales)
    assert torch.equal(q.codes, plain.codes)
    maxima = plain.maxima().double()
    centred = maxima - maxima.float().mean().double()
    table = dynamic_table().double()
    for start in range(0, blocks, NESTED_BLOCK):
        part = centred[start : start + NESTED_BLOCK]
        outer = float(part.abs().max()) or 1.0
        best = (part[:, None] / outer - table).abs().min(1).values
        found = (part / outer - table[q.absmax.codes[start : start + NESTED_BLOCK].long()]).abs()
        assert float((found - best).max()) < 1e-6
    error = (q.maxima().double() - maxima).abs()
    assert float(error.max()) <= 0.008 * float(centred.abs().max()) + 1e-6


def test_bits_per_weight_count_everything() -> None:
    assert CodebookSpec("nf4").bits_per_weight(1024, 1024) == 4.5
    nested = CodebookSpec("nf4", double_quant=True).bits_per_weight(1024, 1024)
    assert math.isclose(nested, 4 + 8 / 64 + 32 / (64 * 256))


def test_refusals() -> None:
    with pytest.raises(UsageError, match="32 to 4096"):
        CodebookSpec("nf4", 48)
    with pytest.raises(NumericsError, match="NaN or infinite"):
        quantize(torch.full((2, 64), float("nan")), CodebookSpec())
