"""Quantize a checkpoint with HQQ through transformers; run by the interpreter of its own environment.

    python benchmarks/peers/hqq_peer.py MODEL OUT --bits 4 --group-size 64

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
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, HqqConfig

    if options.threads:
        torch.set_num_threads(options.threads)
    imported = time.perf_counter()
    config = HqqConfig(nbits=options.bits, group_size=options.group_size, axis=1)
    model = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    quantized = time.perf_counter()
    model.save_pretrained(options.out)
    saved = time.perf_counter()
    phases = {"import": imported - START, "load and quantize": quantized - imported, "save": saved - quantized}
    print(json.dumps({"phases": phases, "versions": {name: version(name) for name in ("hqq", "transformers")}}))


if __name__ == "__main__":
    main()
