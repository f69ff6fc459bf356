"""Number formats: pure tensor math, no IO."""

from lowbit.formats.spec import PER_CHANNEL, PER_TENSOR, IntSpec, parse_spec
from lowbit.formats.tensor import QuantizedTensor

__all__ = ["PER_CHANNEL", "PER_TENSOR", "IntSpec", "QuantizedTensor", "parse_spec"]
