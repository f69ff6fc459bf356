"""Quantize a checkpoint with auto-round; run by the interpreter of its own environment.

    python benchmarks/peers/autoround_peer.py MODEL OUT --bits 4 --tokens IDS.npy

`IDS.npy` is int64 [samples, seq_len]. Its defaults otherwise: 200 iterations a block. The last line printed is a JSON
object: seconds of each phase, versions.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

START = time.perf_counter()


def main() -> None:
    """Load, tune and quantize, save; report the seconds of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()

    import numpy as np
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if options.threads:
        torch.set_num_threads(options.threads)
    imported = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    loaded = time.perf_counter()
    ids = np.load(options.tokens)
    tuner = AutoRound(
        model,
        tokenizer,
        bits=options.bits,
        group_size=options.group_size,
        sym=True,
        iters=options.iterations,
        nsamples=len(ids),
        seqlen=ids.shape[1],
        dataset=[torch.from_numpy(row[None]) for row in ids],
        device_map="cpu",
        amp=False,
    )
    tuner.quantize_and_save(str(options.out), format="auto_gptq")
    saved = time.perf_counter()
    phases = {"import": imported - START, "load": loaded - imported, "quantize and save": saved - loaded}
    print(json.dumps({"phases": phases, "versions": {name: version(name) for name in ("auto-round", "torch")}}))


if __name__ == "__main__":
    main()
