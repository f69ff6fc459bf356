"""The types of ggml: how many weights share a block and how many bytes it takes.

Names, ids and sizes are those of ``enum ggml_type`` and of the block structures of ggml, release of October 2026.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["GGML_IDS", "GGML_TYPES", "GgmlType"]


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A type of ggml: runs of ``block_size`` weights along a row, each stored in ``block_bytes`` bytes.

    ``id`` is the number that GGUF files hold.
    """

    name: str
    id: int
    block_size: int
    block_bytes: int

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.block_bytes / self.block_size

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits per weight of a matrix ``[out_features, in_features]``; every shape that fits gives the same."""
        return self.bits

    def fits(self, columns: int) -> bool:
        """Whether a row of ``columns`` weights is a whole number of blocks."""
        return columns % self.block_size == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of ``columns`` weights, which must fit."""
        return columns // self.block_size * self.block_bytes

    def columns(self, row_bytes: int) -> int:
        """Weights in a row of ``row_bytes`` bytes, which must be a whole number of blocks."""
        return row_bytes // self.block_bytes * self.block_size


GGML_TYPES: Mapping[str, GgmlType] = MappingProxyType(
    {
        "F32": GgmlType("F32", 0, 1, 4),
        "F16": GgmlType("F16", 1, 1, 2),
        "BF16": GgmlType("BF16", 30, 1, 2),
        "Q4_0": GgmlType("Q4_0", 2, 32, 18),
        "Q4_1": GgmlType("Q4_1", 3, 32, 20),
        "Q5_0": GgmlType("Q5_0", 6, 32, 22),
        "Q5_1": GgmlType("Q5_1", 7, 32, 24),
        "Q8_0": GgmlType("Q8_0", 8, 32, 34),
        "Q2_K": GgmlType("Q2_K", 10, 256, 84),
        "Q3_K": GgmlType("Q3_K", 11, 256, 110),
        "Q4_K": GgmlType("Q4_K", 12, 256, 144),
        "Q5_K": GgmlType("Q5_K", 13, 256, 176),
        "Q6_K": GgmlType("Q6_K", 14, 256, 210),
        "IQ2_XXS": GgmlType("IQ2_XXS", 16, 256, 66),
        "IQ2_XS": GgmlType("IQ2_XS", 17, 256, 74),
        "IQ3_XXS": GgmlType("IQ3_XXS", 18, 256, 98),
        "IQ1_S": GgmlType("IQ1_S", 19, 256, 50),
        "IQ4_NL": GgmlType("IQ4_NL", 20, 32, 18),
        "IQ3_S": GgmlType("IQ3_S", 21, 256, 110),
        "IQ2_S": GgmlType("IQ2_S", 22, 256, 82),
        "IQ4_XS": GgmlType("IQ4_XS", 23, 256, 136),
        "IQ1_M": GgmlType("IQ1_M", 29, 256, 56),
        "TQ1_0": GgmlType("TQ1_0", 34, 256, 54),
        "TQ2_0": GgmlType("TQ2_0", 35, 256, 66),
        "MXFP4": GgmlType("MXFP4", 39, 32, 17),
        "NVFP4": GgmlType("NVFP4", 40, 64, 36),
    }
)
"""Every type that lowbit reads and writes, by name."""

GGML_IDS: Mapping[int, GgmlType] = MappingProxyType({kind.id: kind for kind in GGML_TYPES.values()})
"""The same types by the number that stands for them in a file."""
