"""Calibration and evaluation text: reading, chat templating, packing, presets and content hashes."""

from lowbit.calibration.hub import PRESETS, HubSource
from lowbit.calibration.load import (
    CalibrationSet,
    EvaluationText,
    Generate,
    encode_text,
    load_calibration,
    load_text,
)
from lowbit.calibration.packing import ids_hash
from lowbit.calibration.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "PRESETS",
    "CalibrationSet",
    "EvaluationText",
    "Generate",
    "HubSource",
    "Tokenizer",
    "encode_text",
    "ids_hash",
    "load_calibration",
    "load_text",
    "load_tokenizer",
]
