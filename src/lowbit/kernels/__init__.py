"""Hot loops: one reference in torch per operation, then compiled ones (numba on the CPU, Triton on CUDA).

The compiled modules are imported by the first call that needs them: numba and Triton are slow to load.
"""

from lowbit.kernels.gptq import quantize_columns, quantize_columns_reference
from lowbit.kernels.ranges import best_candidate, best_candidate_reference

__all__ = ["best_candidate", "best_candidate_reference", "quantize_columns", "quantize_columns_reference"]
