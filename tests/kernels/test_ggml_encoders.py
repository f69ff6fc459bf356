"""The encoders of ggml's types against float64 oracles: never worse than plain rounding, near the optimum, robust."""

from __future__ import annotations

from collections.abc import Iterator

import gguf
import numpy as np
import pytest
import torch

from lowbit.errors import NumericsError, UsageError
from lowbit.formats.ggml import GGML_TYPES, BlockTensor, GgmlType, decode
from lowbit.formats.ggml.codebooks import fp4_values, iq4_values
from lowbit.kernels.ggml import prepare_importance, quantize_rows, round_to_half
from lowbit.kernels.ggml.encoders import ENCODERS, direct_encoder

ELSEWHERE = {"F32", "F16", "BF16", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M"}
"""Rounded without a scale, or with tests of their own."""

TYPES = [kind for name, kind in GGML_TYPES.items() if name not in ELSEWHERE]

TOLERANCE = {"Q8_0": 0.012, "Q6_K": 0.03, "Q5_0": 0.06, "Q5_1": 0.05, "Q5_K": 0.06, "TQ1_0": 0.6, "TQ2_0": 0.6}
"""Relative RMSE that Gaussian weights never exceed, where it is not 0.3 or less."""


def matrix(rows: int = 6, columns: int = 512, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights with heavy tails and an uneven importance."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_t(5, (rows, columns)).astype(np.float32) * np.float32(0.03)
    return weight, np.exp(generator.standard_normal(columns)).astype(np.float32)


def objective(weight: np.ndarray, decoded: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """float64 ``[rows]``: the weighted squared error."""
    share = np.ones(weight.shape[1]) if importance is None else importance.astype(np.float64)
    return ((weight.astype(np.float64) - decoded.astype(np.float64)) ** 2 * share).sum(axis=1)


def encoded(weight: np.ndarray, kind: GgmlType, importance: np.ndarray | None = None) -> np.ndarray:
    """The decoded result of encoding."""
    blocks = quantize_rows(weight, kind, importance)
    assert blocks.shape == (len(weight), kind.row_bytes(weight.shape[1]))
    BlockTensor(kind, torch.from_numpy(blocks)).validate("w")
    return decode(blocks, kind)


def half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float64)


def safe(values: np.ndarray) -> np.ndarray:
    return np.where(values == 0, 1.0, values)


def plain_steps(weight: np.ndarray, size: int, low: int, high: int, scale_range: int) -> np.ndarray:
    """Absmax rounding of groups with integer scales up to ``scale_range`` times a float16 step per 256."""
    groups = weight.astype(np.float64).reshape(len(weight), -1, 256 // size, size)
    steps = np.abs(groups).max(axis=3) / high
    common = half(steps.max(axis=2, keepdims=True) / scale_range)
    steps = common * np.rint(steps / safe(common))
    codes = np.clip(np.rint(groups / safe(steps)[..., None]), low, high)
    return (codes * steps[..., None]).reshape(weight.shape)


def plain_ranges(weight: np.ndarray, size: int, high: int, scale_range: int) -> np.ndarray:
    """Rounding over the range of each group, with integer scales and minima times float16 steps per 256."""
    groups = weight.astype(np.float64).reshape(len(weight), -1, 256 // size, size)
    minima = np.maximum(-groups.min(axis=3), 0)
    steps = np.maximum((groups.max(axis=3) + minima) / high, 0)
    common, common_minimum = (half(part.max(axis=2, keepdims=True) / scale_range) for part in (steps, minima))
    steps = common * np.rint(steps / safe(common))
    minima = common_minimum * np.rint(minima / safe(common_minimum))
    codes = np.clip(np.rint((groups + minima[..., None]) / safe(steps)[..., None]), 0, high)
    return (codes * steps[..., None] - minima[..., None]).reshape(weight.shape)


def plain_levels(weight: np.ndarray, levels: np.ndarray, size: int, scale_range: int) -> np.ndarray:
    """Absmax rounding to ``levels``; with ``scale_range`` 0 a float16 scale per group."""
    groups = weight.astype(np.float64).reshape(len(weight), -1, 256 // size, size)
    steps = np.abs(groups).max(axis=3) / levels.max()
    if scale_range:
        common = half(steps.max(axis=2, keepdims=True) / scale_range)
        steps = common * np.rint(steps / safe(common))
    else:
        steps = half(steps)
    codes = np.abs((groups / safe(steps)[..., None])[..., None] - levels).argmin(axis=-1)
    return (levels[codes] * steps[..., None]).reshape(weight.shape)


def plain(weight: np.ndarray, kind: GgmlType) -> np.ndarray:
    """What rounding without any search gives: by the ``gguf`` package where it has it, else by the above."""
    if kind.name in ("Q2_K", "Q4_K", "Q5_K"):
        size, high, scale_range = {"Q2_K": (16, 3, 15), "Q4_K": (32, 15, 63), "Q5_K": (32, 31, 63)}[kind.name]
        return plain_ranges(weight, size, high, scale_range)
    if kind.name == "Q3_K":
        return plain_steps(weight, 16, -4, 3, 31)
    if kind.name == "Q6_K":
        return plain_steps(weight, 16, -32, 31, 127)
    if kind.name in ("IQ4_NL", "IQ4_XS"):
        return plain_levels(weight, iq4_values().astype(np.float64), 32, 31 if kind.name == "IQ4_XS" else 0)
    if kind.name == "NVFP4":
        groups = weight.reshape(-1, 16)
        scales = gguf.quants.NVFP4.fp32_to_ue4m3(np.abs(groups).max(axis=1) / 6)
        steps = gguf.quants.NVFP4.ue4m3_to_fp32(scales).astype(np.float64)[:, None]
        levels = fp4_values().astype(np.float64)
        codes = np.abs((groups / safe(steps))[..., None] - levels).argmin(axis=-1)
        return (levels[codes] * steps).reshape(weight.shape)
    theirs = gguf.GGMLQuantizationType(kind.id)
    return gguf.quants.dequantize(gguf.quants.quantize(weight, theirs), theirs)


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_no_row_is_worse_than_plain_rounding(kind: GgmlType, weighted: bool) -> None:
    for seed in range(3):
        weight, importance = matrix(seed=seed)
        share = importance if weighted else None
        ours = objective(weight, encoded(weight, kind, share), share)
        theirs = objective(weight, plain(weight, kind), share)
        # Q8_0 without importance takes a finer step at one end of the grid, which gains on average, not in every row
        slack = 1.1 if kind.name == "Q8_0" and not weighted else 1 + 1e-6
        assert (ours <= theirs * slack).all()


def test_q8_0_without_importance_gains_on_average() -> None:
    kind = GGML_TYPES["Q8_0"]
    weight, _ = matrix(100, 2048)
    assert objective(weight, encoded(weight, kind)).sum() < 0.995 * objective(weight, plain(weight, kind)).sum()


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_error_on_gaussian_weights(kind: GgmlType) -> None:
    weight = np.random.default_rng(7).standard_normal((8, 512)).astype(np.float32)
    error = np.sqrt(objective(weight, encoded(weight, kind)).sum() / (weight.astype(np.float64) ** 2).sum())
    assert error < TOLERANCE.get(kind.name, 0.3 if kind.name == "Q2_K" else 0.16)


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_importance_counts(kind: GgmlType) -> None:
    """Encoding for an importance gives less error by it than encoding without."""
    weight, importance = matrix(12)
    with_it = objective(weight, encoded(weight, kind, importance), importance).sum()
    without = objective(weight, encoded(weight, kind), importance).sum()
    assert with_it < without


def best_on_grid(block: np.ndarray, share: np.ndarray, levels: np.ndarray, scales: np.ndarray) -> float:
    """The least weighted error of a block over all ``scales``, by trying each."""
    values = scales[:, None, None] * levels  # [scales, 1, levels]
    misses = (block[None, :, None] - values) ** 2
    return float((misses.min(axis=2) * share).sum(axis=1).min())


def half_scales(block: np.ndarray, far: float, near: float) -> np.ndarray:
    """Float16 scales of either sign that put the weight of greatest magnitude between ``near`` and ``far``."""
    greatest = np.abs(block).max()
    ladder = half(greatest / np.geomspace(near, far, 500))
    return np.concatenate([ladder, -ladder])


@pytest.mark.parametrize(
    ("name", "levels", "slack"),
    [
        ("Q4_0", np.arange(-8, 8), 1.02),
        ("Q5_0", np.arange(-16, 16), 1.05),
        ("Q8_0", np.arange(-128, 128), 1.4),
        ("IQ4_NL", iq4_values().astype(np.int64), 1.02),
        ("TQ2_0", np.arange(-1, 2), 1.005),
    ],
    ids=["Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "TQ2_0"],
)
def test_near_the_optimum_of_a_brute_force(name: str, levels: np.ndarray, slack: float) -> None:
    kind = GGML_TYPES[name]
    weight, measured = matrix(2)
    importance = prepare_importance(measured, len(measured))
    ours = objective(weight, encoded(weight, kind, measured), importance).sum()
    best = 0.0
    for row in weight.astype(np.float64):
        for block, share in zip(row.reshape(-1, kind.block_size), importance.reshape(-1, kind.block_size), strict=True):
            far = np.abs(levels).max()
            scales = half_scales(block, 5.0 if far == 1 else 1.3 * far, 0.8 * far)
            best += best_on_grid(block, share.astype(np.float64), levels.astype(np.float64), scales)
    assert ours <= slack * best


@pytest.mark.parametrize(("name", "size", "slack"), [("MXFP4", 32, 1 + 1e-6), ("NVFP4", 16, 1.01)])
def test_four_bit_floats_find_the_best_scale(name: str, size: int, slack: float) -> None:
    weight, measured = matrix(3)
    importance = prepare_importance(measured, len(measured))
    ours = objective(weight, encoded(weight, GGML_TYPES[name], measured), importance).sum()
    if name == "MXFP4":
        scales = 2.0 ** np.arange(-20, 8)
    else:
        scales = gguf.quants.NVFP4.ue4m3_to_fp32(np.arange(0x7F, dtype=np.uint8)).astype(np.float64)
    groups = weight.astype(np.float64).reshape(-1, size)
    shares = np.tile(importance.astype(np.float64), len(weight)).reshape(-1, size)
    levels = fp4_values().astype(np.float64)
    best = sum(best_on_grid(group, share, levels, scales) for group, share in zip(groups, shares, strict=True))
    assert ours <= slack * best


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_zero_rows_stay_zero(kind: GgmlType, weighted: bool) -> None:
    weight, importance = matrix(4)
    weight[1] = 0
    weight[2, 256:] = -0.0
    decoded = encoded(weight, kind, importance if weighted else None)
    assert (decoded[1] == 0).all()
    assert (decoded[2, 256:] == 0).all()


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("value", [0.37, -2.5])
def test_constant_rows(kind: GgmlType, value: float) -> None:
    decoded = encoded(np.full((1, 256), value, dtype=np.float32), kind)
    bound = {"MXFP4": 0.25, "NVFP4": 0.07, "Q2_K": 0.05, "Q4_1": 2e-3, "Q5_1": 2e-3}.get(kind.name, 0.02)
    np.testing.assert_allclose(decoded, value, rtol=bound)


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_outliers_keep_their_size(kind: GgmlType) -> None:
    weight, _ = matrix(2)
    weight[0, 5], weight[1, 300] = 40.0, -40.0
    decoded = encoded(weight, kind)
    np.testing.assert_allclose(decoded[0, 5], 40.0, rtol=0.2)
    np.testing.assert_allclose(decoded[1, 300], -40.0, rtol=0.2)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind.name != "NVFP4"], ids=str)
@pytest.mark.parametrize("power", [-9, 8])
def test_powers_of_two_pass_through(kind: GgmlType, power: int) -> None:
    """Scaling the weights by a power of two that float16 scales can follow scales the result exactly."""
    weight = matrix(3)[0] * np.float32(20)
    factor = np.float32(2.0**power)
    if power < 0:
        weight *= np.float32(2.0**6)
    np.testing.assert_array_equal(encoded(weight * factor, kind), encoded(weight, kind) * factor)


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-7, 1e-20, 1e-44])
def test_tiny_rows(kind: GgmlType, scale: float) -> None:
    """Weights at or below the least float16 scale: at worst they become zero."""
    weight = (np.random.default_rng(3).standard_normal((2, 512)) * scale).astype(np.float32)
    decoded = encoded(weight, kind)
    assert np.isfinite(decoded).all()
    assert (objective(weight, decoded) <= objective(weight, np.zeros_like(weight)) * (1 + 1e-6)).all()


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -np.nan])
def test_weights_that_are_not_finite_are_refused(kind: GgmlType, bad: float) -> None:
    weight, _ = matrix(5)
    weight[3, 77] = bad
    with pytest.raises(NumericsError, match="row 3 holds weights that are not finite"):
        quantize_rows(weight, kind)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind.name not in ("MXFP4", "NVFP4")], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_weights_beyond_float16_scales_are_refused(kind: GgmlType, weighted: bool) -> None:
    weight, importance = matrix(4)
    weight[2, 300] = 3e38
    with pytest.raises(NumericsError, match=f"row 2 holds weights too large for {kind}"):
        quantize_rows(weight, kind, importance if weighted else None)


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_columns_without_importance(kind: GgmlType) -> None:
    """They do not disturb the others, and are still encoded to something near."""
    weight, importance = matrix(4)
    importance[:256:2] = 0
    importance[256:] = 0
    decoded = encoded(weight, kind, importance)
    assert np.isfinite(decoded).all()
    assert (objective(weight, decoded, importance) <= objective(weight, encoded(weight, kind), importance)).mean() > 0.7
    zeros = encoded(weight, kind, np.zeros_like(importance))
    assert objective(weight, zeros).sum() < objective(weight, np.zeros_like(weight)).sum()


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_importance_of_any_magnitude(kind: GgmlType) -> None:
    weight, importance = matrix(3)
    first = quantize_rows(weight, kind, importance)
    np.testing.assert_array_equal(first, quantize_rows(weight, kind, importance * np.float32(2.0**40)))
    np.testing.assert_array_equal(first, quantize_rows(weight, kind, importance * np.float32(2.0**-40)))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.usefixtures("threads")
def test_rows_are_independent_and_threads_do_not_matter(kind: GgmlType) -> None:
    weight, importance = matrix(37)
    torch.set_num_threads(1)
    whole = quantize_rows(weight, kind, importance)
    torch.set_num_threads(3)
    np.testing.assert_array_equal(quantize_rows(weight, kind, importance), whole)
    np.testing.assert_array_equal(quantize_rows(weight[::3], kind, importance), whole[::3])


def test_long_matrices_are_encoded_in_parts() -> None:
    weight, importance = matrix(700, 256)
    kind = GGML_TYPES["Q4_K"]
    whole = quantize_rows(weight, kind, importance)
    np.testing.assert_array_equal(quantize_rows(weight[650:], kind, importance), whole[650:])
    weight[690, 0] = np.nan
    with pytest.raises(NumericsError, match="row 690 "):
        quantize_rows(weight, kind)


def test_memory_that_is_read_only_strided_or_not_aligned() -> None:
    weight, importance = matrix(4)
    kind = GGML_TYPES["Q8_0"]
    expected = quantize_rows(weight, kind, importance)
    raw = np.frombuffer(b"x" + weight.tobytes(), dtype=np.uint8)[1:].view(np.float32).reshape(weight.shape)
    np.testing.assert_array_equal(quantize_rows(raw, kind, importance), expected)
    np.testing.assert_array_equal(quantize_rows(weight.T.copy().T, kind, importance), expected)


@pytest.mark.parametrize("name", GGML_TYPES)
def test_empty_matrices(name: str) -> None:
    kind = GGML_TYPES[name]
    assert quantize_rows(np.zeros((0, 256), dtype=np.float32), kind).shape == (0, kind.row_bytes(256))


def test_every_type_has_its_encoder() -> None:
    for importance in (None, np.ones(256, np.float32)):
        for name in GGML_TYPES:
            assert name in ENCODERS or direct_encoder(name, importance) is not None


@pytest.mark.parametrize("kind", GGML_TYPES.values(), ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
def test_bfloat16_is_encoded_as_its_values(kind: GgmlType, weighted: bool) -> None:
    weight, importance = matrix(5)
    halves = (weight.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    values = (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
    share = importance if weighted else None
    np.testing.assert_array_equal(quantize_rows(halves, kind, share), quantize_rows(values, kind, share))
    halves[3, 77] = 0xFF80
    with pytest.raises(NumericsError, match="row 3 holds weights that are not finite"):
        quantize_rows(halves, kind, share)


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind.block_size == 32], ids=str)
def test_importance_of_ones_is_no_worse_than_none(kind: GgmlType) -> None:
    weight, importance = matrix(20)
    ones = objective(weight, encoded(weight, kind, np.ones_like(importance))).sum()
    assert ones <= objective(weight, encoded(weight, kind)).sum() * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_to_half(dtype: torch.dtype) -> None:
    weight = torch.from_numpy(matrix(7, 333)[0]).to(dtype)
    weight[2, :5] = torch.tensor([1e-30, -2e-8, 0.0, -0.0, 65504.0])
    raw = weight.view(torch.int16).numpy().view(np.uint16) if dtype == torch.bfloat16 else weight.numpy()
    if dtype == torch.bfloat16:
        raw[2, 4] = 0x477F
    halves, error, energy = round_to_half(raw)
    exact = torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16) if dtype == torch.bfloat16 else weight
    stored = exact.to(torch.float16)
    np.testing.assert_array_equal(halves, stored.view(torch.int16).numpy().view(np.uint16))
    assert error == pytest.approx(float((stored.double() - exact.double()).square().sum()), rel=1e-12)
    assert energy == pytest.approx(float(exact.double().square().sum()), rel=1e-12)


def test_rounding_to_half_notices_what_vanishes() -> None:
    """1e-30 becomes 0: that is a change, however small."""
    _, error, _ = round_to_half(np.full((1, 8), 1e-30, np.float32))
    assert error > 0


@pytest.mark.parametrize(
    ("value", "problem"), [(np.nan, "not finite"), (-np.inf, "not finite"), (65520.0, "too large")]
)
def test_what_float16_cannot_hold(value: float, problem: str) -> None:
    weight, _ = matrix(3)
    weight[1, 4] = value
    with pytest.raises(NumericsError, match=problem):
        round_to_half(weight)


def test_shapes_that_do_not_fit() -> None:
    weight, importance = matrix(2)
    with pytest.raises(UsageError, match="Q4_K wants rows of a multiple of 256 weights, not 320"):
        quantize_rows(weight[:, :320], GGML_TYPES["Q4_K"])
    with pytest.raises(UsageError, match="does not belong to rows of 512"):
        quantize_rows(weight, GGML_TYPES["Q4_K"], importance[:256])


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_importance_that_cannot_be(bad: float) -> None:
    weight, importance = matrix(2)
    importance[3] = bad
    with pytest.raises(NumericsError, match="importance must be finite and not negative"):
        quantize_rows(weight, GGML_TYPES["Q8_0"], importance)


@pytest.mark.parametrize(("name", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32)])
def test_float_types_round_like_torch(name: str, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(5)
    weight = np.concatenate([matrix(3, 256)[0], generator.standard_normal((3, 256)).astype(np.float32) * 1e-7])
    decoded = encoded(weight, GGML_TYPES[name])
    np.testing.assert_array_equal(decoded, torch.from_numpy(weight).to(dtype).float().numpy())


@pytest.mark.parametrize(("name", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_float_types_round_every_exponent_like_torch(name: str, dtype: torch.dtype) -> None:
    """All exponents that fit, both signs, fractions around the ties."""
    exponents = np.arange(0, 142 if name == "F16" else 254, dtype=np.uint32) << np.uint32(23)
    fractions = np.concatenate(
        [np.arange(0, 1 << 23, 4093), np.arange(0, 1 << 23, 1 << 12), np.arange(0, 1 << 23, 1 << 15)]
    )
    fractions = np.unique(np.clip(fractions[:, None] + np.array([-1, 0, 1]), 0, (1 << 23) - 1)).astype(np.uint32)
    bits = (exponents[:, None] | fractions).reshape(-1)
    weight = np.concatenate([bits, bits | np.uint32(1 << 31)]).view(np.float32).reshape(2, -1)
    decoded = encoded(weight, GGML_TYPES[name])
    expected = torch.from_numpy(weight).to(dtype).float().numpy()
    np.testing.assert_array_equal(decoded.view(np.uint32), expected.view(np.uint32))


def test_float_types_refuse_overflow() -> None:
    weight = np.full((2, 32), 1e5, dtype=np.float32)
    with pytest.raises(NumericsError, match="row 0 holds weights too large for F16"):
        quantize_rows(weight, GGML_TYPES["F16"])
    weight[1] = 3.4e38
    weight[0] = 1
    with pytest.raises(NumericsError, match="row 1 holds weights too large for BF16"):
        quantize_rows(weight, GGML_TYPES["BF16"])


COARSE = [name for name, kind in GGML_TYPES.items() if kind.bits < 4]


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", COARSE)
def test_queries_and_keys_are_as_large_as_their_weights(name: str, weighted: bool) -> None:
    kind = GGML_TYPES[name]
    generator = np.random.default_rng(3)
    weight = generator.standard_normal((300, 512)).astype(np.float32) * np.float32(0.02)
    importance = np.exp(generator.standard_normal(512)).astype(np.float32) if weighted else None
    least = quantize_rows(weight, kind, importance)
    full = quantize_rows(weight, kind, importance, full_size=280)
    np.testing.assert_array_equal(full[280:], least[280:])
    shares = np.ones(512) if importance is None else prepare_importance(importance, 512).astype(np.float64)
    exact = weight.astype(np.float64)

    def slopes(blocks: np.ndarray) -> np.ndarray:
        decoded = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name]).astype(np.float64)
        return np.asarray((decoded * exact * shares).sum(axis=1) / (exact**2 * shares).sum(axis=1))

    assert slopes(least)[:280].mean() < 0.995
    np.testing.assert_allclose(slopes(full)[:280], 1.0, atol=2e-3)


def test_rows_of_nothing_stay_what_they_are() -> None:
    kind = GGML_TYPES["IQ2_XS"]
    weight = np.zeros((2, 256), np.float32)
    np.testing.assert_array_equal(quantize_rows(weight, kind, full_size=2), quantize_rows(weight, kind))


def test_types_of_four_bits_and_more_keep_the_least_error() -> None:
    weight = np.random.default_rng(4).standard_normal((4, 256)).astype(np.float32)
    for name in ("Q4_0", "IQ4_XS", "MXFP4", "Q8_0"):
        kind = GGML_TYPES[name]
        np.testing.assert_array_equal(quantize_rows(weight, kind, full_size=4), quantize_rows(weight, kind))
