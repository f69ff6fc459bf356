"""The engines that lowbit can start: a profile each, after their own documentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lowbit.engines.flags import EngineProfile, gib, mib, switch
from lowbit.engines.vllm import VLLM

__all__ = ["ENGINES", "LLAMA_CPP"]

_LLAMA_KV = {name: name for name in ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")} | {
    "int8": "q8_0",
    "int4": "q4_0",
    "auto": "f16",
}

LLAMA_CPP = EngineProfile(
    name="llama.cpp",
    launch=(
        "{python}",
        "-m",
        "lowbit.engines.llama_server",
        "--model",
        "{model}",
        "--alias",
        "{name}",
        "--port",
        "{port}",
    ),
    options={
        "context": "--context",
        "concurrency": "--parallel",
        "kv_dtype": "--kv-dtype",
        "prefix_caching": switch(None, "--no-prefix-cache"),
        "kv_offload": mib("--prefix-cache-mib"),
        "draft_model": "--draft-model",
        "draft_tokens": "--draft-tokens",
        "gpu_layers": "--gpu-layers",
        "threads": "--threads",
        "threads_batch": "--threads-batch",
        "batch": "--batch",
        "ubatch": "--ubatch",
        "flash_attention": lambda value: ("--flash-attention", "on" if value else "off"),
        "cache_reuse": "--cache-reuse",
        "ngram_draft": "--ngram-draft",
        "ngram_match": "--ngram-match",
        "mmproj": "--mmproj",
    },
    refused={
        "tensor_parallel": "llama.cpp divides the layers among the GPUs by itself",
        "pipeline_parallel": "llama.cpp divides the layers among the GPUs by itself",
        "cpu_offload": "say gpu_layers: the layers beyond it stay in host memory",
        "gpu_memory": "say gpu_layers and context instead",
    },
    kv_dtypes=_LLAMA_KV,
    probe="/slots",
)

_NO_GGUF = "only llama.cpp takes a separate image encoder"
_NO_LAYERS = "this engine puts all layers on the GPU"

SGLANG = EngineProfile(
    name="sglang",
    launch=(
        *("{python}", "-m", "sglang.launch_server", "--model-path", "{model}", "--served-model-name", "{name}"),
        *("--host", "{host}", "--port", "{port}"),
    ),
    options={
        "context": "--context-length",
        "concurrency": "--max-running-requests",
        "kv_dtype": "--kv-cache-dtype",
        "prefix_caching": switch(None, "--disable-radix-cache"),
        "kv_offload": lambda value: ("--enable-hierarchical-cache", "--hicache-size", str(max(1, value // 10**9))),
        "cpu_offload": gib("--cpu-offload-gb"),
        "tensor_parallel": "--tp-size",
        "pipeline_parallel": "--pp-size",
        "draft_model": lambda value: ("--speculative-algorithm", "STANDALONE", "--speculative-draft-model-path", value),
        "draft_tokens": "--speculative-num-draft-tokens",
        "gpu_memory": "--mem-fraction-static",
    },
    refused={"gpu_layers": _NO_LAYERS, "mmproj": _NO_GGUF},
    kv_dtypes={"auto": "auto", "f16": "auto", "bf16": "bf16", "fp8": "fp8_e4m3", "fp8_e5m2": "fp8_e5m2"},
    probe="/health_generate",
)

LMDEPLOY = EngineProfile(
    name="lmdeploy",
    launch=(
        *("lmdeploy", "serve", "api_server", "{model}", "--model-name", "{name}"),
        *("--server-name", "{host}", "--server-port", "{port}"),
    ),
    options={
        "context": "--session-len",
        "concurrency": "--max-batch-size",
        "kv_dtype": "--quant-policy",
        "prefix_caching": switch("--enable-prefix-caching", None),
        "tensor_parallel": "--tp",
        "gpu_memory": "--cache-max-entry-count",
    },
    refused={
        "pipeline_parallel": "LMDeploy has tensor parallelism only",
        "kv_offload": "LMDeploy keeps the cache on the GPU",
        "cpu_offload": "LMDeploy keeps the weights on the GPU",
        "draft_model": "not mapped: give LMDeploy's own flags as extra",
        "draft_tokens": "not mapped: give LMDeploy's own flags as extra",
        "gpu_layers": _NO_LAYERS,
        "mmproj": _NO_GGUF,
    },
    kv_dtypes={"auto": "0", "f16": "0", "bf16": "0", "int8": "8", "int4": "4"},
)

TENSORRT_LLM = EngineProfile(
    name="tensorrt-llm",
    launch=("trtllm-serve", "{model}", "--host", "{host}", "--port", "{port}"),
    options={
        "context": "--max_seq_len",
        "concurrency": "--max_batch_size",
        "tensor_parallel": "--tp_size",
        "pipeline_parallel": "--pp_size",
        "gpu_memory": "--kv_cache_free_gpu_memory_fraction",
    },
    refused=dict.fromkeys(
        ("kv_dtype", "prefix_caching", "kv_offload", "cpu_offload", "draft_model", "draft_tokens"),
        "TensorRT-LLM takes it from a YAML file: give ['--extra_llm_api_options', FILE] as extra",
    )
    | {"gpu_layers": _NO_LAYERS, "mmproj": _NO_GGUF},
)

TGI = EngineProfile(
    name="tgi",
    launch=("text-generation-launcher", "--model-id", "{model}", "--hostname", "{host}", "--port", "{port}"),
    options={
        "context": "--max-total-tokens",
        "concurrency": "--max-concurrent-requests",
        "kv_dtype": "--kv-cache-dtype",
        "prefix_caching": lambda value: (),
        "tensor_parallel": "--num-shard",
        "gpu_memory": "--cuda-memory-fraction",
    },
    refused={
        "pipeline_parallel": "TGI has tensor parallelism only",
        "kv_offload": "TGI keeps the cache on the GPU",
        "cpu_offload": "TGI keeps the weights on the GPU",
        "draft_model": "TGI speculates with heads that come with the model: give ['--speculate', N] as extra",
        "draft_tokens": "TGI speculates with heads that come with the model: give ['--speculate', N] as extra",
        "gpu_layers": _NO_LAYERS,
        "mmproj": _NO_GGUF,
    },
    kv_dtypes={"fp8": "fp8_e4m3fn", "fp8_e5m2": "fp8_e5m2"},
)

OLLAMA = EngineProfile(
    name="ollama",
    launch=("env", "OLLAMA_HOST={host}:{port}", "ollama", "serve"),
    options={"prefix_caching": lambda value: ()},
    environment={
        "context": "OLLAMA_CONTEXT_LENGTH",
        "concurrency": "OLLAMA_NUM_PARALLEL",
        "kv_dtype": "OLLAMA_KV_CACHE_TYPE",
    },
    refused=dict.fromkeys(
        (
            *("tensor_parallel", "pipeline_parallel", "kv_offload", "cpu_offload", "draft_model", "draft_tokens"),
            *("gpu_layers", "gpu_memory", "mmproj"),
        ),
        "Ollama decides it by itself",
    ),
    kv_dtypes={"f16": "f16", "auto": "f16", "int8": "q8_0", "int4": "q4_0"},
    health="/api/version",
)

MISTRAL_RS = EngineProfile(
    name="mistral.rs",
    launch=("mistralrs", "serve", "--host", "{host}", "--port", "{port}", "-m", "{model}"),
    options={"concurrency": "--max-seqs"},
    refused=dict.fromkeys(
        (
            *("context", "kv_dtype", "kv_offload", "cpu_offload", "tensor_parallel", "pipeline_parallel"),
            *("draft_model", "draft_tokens", "gpu_layers", "gpu_memory", "mmproj", "prefix_caching"),
        ),
        "not mapped: give mistral.rs's own flags as extra",
    ),
    health="/v1/models",
)

MLC = EngineProfile(
    name="mlc",
    launch=("{python}", "-m", "mlc_llm", "serve", "{model}", "--host", "{host}", "--port", "{port}"),
    options={
        "context": lambda value: ("--overrides", f"context_window_size={value}"),
        "prefix_caching": lambda value: ("--prefix-cache-mode", "radix" if value else "disable"),
        "draft_model": lambda value: ("--additional-models", value, "--speculative-mode", "small_draft"),
    },
    refused=dict.fromkeys(
        (
            *("concurrency", "kv_dtype", "kv_offload", "cpu_offload", "tensor_parallel", "pipeline_parallel"),
            *("draft_tokens", "gpu_layers", "gpu_memory", "mmproj"),
        ),
        "MLC takes it as an override or at compile time: give ['--overrides', …] as extra",
    ),
    health="/v1/models",
)

_LLAMA_CPP_ONLY = dict.fromkeys(
    ("threads_batch", "batch", "ubatch", "flash_attention", "cache_reuse", "ngram_draft", "ngram_match"),
    "a setting of llama.cpp: give this engine's own flags as extra",
)

ENGINES: Mapping[str, EngineProfile] = {LLAMA_CPP.name: LLAMA_CPP} | {
    profile.name: replace(profile, refused={**_LLAMA_CPP_ONLY, **profile.refused})
    for profile in (VLLM, SGLANG, LMDEPLOY, TENSORRT_LLM, TGI, OLLAMA, MISTRAL_RS, MLC)
}
"""Profiles by the name that ``engine:`` of a tier takes."""
