"""lowbit: from a Hugging Face checkpoint to a verified low-bit model.

The verbs of the command line are functions here, with typed results::

    import lowbit

    lowbit.quantize("demo", "demo-int4", method="gptq", bits=4)
    print(lowbit.evaluate("demo-int4", against="demo").kl_divergence)

Names are loaded on first use, so that ``import lowbit`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.codecs.conversion import ConversionResult
    from lowbit.errors import (
        CalibrationError,
        CheckpointError,
        LowbitError,
        NumericsError,
        ResourceError,
        UnsupportedError,
        UsageError,
    )
    from lowbit.evaluation.certify import quantize
    from lowbit.evaluation.evaluate import evaluate
    from lowbit.evaluation.inspect import Inspection
    from lowbit.evaluation.inspect import inspect_checkpoint as inspect
    from lowbit.evaluation.results import Evaluation
    from lowbit.evaluation.verify import Verification
    from lowbit.evaluation.verify import verify_checkpoint as verify
    from lowbit.pipeline.gguf_convert import convert
    from lowbit.pipeline.imatrix import ImatrixResult, imatrix
    from lowbit.pipeline.quantize import QuantizeResult
    from lowbit.sizing.estimate import estimate
    from lowbit.sizing.estimate_results import Estimate
    from lowbit.sizing.fit import FitResult, fit
    from lowbit.sizing.recommend import Recommendation, recommend

__version__ = "0.1.0"

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "ConversionResult",
    "Estimate",
    "Evaluation",
    "FitResult",
    "ImatrixResult",
    "Inspection",
    "LowbitError",
    "NumericsError",
    "QuantizeResult",
    "Recommendation",
    "ResourceError",
    "UnsupportedError",
    "UsageError",
    "Verification",
    "__version__",
    "convert",
    "estimate",
    "evaluate",
    "fit",
    "imatrix",
    "inspect",
    "quantize",
    "recommend",
    "verify",
]

_ORIGINS = {
    "CalibrationError": ("lowbit.errors", "CalibrationError"),
    "CheckpointError": ("lowbit.errors", "CheckpointError"),
    "ConversionResult": ("lowbit.codecs.conversion", "ConversionResult"),
    "Estimate": ("lowbit.sizing.estimate_results", "Estimate"),
    "Evaluation": ("lowbit.evaluation.results", "Evaluation"),
    "FitResult": ("lowbit.sizing.fit", "FitResult"),
    "ImatrixResult": ("lowbit.pipeline.imatrix", "ImatrixResult"),
    "Inspection": ("lowbit.evaluation.inspect", "Inspection"),
    "LowbitError": ("lowbit.errors", "LowbitError"),
    "NumericsError": ("lowbit.errors", "NumericsError"),
    "QuantizeResult": ("lowbit.pipeline.quantize", "QuantizeResult"),
    "Recommendation": ("lowbit.sizing.recommend", "Recommendation"),
    "ResourceError": ("lowbit.errors", "ResourceError"),
    "UnsupportedError": ("lowbit.errors", "UnsupportedError"),
    "UsageError": ("lowbit.errors", "UsageError"),
    "Verification": ("lowbit.evaluation.verify", "Verification"),
    "convert": ("lowbit.pipeline.gguf_convert", "convert"),
    "estimate": ("lowbit.sizing.estimate", "estimate"),
    "evaluate": ("lowbit.evaluation.evaluate", "evaluate"),
    "fit": ("lowbit.sizing.fit", "fit"),
    "imatrix": ("lowbit.pipeline.imatrix", "imatrix"),
    "inspect": ("lowbit.evaluation.inspect", "inspect_checkpoint"),
    "quantize": ("lowbit.evaluation.certify", "quantize"),
    "recommend": ("lowbit.sizing.recommend", "recommend"),
    "verify": ("lowbit.evaluation.verify", "verify_checkpoint"),
}


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _ORIGINS[name]
    except KeyError:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}") from None
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
