"""lowbit's arithmetic of vLLM's key-value pages against vLLM's own.

    .venv/bin/python tests/engines/vllm_pool_check.py --cases build/vllm_pool.json     # what lowbit says
    .venvs/vllm/bin/python tests/engines/vllm_pool_check.py --check build/vllm_pool.json

Written by the project's interpreter, checked by that of the `vllm` environment: the same layers go through
`get_kv_cache_groups`, and page bytes, pages of a request and groups have to be the same numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
FAMILIES = (
    *("gemma3_text", "gemma4_text", "gpt_oss", "llama4_text", "cohere2"),
    *("qwen3_next", "jamba", "falcon_h1", "kimi_linear"),
)
CONTEXTS = (1000, 8192, 100_000)
BATCH = 2048
BLOCK = 16


def main() -> int:
    """Write the cases, or check them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=Path)
    parser.add_argument("--check", type=Path)
    options = parser.parse_args()
    if options.cases is not None:
        options.cases.parent.mkdir(parents=True, exist_ok=True)
        options.cases.write_text(json.dumps(cases()))
        return 0
    wrong = 0
    for case in json.loads(options.check.read_text()):
        found = ask_vllm(case)
        same = found == case["expected"]
        wrong += not same
        print(f"{'same' if same else 'DIFFERENT'}  {case['name']}, {case['context']} tokens: {found}")
        if not same:
            print(f"           lowbit says {case['expected']}")
    return 1 if wrong else 0


def cases() -> list[dict[str, Any]]:
    """Layers of published and default models, and what lowbit makes of them."""
    from transformers import AutoConfig

    from lowbit.checkpoint import ModelDescription
    from lowbit.checkpoint.layers import layer_states
    from lowbit.planning.kv import constant_bytes, vllm_pool
    from lowbit.planning.kv_dtypes import KV_DTYPES

    configs = {path.stem: json.loads(path.read_text()) for path in sorted(CONFIGS.glob("*.json"))}
    configs |= {name: AutoConfig.for_model(name).to_dict() for name in FAMILIES}
    found = []
    for name, config in configs.items():
        states = layer_states(config, ModelDescription.from_config(config))
        pool = vllm_pool(states, KV_DTYPES["bfloat16"], 1, BATCH)
        layers = [
            {"heads": s.kv_heads, "key": s.key_dim, "value": s.value_dim, "window": s.window, "chunked": s.chunked}
            | {"latent": s.latent, "state": constant_bytes(s, 2)}
            for s in states
        ]
        for context in CONTEXTS:
            expected = [pool.page_bytes, pool.request_pages(context), len(pool.groups)]
            found.append({"name": name, "context": context, "layers": layers, "expected": expected})
    return found


def ask_vllm(case: dict[str, Any]) -> list[int]:
    """Page bytes over a group, pages of one request, and groups, as vLLM computes them for layer-outermost caches."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    for name in ("_get_packed_kv_cache_groups", "get_hisparse_kv_cache_groups"):
        setattr(kv_cache_utils, name, lambda *arguments, **named: None)
    for name in ("_annotate_eagle_groups", "_warn_if_unannotated_eagle_mamba"):
        setattr(kv_cache_utils, name, lambda *arguments, **named: None)
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=case["context"]),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, tensor_parallel_size=1),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False, max_num_batched_tokens=BATCH),
        cache_config=SimpleNamespace(mamba_cache_mode="align", block_size=BLOCK),
        max_in_flight_tokens=2 * BATCH,
        speculative_config=None,
    )
    groups = kv_cache_utils.get_kv_cache_groups(config, _specs(case["layers"]))
    pages = 0
    sizes = []
    for group in groups:
        spec = group.kv_cache_spec
        pages += -(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes)
        layers = 1 if isinstance(spec, UniformTypeKVCacheSpecs) else len(group.layer_names)
        sizes.append(spec.page_size_bytes * layers)
    return [max(sizes), pages, len(groups)]


def _specs(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """vLLM's spec of each layer, pages of states and attention aligned as its platform does."""
    import torch
    from vllm.v1 import kv_cache_interface as interface

    attending = [layer for layer in layers if layer["heads"]]
    states = [layer["state"] for layer in layers if layer["state"]]
    block, page = BLOCK, None
    if states and attending:
        token = max(2 * layer["heads"] * (layer["key"] + layer["value"]) for layer in attending)
        block = BLOCK * -(-max(states) // (BLOCK * token))
        page = block * token
    found: dict[str, Any] = {}
    for index, layer in enumerate(layers):
        if layer["state"]:
            found[f"state.{index}"] = interface.MambaSpec(
                block_size=block,
                shapes=((layer["state"],),),
                dtypes=(torch.uint8,),
                page_size_padded=page,
                mamba_cache_mode="align",
            )
        if not layer["heads"]:
            continue
        common = {"block_size": block, "num_kv_heads": layer["heads"], "head_size": layer["key"]}
        common |= {"head_size_v": layer["value"], "dtype": torch.bfloat16}
        if layer["latent"]:
            spec = interface.MLAAttentionSpec(**common)
        elif layer["chunked"]:
            spec = interface.ChunkedLocalAttentionSpec(**common, attention_chunk_size=layer["window"])
        elif layer["window"]:
            spec = interface.SlidingWindowSpec(**common, sliding_window=layer["window"])
        else:
            spec = interface.FullAttentionSpec(**common)
        found[f"attention.{index}"] = spec
    return found


if __name__ == "__main__":
    sys.exit(main())
