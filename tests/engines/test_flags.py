"""One vocabulary of settings: what each engine is told, and what is refused with which reason."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

import pytest

from lowbit.engines.flags import EngineFlags, build_command
from lowbit.engines.llama_server import build_parser
from lowbit.engines.presets import ENGINES, LLAMA_CPP
from lowbit.engines.vllm import VLLM, check_vllm, speculative_config
from lowbit.errors import UnsupportedError

EVERY: dict[str, Any] = {
    "context": 4096,
    "concurrency": 8,
    "kv_dtype": "f16",
    "prefix_caching": True,
    "kv_offload": 4 * 1024**3,
    "cpu_offload": 2 * 1024**3,
    "tensor_parallel": 2,
    "pipeline_parallel": 2,
    "draft_model": "draft",
    "draft_tokens": 4,
    "gpu_layers": 10,
    "gpu_memory": 0.8,
    "threads": 3,
    "threads_batch": 2,
    "batch": 1024,
    "ubatch": 256,
    "flash_attention": False,
    "cache_reuse": 64,
    "ngram_draft": 8,
    "ngram_match": 3,
    "mmproj": "eyes.gguf",
}


def test_every_setting_is_listed_here() -> None:
    assert set(EVERY) == {item.name for item in fields(EngineFlags)} - {"extra"}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("setting", EVERY)
def test_every_engine_takes_a_setting_or_says_why_not(engine: str, setting: str) -> None:
    profile = ENGINES[engine]
    given = {setting: EVERY[setting]}
    if setting == "draft_tokens":
        given["draft_model"] = "draft"
    if setting == "ngram_match":
        given["ngram_draft"] = 4
    if setting == "kv_dtype" and engine == "tgi":
        given["kv_dtype"] = "fp8"
    flags = EngineFlags(**given)
    if profile.refused.get(setting):
        with pytest.raises(UnsupportedError, match=f"{setting}: .{{15}}"):
            build_command(profile, "model", "name", flags, "python")
        return
    command, environment = build_command(profile, "model", "name", flags, "python")
    assert "{port}" in " ".join(command)
    assert all(isinstance(part, str) for part in command)
    assert all(isinstance(value, str) for value in environment.values())


RECORDED: dict[str, str] = {
    # SGLang's docs/advanced_features/server_arguments.md @ 004813e1, and launches in public repositories
    "sglang": """--model-path --served-model-name --host --port --context-length --max-running-requests --kv-cache-dtype
        --disable-radix-cache --enable-hierarchical-cache --hicache-size --cpu-offload-gb --tp-size --pp-size
        --speculative-algorithm --speculative-draft-model-path --speculative-num-draft-tokens --mem-fraction-static""",
    # LMDeploy's lmdeploy/cli/serve.py and cli/utils.py @ 00596da9
    "lmdeploy": """--server-name --server-port --model-name --session-len --max-batch-size --quant-policy --tp
        --enable-prefix-caching --cache-max-entry-count""",
    # TensorRT-LLM's tensorrt_llm/commands/serve.py @ 00209af1
    "tensorrt-llm": """--host --port --max_seq_len --max_batch_size --tp_size --pp_size
        --kv_cache_free_gpu_memory_fraction --extra_llm_api_options""",
    # TGI's docs/source/reference/launcher.md @ 032fc4c4
    "tgi": """--model-id --hostname --port --max-total-tokens --max-concurrent-requests --kv-cache-dtype --num-shard
        --cuda-memory-fraction --speculate""",
    "ollama": "OLLAMA_HOST OLLAMA_CONTEXT_LENGTH OLLAMA_NUM_PARALLEL OLLAMA_KV_CACHE_TYPE",
    # mistral.rs's reference of `mistralrs serve`, 2026
    "mistral.rs": "--host --port -m --max-seqs",
    # MLC's python/mlc_llm/cli/serve.py @ 01ced331
    "mlc": "--host --port --overrides --prefix-cache-mode --additional-models --speculative-mode",
}
"""Options of engines that are not installed here, as their own sources name them."""


@pytest.mark.parametrize("engine", RECORDED)
def test_engines_elsewhere_are_told_only_what_their_own_sources_name(engine: str) -> None:
    profile = ENGINES[engine]
    taken = {name: value for name, value in EVERY.items() if not profile.refused.get(name)}
    taken |= {"kv_dtype": "fp8"} if "kv_dtype" in taken and engine == "tgi" else {}
    known = {*profile.options, *profile.environment, "threads"}
    flags = EngineFlags(**{name: value for name, value in taken.items() if name in known})
    command, environment = build_command(profile, "MODEL", "NAME", flags, "python")
    own = command[2:] if command[0] == "python" else command  # without Python's -m
    told = {part.partition("=")[0] for part in own if part.startswith(("-", "OLLAMA_"))} | set(environment)
    assert told <= set(RECORDED[engine].split()), engine
    assert len(told) >= 4
    assert "{port}" in " ".join(command)


def test_vllm() -> None:
    flags = EngineFlags(
        context=8192, concurrency=16, kv_dtype="fp8", prefix_caching=False, cpu_offload=3 * 1024**3,
        tensor_parallel=2, gpu_memory=0.9, threads=4, extra=("--dtype", "float32"),
    )  # fmt: skip
    command, environment = build_command(VLLM, "/m", "chat", flags, "/venv/python")
    assert " ".join(command[1:]) == (
        "-m vllm.entrypoints.openai.api_server --model /m --served-model-name chat --host {host} --port {port} "
        "--max-model-len 8192 --max-num-seqs 16 --kv-cache-dtype fp8 --no-enable-prefix-caching --cpu-offload-gb 3 "
        "--tensor-parallel-size 2 --gpu-memory-utilization 0.9 --dtype float32"
    )
    assert environment == {"OMP_NUM_THREADS": "4"}


def test_what_vllm_refuses_only_when_it_starts_is_refused_here() -> None:
    check_vllm(EngineFlags(draft_model="d", prefix_caching=True, kv_offload=1))
    with pytest.raises(UnsupportedError, match="one pipeline stage only"):
        check_vllm(EngineFlags(draft_model="d", pipeline_parallel=2))
    with pytest.raises(UnsupportedError, match="is the prefix cache"):
        check_vllm(EngineFlags(kv_offload=1, prefix_caching=False))
    assert speculative_config(EngineFlags()) == ()
    assert '"num_speculative_tokens": 4' in speculative_config(EngineFlags(draft_model="d"))[1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tensor_parallel": 2, "gpu_memory": 0.5}, "tensor_parallel: llama.cpp divides.*gpu_memory: say gpu_layers"),
        ({"kv_dtype": "fp8"}, "llama.cpp has no fp8 KV cache: kv_dtype may be auto, bf16, f16"),
        ({"draft_tokens": 3}, "draft_tokens: needs draft_model"),
        ({"ngram_match": 3}, "ngram_match: needs ngram_draft"),
        ({"ngram_draft": 3, "draft_model": "d"}, "ngram_draft: one of it and draft_model"),
    ],
)
def test_refusals_give_every_reason(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        build_command(LLAMA_CPP, "m", "n", EngineFlags(**given), "python")


def test_llama_cpp_understands_its_own_command_line() -> None:
    given = {key: value for key, value in EVERY.items() if key not in LLAMA_CPP.refused and "ngram" not in key}
    command, _ = build_command(LLAMA_CPP, "m.gguf", "chat", EngineFlags(**given), "python")
    text = [part.replace("{port}", "1234") for part in command[3:]]
    parsed: argparse.Namespace = build_parser().parse_args(text)
    assert (parsed.model, parsed.alias, parsed.port) == ("m.gguf", "chat", 1234)
    assert (parsed.context, parsed.parallel, parsed.threads, parsed.kv_dtype) == (4096, 8, 3, "f16")
    assert (parsed.threads_batch, parsed.batch, parsed.ubatch, parsed.cache_reuse) == (2, 1024, 256, 64)
    assert parsed.flash_attention == "off"
    assert (parsed.prefix_cache_mib, parsed.draft_model, parsed.draft_tokens) == (4096, "draft", 4)


def test_llama_cpp_parameters() -> None:
    pytest.importorskip("xllamacpp")
    from lowbit.engines.llama_server import build_params

    text = "--model m --port 1 --context 100 --parallel 3 --threads 2 --kv-dtype q8_0 --no-prefix-cache --rerank"
    parsed = build_parser().parse_args([*text.split(), "--draft-model", "d"])
    params = build_params(parsed)
    assert (params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.cpuparams.poll) == (300, 3, 2, 0)
    assert params.cache_type_k == params.cache_type_v
    assert params.embedding
    assert not params.cache_prompt
    assert not params.ctx_shift, "a prompt is never silently cut"
    assert params.speculative.draft.mparams.path == "d"
    assert (params.n_batch, params.n_ubatch, params.cpuparams_batch.n_threads) == (2048, 512, 2)
    text = "--model m --port 1 --threads 2 --threads-batch 1 --batch 128 --ubatch 256 --flash-attention on"
    params = build_params(build_parser().parse_args([*text.split(), "--ngram-draft", "6", "--ngram-match", "3"]))
    assert (params.n_batch, params.n_ubatch) == (128, 128)
    assert (params.cpuparams.n_threads, params.cpuparams_batch.n_threads) == (2, 1)
    assert (params.speculative.ngram_simple.size_n, params.speculative.ngram_simple.size_m) == (3, 6)


def test_an_engine_that_cannot_be_told_a_name_goes_by_its_path() -> None:
    assert LLAMA_CPP.takes_name
    assert VLLM.takes_name
    assert not ENGINES["tgi"].takes_name
