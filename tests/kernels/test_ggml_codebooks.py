"""The encoders of ggml's codebook types: decoded by ``gguf``, compared with exhaustive search in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from lowbit.errors import NumericsError
from lowbit.formats.ggml import GGML_TYPES
from lowbit.formats.ggml.codebooks import grid, sign_patterns
from lowbit.kernels.ggml import iq, quantize_rows
from lowbit.kernels.ggml.lattice import Layout, search
from lowbit.kernels.ggml.lattice_tables import lattice

LAYOUTS: dict[str, Layout] = {
    "IQ3_S": iq.IQ3_S,
    "IQ3_XXS": iq.IQ3_XXS,
    "IQ2_S": iq.IQ2_S,
    "IQ2_XS": iq.IQ2_XS,
    "IQ2_XXS": iq.IQ2_XXS,
    "IQ1_S": iq.IQ1_S,
    "IQ1_M": iq.IQ1_M,
}
NAMES = list(LAYOUTS)

GAUSSIAN = {
    "IQ3_S": (0.134, 0.118),
    "IQ3_XXS": (0.184, 0.156),
    "IQ2_S": (0.248, 0.227),
    "IQ2_XS": (0.300, 0.260),
    "IQ2_XXS": (0.343, 0.295),
    "IQ1_S": (0.483, 0.440),
    "IQ1_M": (0.445, 0.390),
}
"""Relative root mean square errors of Gaussian weights, plain and weighted, with some room; llama.cpp's are higher."""


def matrix(rows: int = 4, columns: int = 512, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((rows, columns)).astype(np.float32) * np.float32(0.02)
    return weight, np.exp(generator.standard_normal(columns)).astype(np.float32)


def encoded(weight: np.ndarray, name: str, importance: np.ndarray | None = None) -> np.ndarray:
    blocks = quantize_rows(weight, GGML_TYPES[name], importance)
    return dequantize(blocks, gguf.GGMLQuantizationType[name]).astype(np.float64)


def error(weight: np.ndarray, decoded: np.ndarray, importance: np.ndarray | None = None) -> float:
    share = np.ones(weight.shape[1]) if importance is None else importance.astype(np.float64)
    exact = weight.astype(np.float64)
    return float(np.sqrt((share * (exact - decoded) ** 2).sum() / (share * exact**2).sum()))


@pytest.mark.parametrize("name", NAMES)
def test_error_on_gaussian_weights(name: str) -> None:
    weight, importance = matrix(16, 1024)
    plain, weighted = GAUSSIAN[name]
    assert error(weight, encoded(weight, name)) < plain
    assert error(weight, encoded(weight, name, importance), importance) < weighted


def least_errors(block: np.ndarray, importance: np.ndarray, scale: float, points: np.ndarray, signs: str) -> np.ndarray:
    """The least weighted error of every 8 weights at ``scale``, over all points and all signs that can be stored."""
    width = points.shape[1]
    found = []
    for first in range(0, len(block), 8):
        x, w = block[first : first + 8].astype(np.float64), importance[first : first + 8].astype(np.float64)
        if signs == "point":
            tries = [(w * (x - scale * (points + shift)) ** 2).sum(axis=1).min() for shift in (0.125, -0.125)]
            found.append(tries)
            continue
        patterns = sign_patterns() if signs == "even" else np.arange(256)
        flips = 1.0 - 2.0 * (patterns[:, None] >> np.arange(8) & 1)
        total = np.zeros(len(patterns))
        for part in range(0, 8, width):
            signed = flips[:, part : part + width, None] * points.T
            errors = (w[part : part + width, None] * (x[part : part + width, None] - scale * signed) ** 2).sum(axis=1)
            total += errors.min(axis=1)
        found.append([total.min()])
    return np.array(found)


@pytest.mark.parametrize("name", NAMES)
def test_codes_against_exhaustive_search_at_the_same_scales(name: str) -> None:
    layout = LAYOUTS[name]
    weight, _ = matrix(1, 256, 3)
    importance = np.ones(256, np.float32)
    points = grid(name).astype(np.float64)
    found = search(weight, importance, lattice(name), layout)
    decoded = encoded(weight, name)
    errors = (importance * (weight - decoded) ** 2).reshape(-1, layout.sub).sum(axis=1)
    scales = float(found.scale[0, 0]) * layout.unit * (2.0 * found.number[0, 0] + 1)
    exhaustive = 0.0
    for sub, scale in enumerate(scales):
        part = slice(sub * layout.sub, (sub + 1) * layout.sub)
        least = least_errors(weight[0, part], importance[part], scale, points, layout.signs)
        exhaustive += float(least.sum(axis=0).min() if layout.shared else least.min(axis=1).sum())
    # codes are searched before the block scale is enlarged
    assert errors.sum() <= exhaustive * (1.02 if layout.exact else 1.08)


@pytest.mark.parametrize("name", NAMES)
def test_scales_lie_between_least_squares_and_no_shrinking(name: str) -> None:
    weight, _ = matrix(4, 256, 5)
    for row, decoded in zip(weight.astype(np.float64), encoded(weight, name), strict=True):
        best = (row @ decoded) / (decoded @ decoded)
        unshrunk = (row @ row) / (row @ decoded)
        assert 0.99 * best <= 1.0 <= 1.01 * unshrunk
        assert best < unshrunk


@pytest.mark.parametrize("name", NAMES)
def test_importance_counts(name: str) -> None:
    weight, importance = matrix(8, 512, 1)
    assert error(weight, encoded(weight, name, importance), importance) < error(
        weight, encoded(weight, name), importance
    )


@pytest.mark.parametrize("name", NAMES)
def test_zero_rows_and_blocks_stay_zero(name: str) -> None:
    weight, _ = matrix(3, 512)
    weight[1] = 0
    weight[2, :256] = 0
    decoded = encoded(weight, name)
    assert not decoded[1].any()
    assert not decoded[2, :256].any()
    assert np.isfinite(decoded).all()


@pytest.mark.parametrize("name", NAMES)
def test_zero_sub_blocks_beside_others(name: str) -> None:
    weight, _ = matrix(2, 256)
    weight[:, 32:64] = 0
    decoded = encoded(weight, name)
    assert np.abs(decoded[:, 32:64]).max() < np.abs(weight).max() / 2


@pytest.mark.parametrize("value", [1.0, -0.5, 3e-3])
@pytest.mark.parametrize("name", NAMES)
def test_constant_rows(name: str, value: float) -> None:
    weight = np.full((1, 256), value, np.float32)
    assert np.abs(encoded(weight, name) / value - 1).max() < 0.02


@pytest.mark.parametrize("power", [2, 12])
@pytest.mark.parametrize("name", NAMES)
def test_powers_of_two_pass_through(name: str, power: int) -> None:
    weight, importance = matrix(2, 256, 2)
    scale = np.float32(2.0**power)
    assert np.allclose(encoded(weight * scale, name, importance), encoded(weight, name, importance) * scale, rtol=2e-2)


@pytest.mark.parametrize("scale", [1e-6, 1e-9, 1e-30])
@pytest.mark.parametrize("name", NAMES)
def test_tiny_rows(name: str, scale: float) -> None:
    weight, _ = matrix(2, 256)
    tiny = weight / np.abs(weight).max() * np.float32(scale)
    assert error(tiny, encoded(tiny, name)) <= 1.0 + 1e-6


@pytest.mark.parametrize("value", [1e8, 1e20, 1e38])
@pytest.mark.parametrize("name", NAMES)
def test_weights_beyond_float16_scales_are_refused(name: str, value: float) -> None:
    weight, _ = matrix(3, 256)
    weight[2] *= np.float32(value)
    weight[2, 7] = value
    with pytest.raises(NumericsError, match="row 2"):
        quantize_rows(weight, GGML_TYPES[name])


@pytest.mark.parametrize("name", NAMES)
def test_outliers_keep_their_size(name: str) -> None:
    weight, _ = matrix(2, 256)
    weight[0, 100] = 1.0
    decoded = encoded(weight, name)
    assert 0.5 < decoded[0, 100] < 1.3
    assert error(weight, decoded) < 0.7


@pytest.mark.parametrize("name", NAMES)
def test_columns_without_importance(name: str) -> None:
    weight, importance = matrix(2, 512, 4)
    importance[::3] = 0
    importance[256:] = 0
    decoded = encoded(weight, name, importance)
    assert np.isfinite(decoded).all()
    assert error(weight, decoded, importance) < GAUSSIAN[name][0]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", ["IQ3_XXS", "IQ2_S", "IQ1_M"])
def test_rows_are_independent_and_threads_do_not_matter(name: str) -> None:
    weight, importance = matrix(5, 512, 6)
    torch.set_num_threads(1)
    whole = quantize_rows(weight, GGML_TYPES[name], importance)
    torch.set_num_threads(3)
    assert np.array_equal(whole, quantize_rows(weight, GGML_TYPES[name], importance))
    assert np.array_equal(whole[3:4], quantize_rows(weight[3:4], GGML_TYPES[name], importance))


@pytest.mark.parametrize("name", ["IQ3_S", "IQ2_XS", "IQ1_S"])
def test_nearest_points_of_a_cell(name: str) -> None:
    table = lattice(name)
    points = grid(name).astype(np.float64)
    values = table.halves.T.astype(np.float64)
    generator = np.random.default_rng(0)
    for cell in generator.integers(0, len(table.neighbours), 50):
        centre = np.concatenate([values[cell % len(values)], values[cell // len(values)]])
        distances = ((points - centre) ** 2).sum(axis=1)
        listed = table.neighbours[cell] & 0xFFFF
        assert np.allclose(distances[listed], np.sort(distances)[: len(listed)])


ENCODE = """
import sys, numpy
from lowbit.formats.ggml import GGML_TYPES
from lowbit.kernels.ggml import quantize_rows
weight = numpy.load(sys.argv[1])
sys.stdout.buffer.write(quantize_rows(weight, GGML_TYPES[sys.argv[2]], None).tobytes())
"""


@pytest.mark.slow
def test_every_processor_makes_the_same_bytes(tmp_path: Path) -> None:
    weight, _ = matrix(4, 512)
    np.save(tmp_path / "weight.npy", weight)
    plainest = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", ENCODE, str(tmp_path / "weight.npy"), "IQ1_M"]
    there = subprocess.run(command, env={**os.environ, **plainest}, stdout=subprocess.PIPE, check=True).stdout
    assert there == quantize_rows(weight, GGML_TYPES["IQ1_M"], None).tobytes()
