"""Asks llama.cpp's quantizer, in a dry run, for the types it would choose; for the environment `llamacpp`.

    .venvs/llamacpp/bin/python tests/engines/llamacpp_types.py jobs.json

A job is {"source", "file_type", "pure", "imatrix": {tensor: number of values} or null}; the values are ones. Prints one
line of JSON: for each job the types by tensor, or null where llama.cpp refused.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from pathlib import Path
from typing import Any

import llama_cpp

LINE = re.compile(r"\]\s+(\S+)\s+- \[.*?\], type =\s+(\w+), size =[^(\n]*(?:\((\w+)\))?", re.MULTILINE)


def main() -> int:
    """Run all jobs."""
    said: list[str] = []
    listen = llama_cpp.llama_log_callback(lambda level, text, data: said.append(text.decode("utf-8", "replace")))
    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    results = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        said.clear()
        refused = quantize(job) != 0
        types = {name: (new or old).upper() for name, old, new in LINE.findall("".join(said))}
        results.append(None if refused else types)
    print(json.dumps(results))
    return 0


def quantize(job: dict[str, Any]) -> int:
    """Run one job; 0 if llama.cpp would do it."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = 1
    parameters.ftype = job["file_type"]
    parameters.pure = job["pure"]
    parameters.dry_run = True
    keep: list[Any] = []
    if job["imatrix"] is not None:
        entries = (llama_cpp.llama_model_imatrix_data * (len(job["imatrix"]) + 1))()
        for entry, (name, count) in zip(entries, job["imatrix"].items(), strict=False):
            values = (ctypes.c_float * count)(*([1.0] * count))
            keep.append(values)
            entry.name = name.encode()
            entry.data = ctypes.cast(values, ctypes.POINTER(ctypes.c_float))
            entry.size = count
        parameters.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    return int(llama_cpp.llama_model_quantize(job["source"].encode(), b"/dev/null", ctypes.byref(parameters)))


if __name__ == "__main__":
    raise SystemExit(main())
