"""What the peers that quantize while transformers loads have in common: load, save, report the seconds of each."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

START = time.perf_counter()


def parser(description: str | None) -> argparse.ArgumentParser:
    """Model, output and threads; the peer adds its own options."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("model", type=Path)
    made.add_argument("out", type=Path)
    made.add_argument("--threads", type=int)
    return made


def run(options: argparse.Namespace, make_config: Callable[[], Any], packages: tuple[str, ...]) -> None:
    """Quantize with what ``make_config`` returns, and print the report as the last line."""
    import torch
    from transformers import AutoModelForCausalLM

    if options.threads:
        torch.set_num_threads(options.threads)
    config = make_config()
    imported = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    quantized = time.perf_counter()
    model.save_pretrained(options.out)
    saved = time.perf_counter()
    phases = {"import": imported - START, "load and quantize": quantized - imported, "save": saved - quantized}
    print(json.dumps({"phases": phases, "versions": {name: version(name) for name in packages}}))
