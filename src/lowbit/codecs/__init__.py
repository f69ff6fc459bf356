"""Codecs: one file per on-disk format of quantized weights, each an encode/decode pair on local tensor names."""

from collections.abc import Mapping

from lowbit.codecs.awq import AwqCodec
from lowbit.codecs.bitsandbytes import BitsAndBytesCodec
from lowbit.codecs.codec import Codec, StoredBlocks, StoredGrid, StoredModule, TensorHeader
from lowbit.codecs.compressed_tensors import CompressedTensorsCodec
from lowbit.codecs.dense import DenseCodec
from lowbit.codecs.fitting import fit, fitting_spec, regrid
from lowbit.codecs.gptq import GptqCodec
from lowbit.codecs.hqq import HqqCodec
from lowbit.codecs.opening import open_model
from lowbit.codecs.reading import (
    dense_names,
    local_tensors,
    module_plan,
    read_dense,
    read_dense_rows,
    read_quantized,
    read_weight,
    stored_format,
)

__all__ = [
    "CODECS",
    "AwqCodec",
    "BitsAndBytesCodec",
    "Codec",
    "CompressedTensorsCodec",
    "DenseCodec",
    "GptqCodec",
    "HqqCodec",
    "StoredBlocks",
    "StoredGrid",
    "StoredModule",
    "TensorHeader",
    "dense_names",
    "fit",
    "fitting_spec",
    "local_tensors",
    "module_plan",
    "open_model",
    "read_dense",
    "read_dense_rows",
    "read_quantized",
    "read_weight",
    "regrid",
    "stored_format",
]

CODECS: Mapping[str, Codec] = {
    "gptq": GptqCodec(),
    "gptq_v2": GptqCodec(version=2),
    "awq": AwqCodec(),
    "compressed-tensors": CompressedTensorsCodec(),
    "bitsandbytes": BitsAndBytesCodec(),
    "hqq": HqqCodec(),
    "dense": DenseCodec(),
}
"""Formats that can be written, by the name the command line takes."""
