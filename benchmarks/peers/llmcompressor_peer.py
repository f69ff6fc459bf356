"""Quantize a checkpoint with llm-compressor; run by the interpreter of its own environment.

    python benchmarks/peers/llmcompressor_peer.py MODEL OUT --method gptq|awq|smoothquant --tokens IDS.npy

`IDS.npy` is int64 [samples, seq_len]. The last line printed is a JSON object: seconds of each phase, versions.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

START = time.perf_counter()


def main() -> None:
    """Load, calibrate and quantize, save; report the seconds of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--method", choices=["gptq", "awq", "smoothquant", "rtn"], required=True)
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()

    import numpy as np
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if options.threads:
        torch.set_num_threads(options.threads)
    if not torch.accelerator.is_available():
        _without_pinned_memory()
    imported = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    loaded = time.perf_counter()
    ids = np.load(options.tokens)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_list(rows),
        recipe=_recipe(options.method, options.scheme),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
        pipeline="sequential",
    )
    quantized = time.perf_counter()
    model.save_pretrained(options.out, save_compressed=True)
    tokenizer.save_pretrained(options.out)
    saved = time.perf_counter()
    phases = {
        "import": imported - START,
        "load": loaded - imported,
        "quantize": quantized - loaded,
        "save": saved - quantized,
    }
    print(json.dumps({"phases": phases, "versions": {name: version(name) for name in ("llmcompressor", "torch")}}))


def _recipe(method: str, scheme: str) -> Any:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    plan = {"targets": ["Linear"], "ignore": ["lm_head"], "scheme": scheme}
    if method == "gptq":
        return GPTQModifier(dampening_frac=0.01, **plan)
    if method == "awq":
        return [AWQModifier(), QuantizationModifier(**plan)]
    if method == "smoothquant":
        return [SmoothQuantModifier(smoothing_strength=0.8), GPTQModifier(dampening_frac=0.01, **plan)]
    return QuantizationModifier(**plan)


def _without_pinned_memory() -> None:
    """Make pinning do nothing: AWQ pins its caches even where there is no accelerator, and torch then refuses."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda self, batch_index: None


if __name__ == "__main__":
    main()
