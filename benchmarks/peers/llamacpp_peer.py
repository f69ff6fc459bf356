"""Quantize a GGUF file with llama.cpp; run by the interpreter of the environment `llamacpp`.

    python benchmarks/peers/llamacpp_peer.py SOURCE.gguf OUT.gguf --type Q4_K_M [--imatrix FILE.gguf] --threads 2

The last line printed is a JSON object: seconds of each phase, versions. llama.cpp's converter, which makes the source,
is a script of its own in the environment's `source` folder.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

START = time.perf_counter()


def main() -> None:
    """Quantize once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", required=True)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

    import llama_cpp

    imported = time.perf_counter()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = options.threads
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{options.type}")
    keep: list[Any] = []
    if options.imatrix is not None:
        entries = importance(llama_cpp, options.imatrix, keep)
        parameters.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    source, out = str(options.source).encode(), str(options.out).encode()
    if llama_cpp.llama_model_quantize(source, out, ctypes.byref(parameters)) != 0:
        raise SystemExit(f"llama.cpp refused to make {options.out}")
    done = time.perf_counter()
    phases = {"import": imported - START, "quantize": done - imported}
    versions = {"llama-cpp-python": version("llama-cpp-python")}
    print(json.dumps({"phases": phases, "versions": versions}))


def importance(llama_cpp: Any, path: Path, keep: list[Any]) -> Any:
    """llama.cpp's array of entries (the last one empty) from an importance matrix in its GGUF form."""
    import gguf
    import numpy as np

    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
    entries = (llama_cpp.llama_model_imatrix_data * (len(names) + 1))()
    for entry, name in zip(entries, names, strict=False):
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"].reshape(-1, 1)
        means = np.where(counts > 0, sums.reshape(len(counts), -1) / np.maximum(counts, 1), 1.0)
        values = np.ascontiguousarray(means, np.float32).ravel()
        keep.append((values, name.encode()))
        entry.name = keep[-1][1]
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    keep.append(entries)
    return entries


if __name__ == "__main__":
    main()
