"""Bit packing against per-element Python integers, published constants and compressed-tensors' own packer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

from lowbit.formats.bits import (
    dense_words,
    pack,
    pack_awq,
    pack_sparse,
    sparse_words,
    unpack,
    unpack_awq,
    unpack_sparse,
)


def random_codes(rows: int, columns: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator)


def words_of(stream: int, count: int) -> list[int]:
    return [int.from_bytes((stream >> (32 * i) & 0xFFFFFFFF).to_bytes(4, "little"), "little") for i in range(count)]


def stream_of(codes: Sequence[int], bits: int) -> int:
    """The row as one big integer: element i at bit i*bits."""
    return sum(code << (bits * i) for i, code in enumerate(codes))


def unsigned(words: torch.Tensor) -> list[list[int]]:
    return [[word & 0xFFFFFFFF for word in row] for row in words.tolist()]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 31, 32, 45, 64])
def test_dense_words_are_the_bit_stream(bits: int, columns: int) -> None:
    codes = random_codes(3, columns, bits)
    expected = [words_of(stream_of(row, bits), -(-columns * bits // 32)) for row in codes.tolist()]
    assert unsigned(pack(codes, bits)) == expected
    assert unsigned(pack(codes.t(), bits, dim=0).t()) == expected


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 9, 10, 11, 40])
def test_sparse_words_hold_whole_elements(bits: int, columns: int) -> None:
    codes = random_codes(2, columns, bits)
    each = 32 // bits
    expected = [[stream_of(row[i : i + each], bits) for i in range(0, columns, each)] for row in codes.tolist()]
    words = pack_sparse(codes, bits)
    assert unsigned(words) == expected
    assert words.shape[1] == sparse_words(columns, bits)
    assert torch.equal(unpack_sparse(words, bits, columns), codes)
    assert torch.equal(unpack_sparse(pack_sparse(codes, bits, 0), bits, 2, 0), codes)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_layouts_agree_where_elements_fill_words(bits: int) -> None:
    codes = random_codes(4, 50, bits)
    assert torch.equal(pack(codes, bits), pack_sparse(codes, bits))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(5, 61), (32, 96), (33, 1)])
def test_same_as_compressed_tensors(bits: int, dim: int, shape: tuple[int, int]) -> None:
    codes = random_codes(*shape, bits)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    theirs = pack_to_int32(signed, bits, dim)
    assert torch.equal(pack(codes, bits, dim), theirs)
    assert torch.equal(unpack(theirs, bits, shape[dim], dim), codes)
    assert torch.equal(unpack_from_int32(pack(codes, bits, dim), bits, torch.Size(shape), dim), signed)


def test_constants_of_the_formats() -> None:
    eight = torch.arange(8, dtype=torch.uint8)
    assert unsigned(pack(eight[None], 4)) == [[0x76543210]]
    assert unsigned(pack_awq(eight[:, None])) == [[0x75316420]]
    for bits, word in ((4, 0x77777777), (8, 0x7F7F7F7F), (2, 0x55555555)):
        midpoint_less_one = torch.full((1, 32 // bits), (1 << (bits - 1)) - 1, dtype=torch.uint8)
        assert unsigned(pack(midpoint_less_one, bits)) == [[word]]


def test_awq_puts_each_channel_in_its_nibble() -> None:
    codes = random_codes(24, 5, 4)
    words = unsigned(pack_awq(codes))
    for column in range(5):
        for channel in range(24):
            nibble = [0, 4, 1, 5, 2, 6, 3, 7][channel % 8]
            assert words[column][channel // 8] >> (4 * nibble) & 15 == int(codes[channel, column])
    assert torch.equal(unpack_awq(pack_awq(codes)), codes)
    assert torch.equal(unpack_awq(pack_awq(codes.t().contiguous().t())), codes)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_slices_of_rows_join_up(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(64, 72, bits)
    whole, sparse, awq = pack(codes, bits), pack_sparse(codes, bits), pack_awq(codes & 15)
    monkeypatch.setattr("lowbit.formats.bits._SLICE_ELEMENTS", 200)
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(unpack(whole, bits, 72), codes)
    assert torch.equal(pack_sparse(codes, bits), sparse)
    assert torch.equal(unpack_sparse(sparse, bits, 72), codes)
    assert torch.equal(pack_awq(codes & 15), awq)
    assert torch.equal(unpack_awq(awq), codes & 15)


def test_wrong_arguments_are_refused() -> None:
    codes = random_codes(4, 32, 4)
    with pytest.raises(ValueError, match="uint8"):
        pack(codes.int(), 4)
    with pytest.raises(ValueError, match="1 to 8"):
        pack(codes, 9)
    with pytest.raises(ValueError, match="need 4 words, found 3"):
        unpack(pack(codes, 4)[:, :3], 4, 32)
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_awq(codes)
    assert dense_words(33, 3) == 4
