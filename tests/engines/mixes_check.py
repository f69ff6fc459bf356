"""The types that lowbit's mixes choose against those that llama.cpp's quantizer would write, over many small models.

    python tests/engines/mixes_check.py [--record]

The models are hollow: metadata and small matrices, which is all that the choice depends on. `--record` writes what
llama.cpp chose to tests/codecs/gguf/mixes.json, which tests/codecs/gguf/test_mixes.py holds lowbit to without it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.codecs.gguf.mixes import MIXES, choose_types
from lowbit.codecs.gguf.writing import TensorHeader, write_gguf
from lowbit.formats.ggml.types import GGML_TYPES

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".venvs" / "llamacpp" / "bin" / "python"
RECORD = ROOT / "tests" / "codecs" / "gguf" / "mixes.json"

Case = dict[str, Any]


def dense(
    architecture: str, layers: int, heads: int, kv_heads: int, *, width: int = 256, ffn: int = 512, tied: bool = False,
    fused: bool = False, gated: bool = True, **extra: Any
) -> Case:  # fmt: skip
    """A model without experts: `{"metadata", "layers", "shell", "block"}`, tensors by name (of a block: by suffix)."""
    keys = {
        "block_count": layers, "context_length": 512, "embedding_length": width, "feed_forward_length": ffn,
        "attention.head_count": heads, "attention.head_count_kv": kv_heads, "vocab_size": 64,
        "attention.layer_norm_rms_epsilon": 1e-5, "attention.layer_norm_epsilon": 1e-5,
        "attention.causal": True, "use_parallel_residual": True, "rope.dimension_count": width // heads,
        "attention.sliding_window": 256, **extra,
    }  # fmt: skip
    kv = width * kv_heads // heads
    attention = {"attn_qkv": [width + 2 * kv, width]} if fused else {
        "attn_q": [width, width], "attn_k": [kv, width], "attn_v": [kv, width],
    }  # fmt: skip
    ffns = {"ffn_gate": [ffn, width]} if gated else {}
    block = {
        "attn_norm": [width], "ffn_norm": [width], **attention, "attn_output": [width, width],
        **ffns, "ffn_up": [ffn, width], "ffn_down": [width, ffn],
    }  # fmt: skip
    shell = {"token_embd.weight": [64, width], "output_norm.weight": [width]}
    return {
        "metadata": {"general.architecture": architecture, **{f"{architecture}.{k}": v for k, v in keys.items()}},
        "layers": layers,
        "shell": shell if tied else shell | {"output.weight": [64, width]},
        "block": block,
    }


def experts(case: Case, count: int, *, shared: bool = False) -> Case:
    """The same model with `count` experts in place of its feed-forward matrices, and a shared one beside them."""
    architecture = case["metadata"]["general.architecture"]
    block: dict[str, list[int]] = {}
    for name, shape in case["block"].items():
        if name.startswith("ffn_") and name != "ffn_norm":
            block[f"{name}_exps"] = [count, *shape]
            if shared:
                block[f"{name}_shexp"] = shape
        else:
            block[name] = shape
    block["ffn_gate_inp"] = [count, block["attn_norm"][0]]
    if shared:
        block["ffn_gate_inp_shexp"] = [block["attn_norm"][0]]
    extra = {"expert_count": count, "expert_used_count": 2, "expert_feed_forward_length": 512}
    return case | {
        "metadata": case["metadata"] | {f"{architecture}.{key}": value for key, value in extra.items()},
        "block": block,
    }


def cases() -> dict[str, Case]:
    """The hollow models."""
    return {
        "llama, heads of their own": dense("llama", 24, 4, 4),
        "llama, shared heads, tied": dense("llama", 17, 8, 2, tied=True),
        "llama, two heads share": dense("llama", 9, 4, 2),
        "llama of 80 layers": dense("llama", 80, 8, 1, width=256, ffn=256),
        "llama with 8 experts": experts(dense("llama", 16, 8, 2), 8),
        "llama with 4 experts": experts(dense("llama", 18, 4, 4), 4),
        "llama, rows of 288": dense("llama", 16, 4, 4, width=288, ffn=576),
        "llama, rows of 288, tied": dense("llama", 10, 4, 4, width=288, ffn=512, tied=True),
        "llama, rows of 80": dense("llama", 10, 4, 4, width=80, ffn=160),
        "qwen2": dense("qwen2", 28, 4, 2),
        "qwen2 of 80 layers": dense("qwen2", 80, 4, 4, width=256, ffn=256),
        "qwen2moe": experts(dense("qwen2moe", 12, 4, 4), 6, shared=True),
        "qwen3": dense("qwen3", 28, 8, 2),
        "qwen3moe": experts(dense("qwen3moe", 24, 8, 2), 8),
        "gemma2": dense("gemma2", 26, 4, 2, tied=True),
        "phi3": dense("phi3", 16, 4, 4, fused=True, gated=False),
        "gptneox": dense("gptneox", 16, 4, 4, fused=True, gated=False),
        "bert": dense("bert", 12, 4, 4, gated=False, tied=True, **{"attention.causal": False, "pooling_type": 1}),
    }


def tensors_of(case: Case) -> list[TensorHeader]:
    """Headers of all tensors, in F32 (as llama.cpp's converter leaves norms and routers) or F16."""
    named = dict(case["shell"])
    for layer in range(case["layers"]):
        named |= {f"blk.{layer}.{suffix}.weight": shape for suffix, shape in case["block"].items()}
    return [
        TensorHeader(name, GGML_TYPES["F32" if len(shape) == 1 or "gate_inp" in name else "F16"], tuple(shape))
        for name, shape in named.items()
    ]


class Shape:
    """What :func:`choose_types` wants to know of a tensor."""

    def __init__(self, header: TensorHeader) -> None:
        self.name = header.name
        self.shape = header.shape
        self.keep_float = header.type.name == "F32"


def compact(types: dict[str, str]) -> dict[str, str]:
    """Types by suffix, layer after layer as runs: `{"ffn_down": "3 Q6_K, 2 Q4_K"}`."""
    columns: dict[str, list[tuple[int, str]]] = {}
    for name, kind in types.items():
        match = re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", name)
        columns.setdefault(match[2] if match else name, []).append((int(match[1]) if match else 0, kind))
    return {
        suffix: ", ".join(f"{len(list(run))} {kind}" for kind, run in groupby(kind for _, kind in sorted(column)))
        for suffix, column in columns.items()
    }


def record(labels: dict[str, dict[str, str]]) -> dict[str, str]:
    """The same in few words: `12 Q4_K: attn_q ffn_up; …`, without what an importance matrix or `pure` leaves alone."""
    texts = {}
    for label, columns in labels.items():
        inverted: dict[str, list[str]] = {}
        for suffix, runs in columns.items():
            if not runs.endswith(" F32"):
                inverted.setdefault(runs, []).append(suffix)
        texts[label] = "; ".join(f"{runs}: {' '.join(suffixes)}" for runs, suffixes in inverted.items())
    return {
        label: text
        for label, text in texts.items()
        if not label.endswith("pure") and (text != texts[label.partition(" ")[0]] or " " not in label)
    }


def run(directory: Path) -> dict[str, dict[str, dict[str, str]]]:
    """What llama.cpp chose: case to `scheme[ imatrix][ pure]` to compact types."""
    jobs, labels = [], []
    for case_name, case in cases().items():
        headers = tensors_of(case)
        source = directory / f"{len(jobs)}.gguf"
        data = [np.ones(h.shape, np.float32 if h.type.name == "F32" else np.float16) for h in headers]
        write_gguf(source, case["metadata"], headers, data)
        sizes = {h.name: int(np.prod(h.shape)) // h.shape[-2] for h in headers if len(h.shape) > 1}
        for scheme, mix in MIXES.items():
            for guided, pure in ((False, False), (True, False), (True, True)):
                imatrix = sizes if guided else None
                jobs.append({"source": str(source), "file_type": mix.file_type, "pure": pure, "imatrix": imatrix})
                labels.append((case_name, scheme + " imatrix" * guided + " pure" * pure))
    (directory / "jobs.json").write_text(json.dumps(jobs))
    command = [str(PEER), str(Path(__file__).with_name("llamacpp_types.py")), str(directory / "jobs.json")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, dict[str, dict[str, str]]] = {}
    for types, (case_name, label) in zip(json.loads(done.stdout.splitlines()[-1]), labels, strict=True):
        if types is not None:
            found.setdefault(case_name, {})[label] = compact(types)
    return found


def main() -> int:
    """Compare, and say where lowbit and llama.cpp differ."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", action="store_true", help="write what llama.cpp chose to the table of the tests")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        found = run(Path(directory))
    compared = wrong = 0
    for case_name, case in cases().items():
        for label, expected in found.get(case_name, {}).items():
            scheme, *flags = label.split()
            chosen = choose_types(
                MIXES[scheme],
                [Shape(header) for header in tensors_of(case)],
                case["metadata"],
                has_imatrix="imatrix" in flags,
                pure="pure" in flags,
            )
            ours = compact({name: str(kind) for name, kind in chosen.items()})
            compared += 1
            if ours != expected:
                wrong += 1
                different = {k: (ours.get(k), expected[k]) for k in expected if ours.get(k) != expected[k]}
                print(f"DIFFERENT {case_name} / {label}: {different}")
    print(f"{compared} mixes of {len(found)} models compared with llama.cpp, {wrong} differ")
    if arguments.record:
        table = {"cases": cases(), "types": {name: record(labels) for name, labels in found.items()}}
        RECORD.write_text(json.dumps(table, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
