"""Hold the codes of lowbit's bitsandbytes checkpoints to those that bitsandbytes itself makes of the same weights.

    .venvs/bitsandbytes/bin/python tests/engines/bitsandbytes_check.py FOLDER

`FOLDER` is what make_checkpoints.py wrote. NF4 and FP4 codes and block maxima must be equal bit for bit. Maxima under
double quantization may differ by one code where one lies within 2e-5 of the middle of two: bitsandbytes' CPU kernel
finds codes through a table of 16-bit resolution. Rows of LLM.int8() are scaled by search in lowbit; with its range
method `absmax` (the rule of bitsandbytes) they are compared in the project's own tests.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from bitsandbytes.functional import quantize_4bit
from safetensors import safe_open

SCHEMES = {"nf4": ("nf4", False), "nf4_dq": ("nf4", True), "fp4": ("fp4", False), "fp4_dq": ("fp4", True)}
MOST_NEIGHBOURS = 0.005
"""Largest share of doubly quantized maxima that may have the neighbouring code."""


def main() -> int:
    """Compare every module of the four checkpoints; 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    failed = 0
    for scheme, (kind, nested) in SCHEMES.items():
        problem, modules, weights, neighbours = compare(folder, f"bitsandbytes-rtn-{scheme}", kind, nested)
        failed += problem is not None or modules == 0
        verdict = f"FAILED: {problem}" if problem else f"{weights:,} codes equal"
        print(f"{scheme:8} {modules} modules, {verdict}, {neighbours} maxima with the neighbouring code", flush=True)
    return 1 if failed else 0


def compare(folder: Path, name: str, kind: str, nested: bool) -> tuple[str | None, int, int, int]:
    """What differs first, and how many modules, weights and neighbouring codes of maxima were seen."""
    modules = weights = neighbours = maxima = 0
    with (
        safe_open(folder / "dense" / "model.safetensors", "pt") as source,
        safe_open(folder / name / "model.safetensors", "pt") as ours,
    ):
        for key in ours.keys():  # noqa: SIM118
            if not key.endswith(".absmax") or key.endswith(".nested_absmax"):
                continue
            weight = key.removesuffix(".absmax")
            packed, state = quantize_4bit(
                source.get_tensor(weight).float(), blocksize=64, quant_type=kind, compress_statistics=nested
            )
            modules, weights = modules + 1, weights + source.get_tensor(weight).numel()
            if not torch.equal(packed.flatten(), ours.get_tensor(weight).flatten()):
                return f"codes of {weight}", modules, weights, neighbours
            if not torch.equal(state.code, ours.get_tensor(f"{weight}.quant_map")):
                return f"table of {weight}", modules, weights, neighbours
            apart = (state.absmax.float() - ours.get_tensor(key).float()).abs()
            if not nested and bool(apart.any()):
                return f"maxima of {weight}", modules, weights, neighbours
            if nested:
                neighbours, maxima = neighbours + int((apart == 1).sum()), maxima + apart.numel()
                if int(apart.max()) > 1 or neighbours > MOST_NEIGHBOURS * maxima + 1:
                    return f"maxima of {weight}", modules, weights, neighbours
                if not torch.equal(state.state2.code, ours.get_tensor(f"{weight}.nested_quant_map")):
                    return f"table of maxima of {weight}", modules, weights, neighbours
    return None, modules, weights, neighbours


if __name__ == "__main__":
    raise SystemExit(main())
