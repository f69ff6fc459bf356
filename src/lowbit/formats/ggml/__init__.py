"""The block formats of ggml (llama.cpp): what their bytes mean."""

from lowbit.formats.ggml.decode import decode
from lowbit.formats.ggml.tensor import BlockTensor, finite_scales, scale_rows
from lowbit.formats.ggml.types import GGML_IDS, GGML_TYPES, GgmlType

__all__ = ["GGML_IDS", "GGML_TYPES", "BlockTensor", "GgmlType", "decode", "finite_scales", "scale_rows"]
