"""Error and time of each GGUF type: lowbit's encoder and llama.cpp's, on the same rows, in one process.

    python benchmarks/peers/ggml_types.py LIBGGML.so IMATRIX.gguf [--types Q4_K IQ2_S] [--rows 64] [--columns 2048]

Run by the project's interpreter; only ggml's library comes from the peer's environment. One thread each; the processor
seconds of the fastest of three runs. Rows are Gaussian, or all matrices of the embedded model with the importance that
its own text gives. Without importance llama.cpp weighs by its own rules, and some types do without only if given ones;
`ones` compares with that for all. Errors are sums of importance times squared error, decoded by the `gguf` package.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize

from lowbit.codecs import module_plan, open_model
from lowbit.codecs.gguf.architectures import export_plan, load_tensor
from lowbit.codecs.gguf.imatrix import read_imatrix
from lowbit.formats.ggml import GGML_TYPES, GgmlType
from lowbit.kernels.ggml import quantize_rows

FLOATS = ("F32", "F16", "BF16")
Matrix = tuple[np.ndarray, np.ndarray]


def main() -> None:
    """Compare all types; a JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("library", type=Path)
    parser.add_argument("imatrix", type=Path)
    parser.add_argument("--types", nargs="+", default=[name for name in GGML_TYPES if name not in FLOATS])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--columns", type=int, default=2048)
    options = parser.parse_args()
    torch.set_num_threads(1)
    peer = Peer(options.library)
    random = [gaussian(options.rows, options.columns)]
    real = list(model_matrices(options.imatrix))
    for name in options.types:
        kind = GGML_TYPES[name]
        row = {"type": name, "gaussian": compare(peer, kind, random), "model": compare(peer, kind, real)}
        print(json.dumps(row), flush=True)


class Peer:
    """`ggml_quantize_chunk`."""

    def __init__(self, library: Path) -> None:
        self._ggml = ctypes.CDLL(str(library))
        self._ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._ggml.ggml_quantize_chunk.argtypes = [
            ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
            ctypes.c_void_p,
        ]  # fmt: skip
        self._ggml.ggml_quantize_requires_imatrix.restype = ctypes.c_bool

    def requires_importance(self, kind: GgmlType) -> bool:
        return bool(self._ggml.ggml_quantize_requires_imatrix(kind.id))

    def quantize(self, weight: np.ndarray, kind: GgmlType, importance: np.ndarray | None) -> np.ndarray:
        rows, columns = weight.shape
        blocks = np.empty((rows, kind.row_bytes(columns)), np.uint8)
        pointer = None if importance is None else importance.ctypes.data
        self._ggml.ggml_quantize_init(kind.id)
        self._ggml.ggml_quantize_chunk(kind.id, weight.ctypes.data, blocks.ctypes.data, 0, rows, columns, pointer)
        return blocks


def gaussian(rows: int, columns: int) -> Matrix:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((rows, columns)).astype(np.float32) * np.float32(0.02)
    return weight, np.exp(generator.standard_normal(columns)).astype(np.float32)


def model_matrices(imatrix: Path) -> Iterator[Matrix]:
    """The embedded model's matrices that have importance."""
    matrix = read_imatrix(imatrix)
    with open_model("demo") as checkpoint, torch.no_grad():
        plan = module_plan(checkpoint)
        for tensor in export_plan(checkpoint, plan).tensors:
            if len(tensor.shape) == 2:
                importance = matrix.importance(tensor.name, 1, tensor.shape[1])
                if importance is not None:
                    weight = load_tensor(checkpoint, plan, tensor).float().numpy()
                    yield np.ascontiguousarray(weight), np.ascontiguousarray(importance[0])


def compare(peer: Peer, kind: GgmlType, matrices: list[Matrix]) -> dict[str, Any]:
    """Relative root mean square errors and nanoseconds per weight of both, without and with importance."""
    matrices = [matrix for matrix in matrices if kind.fits(matrix[0].shape[1])]
    warm = matrices[0][0][:1]
    quantize_rows(warm, kind)
    quantize_rows(warm, kind, np.ones(warm.shape[1], np.float32))
    peer.quantize(warm, kind, np.ones(warm.shape[1], np.float32))
    ones = [np.ones(weight.shape[1], np.float32) for weight, _ in matrices]
    own = run(lambda w, i: quantize_rows(w, kind), kind, matrices, ones)
    own_ones = run(lambda w, i: quantize_rows(w, kind, np.ones_like(i)), kind, matrices, ones)
    with_ones = run(lambda w, i: peer.quantize(w, kind, np.ones_like(i)), kind, matrices, ones)
    plain = with_ones
    if not peer.requires_importance(kind):
        plain = run(lambda w, i: peer.quantize(w, kind, None), kind, matrices, ones)
    given = [importance for _, importance in matrices]
    weighted = run(lambda w, i: quantize_rows(w, kind, i), kind, matrices, given)
    theirs_weighted = run(lambda w, i: peer.quantize(w, kind, i), kind, matrices, given)
    return {
        "plain": {"lowbit": own, "llama.cpp": plain, "ratio": own["error"] / plain["error"]},
        "ones": {"lowbit": own_ones, "llama.cpp": with_ones, "ratio": own_ones["error"] / with_ones["error"]},
        "weighted": {
            "lowbit": weighted,
            "llama.cpp": theirs_weighted,
            "ratio": weighted["error"] / theirs_weighted["error"],
        },
    }


def run(
    encode: Callable[[np.ndarray, np.ndarray], np.ndarray],
    kind: GgmlType,
    matrices: list[Matrix],
    shares: list[np.ndarray],
) -> dict[str, float]:
    """Squared error relative to the weights' own sum of squares, and nanoseconds per weight."""
    lost = whole = 0.0
    for (weight, importance), share in zip(matrices, shares, strict=True):
        decoded = dequantize(encode(weight, importance), gguf.GGMLQuantizationType[kind.name])
        exact = weight.astype(np.float64)
        lost += float((share * (exact - decoded) ** 2).sum())
        whole += float((share * exact**2).sum())
    seconds = []
    for _ in range(3):
        start = time.process_time()
        for weight, importance in matrices:
            encode(weight, importance)
        seconds.append(time.process_time() - start)
    return {"error": lost / whole, "ns": min(seconds) / sum(weight.size for weight, _ in matrices) * 1e9}


if __name__ == "__main__":
    main()
