"""compressed-tensors checkpoints: one file per way that weights lie in them."""

from lowbit.codecs.compressed_tensors.codec import STORAGES, CompressedTensorsCodec

__all__ = ["STORAGES", "CompressedTensorsCodec"]
