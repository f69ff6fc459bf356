"""The streaming pipeline: a checkpoint flows through block by block and leaves quantized."""
