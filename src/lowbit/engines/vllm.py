"""vLLM's command line, as of 0.33."""

from __future__ import annotations

import json

from lowbit.engines.flags import EngineFlags, EngineProfile, gib, switch
from lowbit.errors import UnsupportedError

__all__ = ["VLLM", "check_vllm", "speculative_config"]

_KV = {
    "auto": "auto",
    "f16": "auto",
    "bf16": "auto",
    "fp8": "fp8",
    "fp8_e4m3": "fp8_e4m3",
    "fp8_e5m2": "fp8_e5m2",
    "int8": "int8_per_token_head",
    "int4": "int4_per_token_head",
}

VLLM = EngineProfile(
    name="vllm",
    launch=(
        # the builds for CPUs go by another package name, which `vllm serve` does not find itself by
        *(
            "{python}",
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            "{model}",
            "--served-model-name",
            "{name}",
        ),
        *("--host", "{host}", "--port", "{port}"),
    ),
    options={
        "context": "--max-model-len",
        "concurrency": "--max-num-seqs",
        "kv_dtype": "--kv-cache-dtype",
        "prefix_caching": switch("--enable-prefix-caching", "--no-enable-prefix-caching"),
        "kv_offload": gib("--kv-offloading-size"),
        "cpu_offload": gib("--cpu-offload-gb"),
        "tensor_parallel": "--tensor-parallel-size",
        "pipeline_parallel": "--pipeline-parallel-size",
        "draft_model": lambda value: (),  # with draft_tokens, in one JSON value: speculative_config
        "draft_tokens": lambda value: (),
        "gpu_memory": "--gpu-memory-utilization",
    },
    refused={
        "gpu_layers": "vLLM puts all layers on the GPU; say cpu_offload for the bytes that do not fit",
        "mmproj": "only llama.cpp takes a separate image encoder",
    },
    environment={"threads": "OMP_NUM_THREADS"},
    kv_dtypes=_KV,
)


def speculative_config(flags: EngineFlags) -> tuple[str, ...]:
    """``--speculative-config`` for a draft model; nothing without one."""
    if flags.draft_model is None:
        return ()
    return (
        "--speculative-config",
        json.dumps({"model": flags.draft_model, "num_speculative_tokens": flags.draft_tokens or 4}),
    )


def check_vllm(flags: EngineFlags) -> None:
    """Raise :class:`UnsupportedError` for combinations that vLLM refuses only when it starts."""
    reasons = []
    if flags.draft_model is not None and (flags.pipeline_parallel or 1) > 1:
        reasons.append("draft_model with pipeline_parallel: vLLM's draft models run on one pipeline stage only")
    if flags.kv_offload is not None and flags.prefix_caching is False:
        reasons.append("kv_offload without prefix_caching: what is moved to host memory is the prefix cache")
    if reasons:
        raise UnsupportedError("engine vllm cannot be run so", reasons)
