"""Quantize a checkpoint with GPTQModel; run by the interpreter of its own environment.

    python benchmarks/peers/gptqmodel_peer.py MODEL OUT --method gptq|gptaq|foem|awq --tokens IDS.npy

`IDS.npy` is int64 [samples, seq_len]. The last line printed is a JSON object: seconds of each phase, versions.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from importlib.metadata import version
from pathlib import Path

START = time.perf_counter()


def main() -> None:
    """Load, calibrate and quantize, save; report the seconds of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=["gptq", "gptaq", "foem", "awq"], required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()

    # Without it the looper finds no worker on a machine that has no accelerator.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    import numpy as np
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig
    from transformers import AutoTokenizer

    if options.threads:
        torch.set_num_threads(options.threads)
    imported = time.perf_counter()
    settings = {"bits": options.bits, "group_size": options.group_size, "offload_to_disk": False}
    if options.method == "awq":
        settings |= {"quant_method": "awq", "format": "gemm"}
    else:
        settings |= {"desc_act": False, "damp_percent": 0.01}
    if options.method == "gptaq":
        settings |= {"gptaq": GPTAQConfig()}
    elif options.method == "foem":
        settings |= {"foem": FOEMConfig(alpha=0.25, beta=0.2)}
    model = GPTQModel.load(str(options.model), QuantizeConfig(**settings), device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    loaded = time.perf_counter()
    rows = np.load(options.tokens)
    model.quantize([{"input_ids": r.tolist(), "attention_mask": [1] * len(r)} for r in rows], tokenizer=tokenizer)
    quantized = time.perf_counter()
    model.save(str(options.out))
    tokenizer.save_pretrained(options.out)
    saved = time.perf_counter()
    phases = {
        "import": imported - START,
        "load": loaded - imported,
        "quantize": quantized - loaded,
        "save": saved - quantized,
    }
    print(json.dumps({"phases": phases, "versions": {name: version(name) for name in ("gptqmodel", "torch")}}))


if __name__ == "__main__":
    main()
