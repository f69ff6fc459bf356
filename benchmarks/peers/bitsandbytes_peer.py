"""Quantize a checkpoint with bitsandbytes through transformers; run by the interpreter of its own environment.

    python benchmarks/peers/bitsandbytes_peer.py MODEL OUT --type nf4|fp4|int8 [--double-quant]

The last line printed is a JSON object: seconds of each phase, versions.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

START = time.perf_counter()


def main() -> None:
    """Quantize while loading, save; report the seconds of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=["nf4", "fp4", "int8"], default="nf4")
    parser.add_argument("--double-quant", action="store_true")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if options.threads:
        torch.set_num_threads(options.threads)
    imported = time.perf_counter()
    if options.type == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=options.type, bnb_4bit_use_double_quant=options.double_quant
        )
    model = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    quantized = time.perf_counter()
    model.save_pretrained(options.out)
    saved = time.perf_counter()
    phases = {"import": imported - START, "load and quantize": quantized - imported, "save": saved - quantized}
    print(json.dumps({"phases": phases, "versions": {name: version(name) for name in ("bitsandbytes", "torch")}}))


if __name__ == "__main__":
    main()
