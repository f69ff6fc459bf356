"""Number formats: pure tensor math, no IO."""

from lowbit.formats.activations import ActivationSpec, fake_quantize
from lowbit.formats.codebook import CodebookSpec, CodebookTensor, NestedScales
from lowbit.formats.dense import DenseSpec, DenseTensor
from lowbit.formats.floating import FloatSpec, FloatTensor
from lowbit.formats.scheme import PRESETS, Scheme, parse_scheme, parse_spec
from lowbit.formats.spec import PER_CHANNEL, PER_TENSOR, IntSpec
from lowbit.formats.tensor import QuantizedTensor
from lowbit.formats.weights import WeightSpec, WeightTensor

__all__ = [
    "PER_CHANNEL",
    "PER_TENSOR",
    "PRESETS",
    "ActivationSpec",
    "CodebookSpec",
    "CodebookTensor",
    "DenseSpec",
    "DenseTensor",
    "FloatSpec",
    "FloatTensor",
    "IntSpec",
    "NestedScales",
    "QuantizedTensor",
    "Scheme",
    "WeightSpec",
    "WeightTensor",
    "fake_quantize",
    "parse_scheme",
    "parse_spec",
]
