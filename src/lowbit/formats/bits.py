"""Packing of n-bit codes into 32-bit words, with the bit order spelled out.

*Dense*: element ``i`` of a row occupies bits ``[i*b, i*b+b)`` of a little-endian bit stream that is cut into 32-bit
words; elements may straddle words, 32 elements make ``b`` words. GPTQ uses it along the input features,
compressed-tensors (0.17 and later) along a row.

*Sparse*: ``32//b`` whole elements per word, low bits first, the top bits unused. compressed-tensors before 0.17; the
same as dense for 1, 2, 4 and 8 bits.

*AWQ*: 4 bits, eight output channels per word, nibble ``i`` holding channel ``8c + AWQ_ORDER[i]``.

Words are int32 as the files have them. Work is done in slices of rows, so that scratch memory stays small beside the
matrix itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

__all__ = [
    "AWQ_ORDER",
    "dense_words",
    "pack",
    "pack_awq",
    "pack_sparse",
    "sparse_words",
    "unpack",
    "unpack_awq",
    "unpack_sparse",
]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Channel (of eight) that each nibble of an AWQ word holds, from the low nibble up."""

_SLICE_ELEMENTS = 1 << 22


def dense_words(count: int, bits: int) -> int:
    """Words that ``count`` elements take in the dense layout, ``ceil(count*bits/32)``."""
    return -(-count * bits // 32)


def sparse_words(count: int, bits: int) -> int:
    """Words that ``count`` elements take at ``32 // bits`` elements a word."""
    return -(-count // (32 // bits))


def pack(codes: torch.Tensor, bits: int, dim: int = 1) -> torch.Tensor:
    """Pack uint8 ``codes [rows, columns]``, each below ``2**bits``, densely along ``dim``.

    Returns int32 ``[rows, dense_words(columns)]`` (``dim=1``) or ``[dense_words(rows), columns]`` (``dim=0``).
    Unused bits of the last word are zero. Raises ``ValueError`` for another dtype or width; codes out of range are
    the caller's to exclude (:meth:`QuantizedTensor.validate`).
    """
    _check(codes, torch.uint8, bits)
    if dim == 0:
        return pack(codes.t(), bits).t().contiguous()
    rows, columns = codes.shape
    words = dense_words(columns, bits)
    out = torch.zeros(rows, words * 4, dtype=torch.uint8, device=codes.device)
    whole = columns // 8
    for part in _slices(rows, columns):
        block = codes[part]
        if whole:
            _pack_octets(block[:, : whole * 8], bits, out[part, : whole * bits])
        if tail := columns - whole * 8:
            octet = torch.zeros(block.shape[0], 8, dtype=torch.uint8, device=codes.device)
            octet[:, :tail] = block[:, whole * 8 :]
            packed = torch.zeros(block.shape[0], bits, dtype=torch.uint8, device=codes.device)
            _pack_octets(octet, bits, packed)
            room = min(bits, words * 4 - whole * bits)
            out[part, whole * bits : whole * bits + room] = packed[:, :room]
    return out.view(torch.int32)


def unpack(words: torch.Tensor, bits: int, count: int, dim: int = 1) -> torch.Tensor:
    """Invert :func:`pack`: int32 words to uint8 codes, ``count`` of them along ``dim``.

    Raises ``ValueError`` if the words along ``dim`` are not ``dense_words(count, bits)``.
    """
    _check(words, torch.int32, bits)
    if dim == 0:
        return unpack(words.t(), bits, count).t().contiguous()
    _check_length(words.shape[1], dense_words(count, bits), count, bits)
    rows = words.shape[0]
    out = torch.empty(rows, count, dtype=torch.uint8, device=words.device)
    whole = count // 8
    for part in _slices(rows, count):
        stream = _bytes(words[part])
        if whole:
            _unpack_octets(stream[:, : whole * bits], bits, out[part, : whole * 8])
        if tail := count - whole * 8:
            last = torch.zeros(stream.shape[0], bits, dtype=torch.uint8, device=words.device)
            rest = stream[:, whole * bits : (whole + 1) * bits]
            last[:, : rest.shape[1]] = rest
            octet = torch.empty(stream.shape[0], 8, dtype=torch.uint8, device=words.device)
            _unpack_octets(last, bits, octet)
            out[part, whole * 8 :] = octet[:, :tail]
    return out


def pack_sparse(codes: torch.Tensor, bits: int, dim: int = 1) -> torch.Tensor:
    """Like :func:`pack` in the sparse layout: ``sparse_words`` words along ``dim``."""
    _check(codes, torch.uint8, bits)
    if dim == 0:
        return pack_sparse(codes.t(), bits).t().contiguous()
    rows, columns = codes.shape
    per_word = 32 // bits
    words = sparse_words(columns, bits)
    out = torch.zeros(rows, words, dtype=torch.int32, device=codes.device)
    for part in _slices(rows, columns * 4):
        for place in range(min(per_word, columns)):
            column = codes[part, place::per_word].int() << (place * bits)
            out[part, : column.shape[1]] |= column
    return out


def unpack_sparse(words: torch.Tensor, bits: int, count: int, dim: int = 1) -> torch.Tensor:
    """Invert :func:`pack_sparse`; raises ``ValueError`` if the number of words does not fit ``count``."""
    _check(words, torch.int32, bits)
    if dim == 0:
        return unpack_sparse(words.t(), bits, count).t().contiguous()
    _check_length(words.shape[1], sparse_words(count, bits), count, bits)
    rows, per_word, mask = words.shape[0], 32 // bits, (1 << bits) - 1
    out = torch.empty(rows, count, dtype=torch.uint8, device=words.device)
    for part in _slices(rows, count * 4):
        for place in range(min(per_word, count)):
            target = out[part, place::per_word]
            target.copy_((words[part, : target.shape[1]] >> (place * bits)) & mask)
    return out


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit ``codes`` uint8 ``[out_features, n]`` in AWQ's order: int32 ``[n, out_features/8]``.

    Raises ``ValueError`` unless ``out_features`` is a multiple of 8.
    """
    _check(codes, torch.uint8, 4)
    rows, columns = codes.shape
    if rows % 8:
        raise ValueError(f"AWQ packs 8 output channels a word, {rows} is not a multiple of 8")
    octets = codes.view(rows // 8, 8, columns) if codes.is_contiguous() else codes.reshape(rows // 8, 8, columns)
    out = torch.empty(columns, rows // 8, dtype=torch.int32, device=codes.device)
    for part in _slices(rows // 8, columns * 8):
        stream = torch.empty(octets[part].shape[0], columns, 4, dtype=torch.uint8, device=codes.device)
        for byte in range(4):
            low, high = AWQ_ORDER[2 * byte], AWQ_ORDER[2 * byte + 1]
            stream[:, :, byte] = octets[part, low] | (octets[part, high] << 4)
        out[:, part] = stream.view(torch.int32)[:, :, 0].t()
    return out


def unpack_awq(words: torch.Tensor) -> torch.Tensor:
    """Invert :func:`pack_awq`: int32 ``[n, out_features/8]`` to uint8 ``[out_features, n]``."""
    _check(words, torch.int32, 4)
    columns, eighth = words.shape
    out = torch.empty(eighth, 8, columns, dtype=torch.uint8, device=words.device)
    for part in _slices(eighth, columns * 8):
        stream = _bytes(words[:, part].t()).view(-1, columns, 4)
        for byte in range(4):
            out[part, AWQ_ORDER[2 * byte]] = stream[:, :, byte] & 15
            out[part, AWQ_ORDER[2 * byte + 1]] = stream[:, :, byte] >> 4
    return out.view(eighth * 8, columns)


def _pack_octets(codes: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    """Eight elements fill exactly ``bits`` bytes, so every byte is an OR of shifted bytes: no wider integers needed."""
    for byte in range(bits):
        first, last = byte * 8 // bits, (byte * 8 + 7) // bits
        place = byte * 8 - first * bits
        total = codes[:, first::8] >> place
        for element in range(first + 1, last + 1):
            total |= codes[:, element::8] << (element * bits - byte * 8)
        out[:, byte::bits] = total


def _unpack_octets(stream: torch.Tensor, bits: int, out: torch.Tensor) -> None:
    mask = (1 << bits) - 1
    for element in range(8):
        first, place = divmod(element * bits, 8)
        code = stream[:, first::bits] >> place
        if place + bits > 8:
            code = code | (stream[:, first + 1 :: bits] << (8 - place))
        out[:, element::8] = code & mask


def _bytes(words: torch.Tensor) -> torch.Tensor:
    # contiguous() may keep any stride along a side of length 1, which view() then refuses; a copy does not.
    return words.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _slices(rows: int, elements_per_row: int) -> Iterator[slice]:
    step = max(1, _SLICE_ELEMENTS // max(1, elements_per_row))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _check(tensor: torch.Tensor, dtype: torch.dtype, bits: int) -> None:
    if tensor.dtype != dtype or tensor.dim() != 2:
        raise ValueError(f"expected a {dtype} matrix, got {tensor.dtype} of shape {tuple(tensor.shape)}")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, not {bits}")


def _check_length(found: int, needed: int, count: int, bits: int) -> None:
    if found != needed:
        raise ValueError(f"{count} elements of {bits} bits need {needed} words, found {found}")
