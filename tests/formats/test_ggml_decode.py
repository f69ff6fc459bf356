"""Decoding of every ggml type against the ``gguf`` package, on random bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from lowbit.errors import CheckpointError, NumericsError
from lowbit.formats.ggml import GGML_IDS, GGML_TYPES, BlockTensor, GgmlType, decode, scale_rows
from lowbit.formats.ggml.codebooks import grid
from lowbit.kernels.ggml import quantize_rows

TYPES = list(GGML_TYPES.values())


def reference(blocks: np.ndarray, kind: GgmlType) -> np.ndarray:
    with np.errstate(all="ignore"):
        values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind.id))
    return np.asarray(values, dtype=np.float32)


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours[~nan].view(np.uint32), theirs[~nan].view(np.uint32))


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_sizes_are_those_of_gguf(kind: GgmlType) -> None:
    theirs = gguf.GGMLQuantizationType[kind.name]
    assert (int(theirs), *gguf.GGML_QUANT_SIZES[theirs]) == (kind.id, kind.block_size, kind.block_bytes)
    assert GGML_IDS[kind.id] is kind
    assert str(kind) == kind.name
    assert kind.fits(512)
    assert kind.columns(kind.row_bytes(512)) == 512
    assert kind.bits_per_weight(3, 512) == kind.bits == 8 * kind.row_bytes(512) / 512
    assert kind.block_size == 1 or not kind.fits(512 + kind.block_size // 2)


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_decode_equals_gguf_on_random_bytes(kind: GgmlType) -> None:
    """Random bytes hold every kind of scale: subnormal, huge, infinite, not a number, of either sign."""
    generator = np.random.default_rng(kind.id)
    blocks = generator.integers(0, 256, (700, kind.row_bytes(512)), dtype=np.uint8)
    assert_same_bits(decode(blocks, kind), reference(blocks, kind))


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_decode_equals_gguf_on_uniform_bytes(kind: GgmlType) -> None:
    """Rows of one byte value: all zero, all ones and everything between."""
    blocks = np.repeat(np.arange(256, dtype=np.uint8)[:, None], kind.row_bytes(256), axis=1)
    assert_same_bits(decode(blocks, kind), reference(blocks, kind))


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "F32", "IQ2_S"])
def test_decode_takes_views_and_empty_matrices(name: str) -> None:
    kind = GGML_TYPES[name]
    wide = np.random.default_rng(1).integers(0, 60, (5, 2 * kind.row_bytes(256)), dtype=np.uint8)
    part = wide[::2, kind.row_bytes(256) :]
    assert_same_bits(decode(part, kind), reference(np.ascontiguousarray(part), kind))
    assert decode(wide[:0], kind).shape == (0, 512)


def test_decode_refuses_broken_rows() -> None:
    with pytest.raises(CheckpointError, match="rows of 35 bytes are no whole number of Q8_0 blocks"):
        decode(np.zeros((2, 35), dtype=np.uint8), GGML_TYPES["Q8_0"])


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_block_tensor(kind: GgmlType) -> None:
    blocks = np.zeros((3, kind.row_bytes(512)), dtype=np.uint8)
    tensor = BlockTensor(kind, torch.from_numpy(blocks))
    tensor.validate("w")
    assert tensor.shape == (3, 512)
    assert tensor.bits_per_weight == kind.bits
    values = tensor.dequantize(torch.bfloat16)
    assert values.dtype == torch.bfloat16
    np.testing.assert_array_equal(values.float().numpy(), reference(blocks, kind))


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind.name != "NVFP4"], ids=str)
def test_validate_finds_every_scale_that_is_not_finite(kind: GgmlType) -> None:
    """Any byte of a block that can make its values not finite makes the tensor invalid."""
    found = 0
    for at in range(kind.block_bytes - 1):
        blocks = np.zeros((2, 2 * kind.block_bytes), dtype=np.uint8)
        blocks[1, kind.block_bytes + at : kind.block_bytes + at + 2] = 0xFF
        if kind.name == "IQ1_M":
            blocks[1, kind.block_bytes + 48 :] |= 0xF0
        finite = bool(np.isfinite(reference(blocks, kind)).all())
        tensor = BlockTensor(kind, torch.from_numpy(blocks))
        if finite:
            continue
        found += 1
        with pytest.raises(NumericsError, match=r"^layer: a scale of its"):
            tensor.validate("layer")
    assert found


def test_validate_knows_what_mxfp4_can_hold() -> None:
    """Every scale byte with every code: what is refused is what decodes to infinity."""
    kind = GGML_TYPES["MXFP4"]
    for scale in range(256):
        blocks = np.full((1, 17), 0x77, dtype=np.uint8)
        blocks[0, 0] = scale
        if np.isfinite(reference(blocks, kind)).all():
            BlockTensor(kind, torch.from_numpy(blocks)).validate("w")
        else:
            with pytest.raises(NumericsError, match="scale"):
                BlockTensor(kind, torch.from_numpy(blocks)).validate("w")


def test_validate_refuses_other_shapes() -> None:
    kind = GGML_TYPES["Q4_K"]
    with pytest.raises(NumericsError, match="bytes"):
        BlockTensor(kind, torch.zeros(2, 144)).validate("w")
    with pytest.raises(NumericsError, match="no whole Q4_K blocks of 144"):
        BlockTensor(kind, torch.zeros(2, 145, dtype=torch.uint8)).validate("w")


@pytest.mark.parametrize("name", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_grids_are_those_of_gguf(name: str) -> None:
    theirs = getattr(gguf.quants, name)
    theirs.init_grid()
    np.testing.assert_array_equal(grid(name), theirs.grid.reshape(theirs.grid_shape))
    with pytest.raises(ValueError, match="read-only"):
        grid(name)[0, 0] = 1


@pytest.mark.parametrize(
    "kind", [kind for kind in TYPES if kind.name not in ("F32", "BF16", "MXFP4", "NVFP4")], ids=str
)
def test_scaled_rows_stand_for_scaled_values(kind: GgmlType) -> None:
    generator = np.random.default_rng(kind.id)
    weight = generator.standard_normal((3, 512)).astype(np.float32)
    blocks = quantize_rows(weight, kind) if kind.name != "F16" else weight.astype(np.float16).view(np.uint8)
    before = decode(blocks, kind)
    factors = np.array([1.0, 1.25, 0.7], np.float32)
    scaled = blocks.copy()
    scale_rows(scaled, kind, factors)
    np.testing.assert_array_equal(scaled[0], blocks[0])
    expected = before * factors[:, None]
    # minima are rounded apart from the scales that they are taken from
    room = 2.0**-10 * np.abs(before).max(axis=1, keepdims=True)
    assert (np.abs(decode(scaled, kind) - expected) <= room).all()


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4", "F32"])
def test_types_without_float16_scales_are_not_scaled(name: str) -> None:
    kind = GGML_TYPES[name]
    with pytest.raises(KeyError):
        scale_rows(np.zeros((1, kind.row_bytes(512)), np.uint8), kind, np.ones(1, np.float32))
