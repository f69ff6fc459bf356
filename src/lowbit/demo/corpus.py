"""The demo model's text: the training half of the standard library, held-out half for evaluation."""

from lowbit.calibration.standard_library import HELD_OUT, held_out_text, sources, standard_library

__all__ = ["HELD_OUT", "held_out_text", "sources", "standard_library"]
